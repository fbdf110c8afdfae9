"""Precisions: what is computed in which type, and how near bfloat16 stays to float32."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from bertbench.hardware.accelerators import check_precision
from finetune.errors import InputError
from finetune.model.layers import attention, dense, layer_norm
from finetune.model.modeling import create_variables
from finetune.spec.precisions import allow_tensor_float_32, compute_bytes
from finetune.spec.step_settings import ModelSpec, StepSettings
from finetune.train.step import make_trainer
from helpers.tiny_models import (
    CONFIG,
    NUM_LABELS,
    SETTINGS,
    WEIGHTS_SEED,
    Arrays,
    eagerly,
    gradients_of_losses,
    norm_of,
    random_batch,
    tiny_trainer,
    values_of,
)

SEQ_LEN = 7


def gradients_in(compute_type: tf.DType, policy: str = "none") -> Arrays:
    variables = create_variables(CONFIG, "squad", num_labels=NUM_LABELS, seed=WEIGHTS_SEED)
    batch = random_batch(6, SEQ_LEN)
    gradients = gradients_of_losses(variables, "squad", batch, policy, compute_type=compute_type)
    assert {gradient.dtype for gradient in gradients.values()} == {tf.float32}
    return {name: gradient.numpy() for name, gradient in gradients.items()}


def error(got: Arrays, expected: Arrays) -> float:
    return norm_of({n: got[n] - expected[n] for n in expected}) / norm_of(expected)


@pytest.mark.parametrize(
    # The unit roundoffs are 0.4 % and 0.05 %; two layers of it. Nothing at all would mean float32.
    ("compute_type", "low", "high"),
    [(tf.bfloat16, 1e-4, 0.03), (tf.float16, 1e-5, 0.005)],
)
def test_gradients_in_half_the_bytes_are_near(
    compute_type: tf.DType, low: float, high: float
) -> None:
    assert low < error(gradients_in(compute_type), gradients_in(tf.float32)) < high


@pytest.mark.parametrize("policy", ["full", "selective", "nested"])
@pytest.mark.parametrize("compute_type", [tf.bfloat16, tf.float16])
def test_checkpointing_in_half_the_bytes_to_the_last_bit(
    compute_type: tf.DType, policy: str
) -> None:
    expected = gradients_in(compute_type)
    for name, gradient in gradients_in(compute_type, policy).items():
        np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_and_moments_stay_float32(precision: str) -> None:
    trainer = tiny_trainer("squad", SEQ_LEN, precision=precision)
    with eagerly():
        assert np.isfinite(float(trainer.step(random_batch(4, SEQ_LEN)).loss))
    state = [*trainer.variables.values(), *trainer.state.variables]
    assert {variable.dtype for variable in state} == {tf.float32}


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_accumulation_in_bfloat16_differs_by_its_rounding_alone(policy: str) -> None:
    batches = [random_batch(6, SEQ_LEN, seed=seed) for seed in range(4)]

    def train(**settings: object) -> Arrays:
        trainer = tiny_trainer("squad", SEQ_LEN, **settings)  # type: ignore[arg-type]
        before = values_of(trainer)
        with eagerly():
            for batch in batches:
                trainer.step(batch)
        return {name: value - before[name] for name, value in values_of(trainer).items()}

    whole = train(precision="bf16")
    cut = error(train(precision="bf16", accumulation_steps=3, policy=policy), whole)
    # Another seed's masks change the update by as much as the update.
    assert cut < 0.05
    assert error(train(precision="bf16", seed=1), whole) > 0.2


def test_kernels_are_not_kept_in_bfloat16() -> None:
    x = tf.cast(tf.random.stateless_normal([5, 4], [0, 1]), tf.bfloat16)
    kernel, bias = tf.ones([4, 3]) * 1.001, tf.ones([3])
    with tf.GradientTape() as tape:
        tape.watch([x, kernel, bias])
        y = dense(x, kernel, bias)
    assert y.dtype == tf.bfloat16
    dx, d_kernel, d_bias = tape.gradient(y, [x, kernel, bias])
    assert (dx.dtype, d_kernel.dtype, d_bias.dtype) == (tf.bfloat16, tf.float32, tf.float32)
    np.testing.assert_array_equal(d_bias, [5, 5, 5])
    np.testing.assert_allclose(d_kernel[:, 0], tf.reduce_sum(tf.cast(x, tf.float32), 0), rtol=0.01)


@pytest.mark.parametrize("type_", [tf.bfloat16, tf.float16])
def test_sums_of_many_are_float32_sums(type_: tf.DType) -> None:
    # In bfloat16, 256 + 1 is 256, in float16 2,048 + 1 is 2,048: a sum of ones would stop there.
    n, h = 3000, 8
    x = tf.cast(tf.random.stateless_normal([n, h], [0, 1]), type_)
    gamma, beta = tf.ones([h]), tf.zeros([h])
    with tf.GradientTape() as tape:
        tape.watch([gamma, beta])
        y = layer_norm(x, gamma, beta, 1e-12)
    _, d_beta = tape.gradient(y, [gamma, beta])
    np.testing.assert_array_equal(d_beta, [n] * h)
    # Attention: with equal scores every key gets the mean.
    scores, value = tf.zeros([1, 1, n, n], type_), tf.ones([1, 1, n, 1], type_)
    np.testing.assert_allclose(tf.cast(attention(scores, value), tf.float32), 1.0, rtol=0.01)


def test_tensor_float_32_is_used_only_where_asked_for() -> None:
    enabled = tf.config.experimental.tensor_float_32_execution_enabled
    try:
        for precision in ("tf32", "bf16", "tf32", "float32"):
            tiny_trainer("squad", SEQ_LEN, precision=precision)
            assert enabled() == (precision == "tf32")
    finally:
        allow_tensor_float_32("float32")


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="fp8"):
        compute_bytes("fp8")
    variables = create_variables(CONFIG, "squad")
    with pytest.raises(ValueError, match="fp8"):
        make_trainer(
            variables, ModelSpec(CONFIG, "squad", 7), SETTINGS, StepSettings(precision="fp8")
        )


def test_gpus_without_bfloat16_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"Tesla T4 does not support bf16: compute capability 7\.5"
    ):
        check_precision("Tesla T4", "bf16")
    check_precision("Tesla T4", "float32")
    check_precision("Tesla T4", "fp16")
    check_precision("NVIDIA A100-SXM4-40GB", "bf16")
    check_precision("AMD EPYC (2 cores)", "bf16")
