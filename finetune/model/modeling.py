"""BERT's encoder and task heads (Devlin et al. 2019; the original's `modeling.py`).

A model is a dictionary of variables, under the names of the original's checkpoints, and functions
that take it. Nothing else holds state, so the code shows what a training step keeps in memory; see
the table in `finetune.spec.checkpointing`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import tensorflow as tf

from finetune.model.chunks import Chunking
from finetune.model.dropout import DropoutKey, dropout
from finetune.model.encoder_layer import (
    POOLED_SITE,
    EncoderLayer,
    layer_weight_names,
    norm_weight_names,
)
from finetune.model.layers import dense, layer_norm, unfilled
from finetune.model.recomputation import compute, recompute
from finetune.spec.checkpointing import NO_CHECKPOINTING, Checkpointing, examples_per_chunk
from finetune.spec.config import INPUT_NAMES, BertConfig, is_trained, variable_shapes

Variables = Mapping[str, tf.Variable]
"""Variables by their names in the original's checkpoints."""

_MASK_ADDER = -10000.0


def create_variables(
    config: BertConfig, head: str, *, num_labels: int = 2, seed: int = 0
) -> dict[str, tf.Variable]:
    """Create a model's variables, initialised as in the original.

    Kernels and embeddings are drawn from a normal distribution of standard deviation
    `initializer_range`, cut at two standard deviations. The scales of LayerNorms are 1, all other
    variables 0. A value depends only on the seed and on the position of its variable.

    Example:
        >>> variables = create_variables(preset("bert-tiny"), "squad")
        >>> variables["bert/embeddings/word_embeddings"].shape
        TensorShape([30522, 128])

    Args:
        config: the encoder.
        head: one of `finetune.spec.config.HEADS`.
        num_labels: number of classes of the classifier.
        seed: any integer.

    Returns:
        Float32 variables by name. Those that never get a gradient are not trainable.
    """
    shapes = variable_shapes(config, head, num_labels)
    variables = _allocate(config, head, num_labels, tf.zeros)
    for position, (name, shape) in enumerate(shapes.items()):
        if name.endswith("gamma"):
            variables[name].assign_add(tf.ones(shape))
        elif not name.endswith(("bias", "beta")):
            # On the host: other devices make other floats of the same random integers.
            with tf.device("/device:CPU:0"):
                value = tf.random.stateless_truncated_normal(
                    shape, [seed, position], stddev=config.initializer_range
                )
            variables[name].assign_add(value)
            del value
    return variables


def unfilled_variables(
    config: BertConfig, head: str, *, num_labels: int = 2
) -> dict[str, tf.Variable]:
    """Create a model's variables without writing their values.

    The system gives a page of memory to a process when it first writes to it, so these variables
    take addresses and no memory. They are for building and lowering a step that is not run.

    Args:
        config: the encoder.
        head: one of `finetune.spec.config.HEADS`.
        num_labels: number of classes of the classifier.
    """
    return _allocate(config, head, num_labels, unfilled)


def _allocate(
    config: BertConfig, head: str, num_labels: int, value: Callable[[list[int]], tf.Tensor]
) -> dict[str, tf.Variable]:
    # Allocate the largest first, and all of them before the first random number is drawn.
    # TensorFlow's allocator does not split a hole of up to twice the size that is asked for. In the
    # holes that drawing leaves, the word embeddings and their moments would waste a byte and a half
    # for each parameter, for as long as they live.
    shapes = variable_shapes(config, head, num_labels)
    variables = {
        name: tf.Variable(value(shapes[name]), trainable=is_trained(name, head), name=name)
        for name in sorted(shapes, key=lambda name: -math.prod(shapes[name]))
    }
    return {name: variables[name] for name in shapes}


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """How a forward pass is computed, and what it keeps for the backward pass.

    Attributes:
        dropout_key: what the dropout masks depend on; None for no dropout.
        checkpointing: policy of each layer.
        compute_type: type of the activations, see `finetune.spec.precisions`.
        xla: build a graph that XLA can compile, whatever the policy.
        gradient_sums: sums of gradients, by the names of their variables. The gradient of a weight
            of a checkpointed layer (see `layer_weight_names`) then begins with its sum instead of
            0, so that it is the new sum. None for the gradients alone.
    """

    dropout_key: DropoutKey | None = None
    checkpointing: Checkpointing = NO_CHECKPOINTING
    compute_type: tf.DType = tf.float32
    xla: bool = False
    gradient_sums: Mapping[str, tf.Tensor] | None = None


PLAIN_FORWARD = ForwardPass()
"""Without dropout and checkpointing, in float32."""


def encode(
    variables: Variables,
    config: BertConfig,
    batch: Mapping[str, tf.Tensor],
    forward: ForwardPass = PLAIN_FORWARD,
) -> tf.Tensor:
    """Run the embeddings and all layers.

    Example:
        >>> nested = ForwardPass(checkpointing=parse_checkpointing("nested"))
        >>> encode(variables, config, batch, nested).shape
        TensorShape([8, 384, 768])

    Args:
        variables: the model.
        config: its configuration.
        batch: int32 `[b, s]` under the names in `finetune.spec.config.INPUT_NAMES`: token ids;
            1 for tokens and 0 for padding; segment ids. The sequence length s must be known when
            the graph is built.
        forward: how to compute it.

    Returns:
        The last layer's output, float32 `[b, s, h]`.
    """
    input_ids, input_mask, segment_ids = (batch[name] for name in INPUT_NAMES)
    rows, seq_len = tf.shape(input_ids)[0], input_ids.shape[1]
    # Layers hand on the sum that a LayerNorm takes, not what it returns, so that a layer which
    # keeps its input alone, or recomputes its LayerNorms, keeps one of the two and not both.
    sums = _embed(variables, config, input_ids, segment_ids)  # [b * s, h]
    sums = tf.cast(sums, forward.compute_type)
    adder = (1.0 - tf.cast(input_mask, forward.compute_type)) * _MASK_ADDER
    adder = tf.reshape(adder, [rows, 1, 1, seq_len])
    for index in range(config.num_hidden_layers):
        layer = EncoderLayer(config, index, forward.dropout_key)
        sums = _run_layer(layer, variables, sums, adder, forward, rows)
    names = norm_weight_names(config.num_hidden_layers)
    gamma, beta = (tf.convert_to_tensor(variables[name]) for name in names)
    output = layer_norm(sums, gamma, beta, config.layer_norm_eps, tf.float32)
    return tf.reshape(output, [rows, seq_len, config.hidden_size])


def _run_layer(
    layer: EncoderLayer,
    variables: Variables,
    sums: tf.Tensor,
    adder: tf.Tensor,
    forward: ForwardPass,
    rows: tf.Tensor,
) -> tf.Tensor:
    """Run a layer under its checkpointing policy; see `EncoderLayer.__call__`."""
    names = layer_weight_names(layer.index)
    weights = [tf.convert_to_tensor(variables[name]) for name in names]
    policy = forward.checkpointing.of_layer(layer.index)
    if policy == "none":
        return layer(tf.zeros([], tf.int32), [sums], weights, [adder], compute)
    initial = forward.gradient_sums
    return recompute(
        layer,
        [sums],
        weights,
        [adder],
        Chunking(rows, examples_per_chunk(policy, adder.shape[3]), forward.xla),
        kept_types=layer.kept_types(forward.compute_type) if policy == "selective" else (),
        gradient_sums=None if initial is None else [initial[name] for name in names],
    )


def _embed(
    variables: Variables, config: BertConfig, input_ids: tf.Tensor, segment_ids: tf.Tensor
) -> tf.Tensor:
    """Return the sums of word, segment and position embeddings, `[b * s, h]`."""
    prefix = "bert/embeddings/"
    # Gather from the value, not from the variable. A gather from a variable makes TensorFlow copy
    # the whole table at every later read and update (EnsureSparseVariableAccess,
    # copy_on_read_mode).
    words = tf.convert_to_tensor(variables[prefix + "word_embeddings"])
    segments = tf.convert_to_tensor(variables[prefix + "token_type_embeddings"])
    x = tf.gather(words, input_ids)  # [b, s, h]
    x += tf.gather(segments, segment_ids)
    x += variables[prefix + "position_embeddings"][: input_ids.shape[1]]
    return tf.reshape(x, [-1, config.hidden_size])


def squad_logits(variables: Variables, sequence_output: tf.Tensor) -> tf.Tensor:
    """Score each token as start and as end of the answer (the original's `run_squad.py`).

    Args:
        variables: a model with the `squad` head.
        sequence_output: the encoder's output, `[b, s, h]`.

    Returns:
        Start scores and end scores, `[2, b, s]`.
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

    The original drops 10 % of the pooled output, whatever the other dropout rates are. Here the
    rate is the configuration's `classifier_dropout`, or else `hidden_dropout_prob`, which is 0.1 in
    every published model.

    Args:
        variables: a model with the `classifier` or `regressor` head.
        config: its configuration.
        sequence_output: the encoder's output, `[b, s, h]`.
        dropout_key: None for no dropout.

    Returns:
        `[b, labels]`; one label for a regressor.
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
    pooled = dropout(pooled, rate, dropout_key, POOLED_SITE)
    return tf.nn.bias_add(
        tf.matmul(pooled, variables["output_weights"], transpose_b=True),
        variables["output_bias"],
    )
