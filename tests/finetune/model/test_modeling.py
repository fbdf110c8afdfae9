"""Tests of finetune.model.modeling and finetune.spec.checkpointing: values, padding, and more."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from finetune.errors import InputError
from finetune.model import dropout as dropout_module
from finetune.model import encoder_layer
from finetune.model.dropout import DropoutKey, draw_mask
from finetune.model.modeling import (
    ForwardPass,
    classifier_logits,
    create_variables,
    encode,
    squad_logits,
)
from finetune.spec.checkpointing import (
    NO_CHECKPOINTING,
    POLICIES,
    Checkpointing,
    parse_checkpointing,
)
from finetune.spec.config import HEADS, INPUT_NAMES, BertConfig, is_trained, variable_shapes
from finetune.train.gradients import example_losses
from helpers.tiny_models import CONFIG, NUM_LABELS, Arrays, operations_needed, random_batch

SEQ_LEN = 7


def random_weights(config: BertConfig, head: str) -> Arrays:
    """Draw every weight, also those that begin as 0 or 1, so that none can be left out."""
    rng = np.random.default_rng(1)
    return {
        name: (name.endswith("gamma") + rng.normal(0, 0.3, shape)).astype(np.float32)
        for name, shape in variable_shapes(config, head, NUM_LABELS).items()
    }


def variables_of(weights: Arrays, head: str = "squad") -> dict[str, tf.Variable]:
    return {n: tf.Variable(w, trainable=is_trained(n, head)) for n, w in weights.items()}


# Values: the encoder once more, in float64, example by example and head by head.


def reference_encode(weights: Arrays, config: BertConfig, batch: Arrays, row: int) -> np.ndarray:
    """The last layer's output for one example, `[s, h]`, written from the paper's formulas."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        return scaled * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def act(x: np.ndarray) -> np.ndarray:
        if config.hidden_act == "relu":
            return np.maximum(x, 0)
        if config.hidden_act == "gelu_erf":
            return x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    ids, mask, segments = (batch[name][row] for name in INPUT_NAMES)
    x = w["bert/embeddings/word_embeddings"][ids]
    x = x + w["bert/embeddings/token_type_embeddings"][segments]
    x = x + w["bert/embeddings/position_embeddings"][: len(ids)]
    x = norm(x, "bert/embeddings/LayerNorm")
    d = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        prefix = f"bert/encoder/layer_{layer}"
        q, k, v = (
            linear(x, f"{prefix}/attention/self/{name}") for name in ("query", "key", "value")
        )
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * d, (head + 1) * d)
            scores = q[:, part] @ k[:, part].T / np.sqrt(d) - 10000.0 * (1 - mask)
            exponents = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(exponents / exponents.sum(-1, keepdims=True) @ v[:, part])
        attended = linear(np.concatenate(heads, -1), f"{prefix}/attention/output/dense")
        x = norm(attended + x, f"{prefix}/attention/output/LayerNorm")
        inner = act(linear(x, f"{prefix}/intermediate/dense"))
        x = norm(linear(inner, f"{prefix}/output/dense") + x, f"{prefix}/output/LayerNorm")
    return x


@pytest.mark.parametrize("hidden_act", ["gelu_tanh", "gelu_erf", "relu"])
def test_logits_of_both_heads(hidden_act: str) -> None:
    config = dataclasses.replace(CONFIG, hidden_act=hidden_act, layer_norm_eps=0.01)
    batch = random_batch(3, SEQ_LEN)
    for head in HEADS:
        weights = random_weights(config, head)
        variables = variables_of(weights, head)
        sequence = encode(variables, config, batch)
        for row in range(3):
            x = reference_encode(weights, config, batch, row)
            np.testing.assert_allclose(sequence[row], x, atol=2e-5)
            if head == "squad":
                expected = weights["cls/squad/output_weights"] @ x.T
                expected += weights["cls/squad/output_bias"][:, None]
                got = squad_logits(variables, sequence)[:, row]
            else:
                pooled = x[0] @ weights["bert/pooler/dense/kernel"]
                pooled = np.tanh(pooled + weights["bert/pooler/dense/bias"])
                expected = weights["output_weights"] @ pooled + weights["output_bias"]
                got = classifier_logits(variables, config, sequence)[row]
            np.testing.assert_allclose(got, expected, atol=5e-5)


def test_padding_does_not_reach_the_tokens() -> None:
    variables = variables_of(random_weights(CONFIG, "squad"))
    batch = random_batch(4, SEQ_LEN)
    mask = batch["input_mask"]
    other = dict(batch)
    other["input_ids"] = np.where(mask, batch["input_ids"], 9)
    other["segment_ids"] = np.where(mask, batch["segment_ids"], 1)
    plain, changed = (encode(variables, CONFIG, b).numpy() for b in (batch, other))
    np.testing.assert_array_equal(plain[mask == 1], changed[mask == 1])
    assert (plain[mask == 0] != changed[mask == 0]).any()

    longer = {n: np.pad(batch[n], ((0, 0), (0, 3)), constant_values=0) for n in INPUT_NAMES}
    padded = encode(variables, CONFIG, longer).numpy()[:, :SEQ_LEN]
    np.testing.assert_allclose(padded[mask == 1], plain[mask == 1], atol=1e-5)


def test_examples_do_not_see_each_other() -> None:
    variables = variables_of(random_weights(CONFIG, "squad"))
    batch = random_batch(3, SEQ_LEN)
    other = {name: value.copy() for name, value in batch.items()}
    other["input_ids"][1] = 3
    plain, changed = (encode(variables, CONFIG, b).numpy() for b in (batch, other))
    np.testing.assert_array_equal(plain[[0, 2]], changed[[0, 2]])


# Dropout


def key_of(step: int = 0) -> DropoutKey:
    return DropoutKey(0, tf.constant(step, tf.int64), tf.constant(0, tf.int64))


@pytest.mark.parametrize("checkpointing", POLICIES)
def test_every_dropout_has_its_rate_and_a_site_of_its_own(
    monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    calls: list[tuple[int, float]] = []

    def record(
        rows: tf.Tensor, row_shape: Sequence[int], rate: float, key: DropoutKey, site: int
    ) -> tf.Tensor:
        calls.append((site, rate))
        return draw_mask(rows, row_shape, rate, key, site)

    for module in (encoder_layer, dropout_module):
        monkeypatch.setattr(module, "draw_mask", record)
    variables = variables_of(random_weights(CONFIG, "classifier"), "classifier")
    forward = ForwardPass(key_of(), parse_checkpointing(checkpointing))
    sequence = encode(variables, CONFIG, random_batch(2, SEQ_LEN), forward)
    classifier_logits(variables, CONFIG, sequence, key_of())
    assert len({site for site, _ in calls}) == len(calls) == 2 + 3 * CONFIG.num_hidden_layers
    rates = Counter(rate for _, rate in calls)
    assert rates == {
        CONFIG.attention_probs_dropout_prob: CONFIG.num_hidden_layers,
        CONFIG.hidden_dropout_prob: 2 + 2 * CONFIG.num_hidden_layers,
    }


def test_dropout_only_with_a_key() -> None:
    variables = variables_of(random_weights(CONFIG, "squad"))
    batch, dropping = random_batch(2, SEQ_LEN), ForwardPass(key_of(1))
    first, again, plain, without = (
        encode(variables, CONFIG, batch, dropping).numpy(),
        encode(variables, CONFIG, batch, dropping).numpy(),
        encode(variables, CONFIG, batch).numpy(),
        encode(variables, CONFIG.without_dropout(), batch, dropping).numpy(),
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(plain, without)
    assert np.abs(first - plain).max() > 0.1


# Variables


def test_variables_begin_as_in_the_original() -> None:
    config = dataclasses.replace(CONFIG, vocab_size=2000)
    variables = create_variables(config, "classifier", num_labels=NUM_LABELS)
    shapes = variable_shapes(config, "classifier", NUM_LABELS)
    assert {name: v.shape.as_list() for name, v in variables.items()} == shapes
    for name, variable in variables.items():
        value = variable.numpy()
        if name.endswith("gamma"):
            assert (value == 1).all()
        elif name.endswith(("beta", "bias")):
            assert (value == 0).all()
        else:
            assert np.abs(value).max() <= 2 * config.initializer_range
            assert np.unique(value).size > 1
    words = variables["bert/embeddings/word_embeddings"].numpy()
    # A normal distribution cut at two standard deviations has 0.8796 of the standard deviation.
    assert words.std() == pytest.approx(0.8796 * config.initializer_range, rel=0.02)
    assert words.mean() == pytest.approx(0, abs=0.01 * config.initializer_range)


def test_variables_are_drawn_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernels and XLA make other floats of the same random integers."""
    devices: list[str] = []
    draw = tf.random.stateless_truncated_normal

    def recorded(*arguments: object, **more: object) -> tf.Tensor:
        devices.append(context.context().device_name)
        return draw(*arguments, **more)

    monkeypatch.setattr(tf.random, "stateless_truncated_normal", recorded)
    create_variables(CONFIG, "classifier")
    assert len(devices) > 10
    assert all(device.lower().endswith("device:cpu:0") for device in devices)


def test_variables_depend_on_seed_and_position_alone() -> None:
    first, again, other = (create_variables(CONFIG, "squad", seed=seed) for seed in (1, 1, 2))
    deeper = create_variables(dataclasses.replace(CONFIG, num_hidden_layers=3), "squad", seed=1)
    kernels = [name for name in first if name.endswith("kernel")]
    for name in kernels:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name].numpy() != other[name].numpy()).all()
    name = "bert/encoder/layer_1/attention/self/query/kernel"
    np.testing.assert_array_equal(first[name], deeper[name])
    square = [first[n].numpy() for n in kernels if first[n].shape == (8, 8)]
    assert len({array.tobytes() for array in square}) == len(square)


def test_pooler_is_trained_under_the_classifier_alone() -> None:
    for head in HEADS:
        frozen = {n for n, v in create_variables(CONFIG, head).items() if not v.trainable}
        pooler = {"bert/pooler/dense/kernel", "bert/pooler/dense/bias"}
        assert frozen == (pooler if head == "squad" else set())


# Checkpointing


def operations_of_gradient(checkpointing: str) -> Counter[str]:
    """Count the operations that a gradient needs, before the graph is optimised."""
    variables = create_variables(CONFIG, "squad")
    batch = random_batch(2, SEQ_LEN)

    @tf.function
    def gradient() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            losses = example_losses(
                variables,
                CONFIG,
                "squad",
                {name: tf.constant(value) for name, value in batch.items()},
                ForwardPass(key_of(), parse_checkpointing(checkpointing)),
            )
        trained = [v for v in variables.values() if v.trainable]
        return [tf.convert_to_tensor(g) for g in tape.gradient(losses, trained)]

    return operations_needed(gradient.get_concrete_function().graph)


def test_full_runs_the_layers_it_names_twice_but_for_their_last_product() -> None:
    none, full, first = (operations_of_gradient(text) for text in ("none", "full", "full:1"))
    again = {
        "MatMul": 5,
        "BatchMatMulV2": 2,
        "Softmax": 1,
        "StatelessRandomUniformFullIntV2": 3,
        "Tanh": 1,
    }
    for operation, count in again.items():
        # The embeddings' dropout is drawn again with the first layer.
        extra = int(operation == "StatelessRandomUniformFullIntV2")
        assert full[operation] - none[operation] == 2 * count + extra, operation
        assert first[operation] - none[operation] == count + extra, operation


@pytest.mark.parametrize(
    ("text", "policy", "layers"),
    [
        ("none", "none", [0, 0, 0]),
        ("full", "full", [1, 1, 1]),
        (" Full:2 ", "full", [1, 1, 0]),
        ("full:0", "full", [0, 0, 0]),
        ("full:18", "full", [1, 1, 1]),
        ("nested:2", "nested", [1, 1, 0]),
        ("selective", "selective", [1, 1, 1]),
    ],
)
def test_policies(text: str, policy: str, layers: list[int]) -> None:
    checkpointing = parse_checkpointing(text)
    assert checkpointing.policy == policy
    assert [checkpointing.of_layer(index) for index in range(3)] == [
        policy if chosen else "none" for chosen in layers
    ]
    assert str(checkpointing) == text.strip().lower()
    assert parse_checkpointing(str(checkpointing)) == checkpointing


def test_a_policy_for_the_other_layers() -> None:
    checkpointing = parse_checkpointing("Nested:1+selective")
    assert [checkpointing.of_layer(i) for i in range(3)] == ["nested", "selective", "selective"]
    assert str(checkpointing) == "nested:1+selective"
    assert parse_checkpointing(str(checkpointing)) == checkpointing


@pytest.mark.parametrize(
    "text",
    [
        "full+selective",
        "full:2+",
        "full:2+none",
        "full:2+full:3",
        "",
        "some",
        "full:",
        "full:-1",
        "full:1.5",
        "none:2",
        "full:1:2",
    ],
)
def test_unknown_policies(text: str) -> None:
    with pytest.raises(InputError, match="unknown checkpointing policy"):
        parse_checkpointing(text)


def test_no_checkpointing_is_none() -> None:
    assert parse_checkpointing("none") == NO_CHECKPOINTING == Checkpointing()
