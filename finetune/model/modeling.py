"""BERT's encoder and task heads (Devlin et al. 2019; the original's `modeling.py`).

A model is a dictionary of variables under the names of the original's checkpoints, and functions
over it. Nothing here holds state, so what a training step keeps in memory can be read off the
code: see `finetune.spec.checkpointing` for the account.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import tensorflow as tf

from finetune.model.chunks import Tensors
from finetune.model.dropout import DropoutKey, apply_mask, draw_mask, dropout
from finetune.model.layers import activation, add, attention, dense, layer_norm, split_heads
from finetune.model.recomputation import Keep, compute, recompute
from finetune.spec.checkpointing import NO_CHECKPOINTING, Checkpointing, examples_per_chunk
from finetune.spec.config import BertConfig, is_trained, variable_shapes

Variables = Mapping[str, tf.Variable]
"""Variables by their name in the original's checkpoints."""

_MASK_ADDER = -10000.0
_LAYER_WEIGHTS = (
    "attention/self/query/kernel",
    "attention/self/query/bias",
    "attention/self/key/kernel",
    "attention/self/key/bias",
    "attention/self/value/kernel",
    "attention/self/value/bias",
    "attention/output/dense/kernel",
    "attention/output/dense/bias",
    "attention/output/LayerNorm/gamma",
    "attention/output/LayerNorm/beta",
    "intermediate/dense/kernel",
    "intermediate/dense/bias",
    "output/dense/kernel",
    "output/dense/bias",
)
_NORM_WEIGHTS = ("LayerNorm/gamma", "LayerNorm/beta")
_EMBEDDING_SITE, _POOLED_SITE, _FIRST_LAYER_SITE = 0, 1, 2


def create_variables(
    config: BertConfig, head: str, *, num_labels: int = 2, seed: int = 0
) -> dict[str, tf.Variable]:
    """Create a model's variables, initialised as in the original.

    Kernels and embeddings are drawn from a normal distribution of standard deviation
    `initializer_range` cut at two standard deviations; LayerNorm scales are 1, the rest 0.
    Values depend on the seed and the position of the variable alone.

    Args:
        config: the encoder.
        head: one of `finetune.spec.config.HEADS`.
        num_labels: classes of the classifier.
        seed: any integer.

    Returns:
        Float32 variables by name; those that never get a gradient are not trainable.
    """
    shapes = variable_shapes(config, head, num_labels)
    # The largest first, and all before the first random number is drawn. TensorFlow's allocator
    # hands a hole of up to twice the size out whole: among the holes that the drawing leaves, the
    # word embeddings and their moments would waste a byte and a half a parameter for good.
    variables = {
        name: tf.Variable(tf.zeros(shapes[name]), trainable=is_trained(name, head), name=name)
        for name in sorted(shapes, key=lambda name: -math.prod(shapes[name]))
    }
    for position, (name, shape) in enumerate(shapes.items()):
        if name.endswith("gamma"):
            variables[name].assign_add(tf.ones(shape))
        elif not name.endswith(("bias", "beta")):
            # By the host: another device makes other floats of the same random integers.
            with tf.device("/device:CPU:0"):
                value = tf.random.stateless_truncated_normal(
                    shape, [seed, position], stddev=config.initializer_range
                )
            variables[name].assign_add(value)
            del value
    return {name: variables[name] for name in shapes}


_PROJECTIONS = {"query": "gradient_3", "key": "gradient_2", "value": "gradient_1"}
"""Attention's, and the names of their gradients, see `finetune.model.layers.dense`; in the order
of the backward pass."""


def encode(
    variables: Variables,
    config: BertConfig,
    input_ids: tf.Tensor,
    input_mask: tf.Tensor,
    segment_ids: tf.Tensor,
    *,
    dropout_key: DropoutKey | None = None,
    checkpointing: Checkpointing = NO_CHECKPOINTING,
    totals: Mapping[str, tf.Tensor] | None = None,
    compute_type: tf.DType = tf.float32,
    xla: bool = False,
) -> tf.Tensor:
    """Run embeddings and all layers.

    Args:
        variables: the model.
        config: its configuration.
        input_ids: int32 `[b, s]`.
        input_mask: int32 `[b, s]`, 1 for tokens, 0 for padding.
        segment_ids: int32 `[b, s]`.
        dropout_key: None for no dropout.
        checkpointing: policy per layer.
        totals: sums of gradients by the names of their variables. The gradient of a weight of a
            checkpointed layer, see `layer_weight_names`, begins with its sum instead of 0.
        compute_type: of activations, see `finetune.spec.precisions`.
        xla: make a graph that XLA can compile, whatever the policy.

    Returns:
        The last layer's output, float32 `[b, s, h]`.
    """
    batch, seq_len, hidden = tf.shape(input_ids)[0], input_ids.shape[1], config.hidden_size
    # Layers hand on the sum that a LayerNorm takes, not what it returns, so that a layer which
    # keeps its input alone, or recomputes its LayerNorms, keeps one of the two and not both.
    sums = _embed(variables, config, input_ids, segment_ids)  # [b * s, h]
    sums = tf.cast(sums, compute_type)
    adder = (1.0 - tf.cast(input_mask, compute_type)) * _MASK_ADDER
    adder = tf.reshape(adder, [batch, 1, 1, seq_len])
    for index in range(config.num_hidden_layers):
        names = layer_weight_names(index)
        weights = [tf.convert_to_tensor(variables[name]) for name in names]
        layer = functools.partial(_layer, config=config, dropout_key=dropout_key, index=index)
        policy = checkpointing.of_layer(index)
        if policy == "none":
            sums = layer(tf.zeros([], tf.int32), [sums], weights, [adder], compute)
        else:
            sums = recompute(
                layer,
                [sums],
                weights,
                [adder],
                examples=batch,
                examples_per_chunk=examples_per_chunk(policy, seq_len),
                kept_types=(
                    _kept_types(config, dropout_key, compute_type) if policy == "selective" else ()
                ),
                totals=None if totals is None else [totals[name] for name in names],
                xla=xla,
            )
    gamma, beta = (
        tf.convert_to_tensor(variables[name]) for name in _norm_names(config.num_hidden_layers)
    )
    output = layer_norm(sums, gamma, beta, config.layer_norm_eps, tf.float32)
    return tf.reshape(output, [batch, seq_len, hidden])


def _norm_names(index: int) -> list[str]:
    """Names of the LayerNorm that comes before a layer."""
    before = "embeddings" if index == 0 else f"encoder/layer_{index - 1}/output"
    return [f"bert/{before}/{name}" for name in _NORM_WEIGHTS]


def layer_weight_names(index: int) -> list[str]:
    """Names of a layer's weights, the LayerNorm before it first, its own last one not included."""
    return _norm_names(index) + [f"bert/encoder/layer_{index}/{name}" for name in _LAYER_WEIGHTS]


def _embed(
    variables: Variables, config: BertConfig, input_ids: tf.Tensor, segment_ids: tf.Tensor
) -> tf.Tensor:
    """Sum word, segment and position embeddings; `[b * s, h]`."""
    prefix = "bert/embeddings/"
    # From the value, not the variable: a gather from a variable makes TensorFlow copy the whole
    # table at every later read and update (EnsureSparseVariableAccess, copy_on_read_mode).
    words = tf.convert_to_tensor(variables[prefix + "word_embeddings"])
    segments = tf.convert_to_tensor(variables[prefix + "token_type_embeddings"])
    x = tf.gather(words, input_ids)  # [b, s, h]
    x += tf.gather(segments, segment_ids)
    x += variables[prefix + "position_embeddings"][: input_ids.shape[1]]
    return tf.reshape(x, [-1, config.hidden_size])


def _kept_types(
    config: BertConfig, dropout_key: DropoutKey | None, compute_type: tf.DType
) -> list[tf.DType]:
    """Types of what `_layer` asks to keep, in its order."""
    masks = dropout_key is not None and config.hidden_dropout_prob > 0
    return [
        *[compute_type] * 3,  # query, key, value
        compute_type,  # attention output
        *[tf.bool] * masks,
        compute_type,  # intermediate
        *[tf.bool] * masks,
    ]


def _layer(
    first: tf.Tensor,
    inputs: Tensors,
    weights: Tensors,
    constants: Tensors,
    keep: Keep,
    *,
    config: BertConfig,
    dropout_key: DropoutKey | None,
    index: int,
) -> tf.Tensor:
    """Run one encoder layer; a `finetune.model.recomputation.Region`.

    Args:
        first: index of the first example within the micro-batch.
        inputs: the sum that enters the LayerNorm before this layer, `[b * s, h]`.
        weights: scale and shift of that LayerNorm, and `_LAYER_WEIGHTS`.
        constants: `[b, 1, 1, s]`, 0 for tokens and -10000 for padding.
        keep: asked to keep the products of activations and weights, except the last, which no
            gradient reads, and the dropout masks of the sublayers.
        config: the encoder's configuration.
        dropout_key: of the micro-batch; None for no dropout.
        index: of the layer, from 0. Its dropouts are sites; the first layer's input has one more.

    Returns:
        The sum that enters the layer's last LayerNorm, `[b * s, h]`.
    """
    (sums,), (adder,) = inputs, constants
    gamma, beta, *own = weights
    weight = dict(zip(_LAYER_WEIGHTS, own, strict=True))
    batch, seq_len = tf.shape(adder)[0], adder.shape[3]
    heads, head_size, hidden = config.num_attention_heads, config.head_size, config.hidden_size
    site = _FIRST_LAYER_SITE + 3 * index
    if dropout_key is not None:
        # Masks depend on no activation. Without this the masks of all layers would be drawn as
        # soon as the step begins, or those of a recomputation be found to equal the first ones,
        # and be kept.
        with tf.control_dependencies([sums]):
            first_row = dropout_key.first_row + tf.cast(first, tf.int64)
        dropout_key = dataclasses.replace(dropout_key, first_row=first_row)

    def linear(x: tf.Tensor, name: str) -> list[tf.Tensor]:
        return [x, weight[f"{name}/kernel"], weight[f"{name}/bias"]]

    def drop(x: tf.Tensor, site: int, keep: Keep = compute) -> tf.Tensor:
        rate = config.hidden_dropout_prob
        if dropout_key is None or rate == 0:
            return x
        # Masks are keyed by example, not by token.
        mask = keep(lambda: draw_mask(batch, [seq_len * hidden], rate, dropout_key, site))
        return apply_mask(x, tf.reshape(mask, [-1, hidden]), rate)

    def project(gradient_name: str, x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        return split_heads(dense(x, kernel, bias, gradient_name), batch, seq_len, heads)

    x = layer_norm(sums, gamma, beta, config.layer_norm_eps)
    if index == 0:
        x = drop(x, _EMBEDDING_SITE)
    query, key, value = (
        keep(functools.partial(project, gradient_name), *linear(x, f"attention/self/{name}"))
        for name, gradient_name in _PROJECTIONS.items()
    )
    # Scaling the query costs s * d multiplications a head, scaling the scores s * s.
    query *= 1.0 / math.sqrt(head_size)
    scores = tf.matmul(query, key, transpose_b=True)  # [b, a, s, s]
    scores += adder
    rate, mask = config.attention_probs_dropout_prob, None
    if dropout_key is not None and rate > 0:
        mask = draw_mask(batch, scores.shape[1:], rate, dropout_key, site)
    context = attention(scores, value, mask, rate)  # [b * s, h]
    attended = keep(dense, *linear(context, "attention/output/dense"))
    attended = add(drop(attended, site + 1, keep), x)
    attended = layer_norm(
        attended,
        weight["attention/output/LayerNorm/gamma"],
        weight["attention/output/LayerNorm/beta"],
        config.layer_norm_eps,
    )
    inner = keep(dense, *linear(attended, "intermediate/dense"))  # [b * s, f]
    output = dense(*linear(activation(inner, config.hidden_act), "output/dense"))
    return add(drop(output, site + 2, keep), attended)


def squad_logits(variables: Variables, sequence_output: tf.Tensor) -> tf.Tensor:
    """Score every token as start and as end of the answer (the original's `run_squad.py`).

    Args:
        variables: a model with the `squad` head.
        sequence_output: `[b, s, h]`.

    Returns:
        `[2, b, s]`: start scores, end scores.
    """
    batch, seq_len = tf.shape(sequence_output)[0], sequence_output.shape[1]
    flat = tf.reshape(sequence_output, [-1, sequence_output.shape[2]])
    logits = tf.nn.bias_add(
        tf.matmul(flat, variables["cls/squad/output_weights"], transpose_b=True),
        variables["cls/squad/output_bias"],
    )  # [b * s, 2]
    return tf.transpose(tf.reshape(logits, [batch, seq_len, 2]), [2, 0, 1])


def classifier_logits(
    variables: Variables,
    config: BertConfig,
    sequence_output: tf.Tensor,
    dropout_key: DropoutKey | None = None,
) -> tf.Tensor:
    """Score the classes from the pooled first token (the original's `run_classifier.py`).

    Args:
        variables: a model with the `classifier` head.
        config: its configuration.
        sequence_output: `[b, s, h]`.
        dropout_key: None for no dropout; the original drops 10 % of the pooled output,
            whatever the configuration says of the other rates. Here the configuration's
            `classifier_dropout` decides, or else `hidden_dropout_prob`, which is 0.1 in every
            published model.

    Returns:
        `[b, labels]`.
    """
    pooled = tf.tanh(
        dense(
            sequence_output[:, 0],
            tf.convert_to_tensor(variables["bert/pooler/dense/kernel"]),
            tf.convert_to_tensor(variables["bert/pooler/dense/bias"]),
        )
    )
    rate = config.classifier_dropout
    if rate is None:
        rate = config.hidden_dropout_prob
    pooled = dropout(pooled, rate, dropout_key, _POOLED_SITE)
    return tf.nn.bias_add(
        tf.matmul(pooled, variables["output_weights"], transpose_b=True),
        variables["output_bias"],
    )
