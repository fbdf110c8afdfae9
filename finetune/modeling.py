"""BERT's encoder and task heads (Devlin et al. 2019; the original's `modeling.py`).

A model is a dictionary of variables under the names of the original's checkpoints, and functions
over it. Nothing here holds state, so what a training step keeps in memory can be read off the
code: see `finetune.checkpointing` for the account.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import tensorflow as tf

from finetune.checkpointing import NO_CHECKPOINTING, Checkpointing, recompute
from finetune.config import BertConfig, is_trained, variable_shapes
from finetune.dropout import DropoutKey, dropout
from finetune.layers import activation, dense, layer_norm

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
    "output/LayerNorm/gamma",
    "output/LayerNorm/beta",
)
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
        head: one of `finetune.config.HEADS`.
        num_labels: classes of the classifier.
        seed: any integer.

    Returns:
        Float32 variables by name; those that never get a gradient are not trainable.
    """
    variables = {}
    for position, (name, shape) in enumerate(variable_shapes(config, head, num_labels).items()):
        if name.endswith(("bias", "beta")):
            value = tf.zeros(shape)
        elif name.endswith("gamma"):
            value = tf.ones(shape)
        else:
            value = tf.random.stateless_truncated_normal(
                shape, [seed, position], stddev=config.initializer_range
            )
        variables[name] = tf.Variable(value, trainable=is_trained(name, head), name=name)
        del value
    return variables


def encode(
    variables: Variables,
    config: BertConfig,
    input_ids: tf.Tensor,
    input_mask: tf.Tensor,
    segment_ids: tf.Tensor,
    *,
    dropout_key: DropoutKey | None = None,
    checkpointing: Checkpointing = NO_CHECKPOINTING,
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

    Returns:
        The last layer's output, float32 `[b, s, h]`.
    """
    batch, seq_len, hidden = tf.shape(input_ids)[0], input_ids.shape[1], config.hidden_size
    x = _embed(variables, config, input_ids, segment_ids, dropout_key)  # [b * s, h]
    adder = (1.0 - tf.cast(input_mask, tf.float32)) * _MASK_ADDER
    adder = tf.reshape(adder, [batch, 1, 1, seq_len])
    for index in range(config.num_hidden_layers):
        prefix = f"bert/encoder/layer_{index}/"
        weights = [tf.convert_to_tensor(variables[prefix + name]) for name in _LAYER_WEIGHTS]

        def layer(
            x: tf.Tensor,
            adder: tf.Tensor,
            *weights: tf.Tensor,
            site: int = _FIRST_LAYER_SITE + 3 * index,
        ) -> tf.Tensor:
            return transformer_layer(
                x, adder, dict(zip(_LAYER_WEIGHTS, weights, strict=True)), config, dropout_key, site
            )

        if checkpointing.of_layer(index) == "full":
            x = recompute(layer, x, adder, *weights)
        else:
            x = layer(x, adder, *weights)
    return tf.reshape(x, [batch, seq_len, hidden])


def _embed(
    variables: Variables,
    config: BertConfig,
    input_ids: tf.Tensor,
    segment_ids: tf.Tensor,
    dropout_key: DropoutKey | None,
) -> tf.Tensor:
    """Sum word, segment and position embeddings, normalise, drop; `[b * s, h]`."""
    batch, seq_len, hidden = tf.shape(input_ids)[0], input_ids.shape[1], config.hidden_size
    prefix = "bert/embeddings/"
    # From the value, not the variable: a gather from a variable makes TensorFlow copy the whole
    # table at every later read and update (EnsureSparseVariableAccess, copy_on_read_mode).
    words = tf.convert_to_tensor(variables[prefix + "word_embeddings"])
    segments = tf.convert_to_tensor(variables[prefix + "token_type_embeddings"])
    x = tf.gather(words, input_ids)  # [b, s, h]
    x += tf.gather(segments, segment_ids)
    x += variables[prefix + "position_embeddings"][:seq_len]
    x = layer_norm(
        tf.reshape(x, [-1, hidden]),
        tf.convert_to_tensor(variables[prefix + "LayerNorm/gamma"]),
        tf.convert_to_tensor(variables[prefix + "LayerNorm/beta"]),
        config.layer_norm_eps,
    )
    return _drop_rows(x, batch, seq_len, config.hidden_dropout_prob, dropout_key, _EMBEDDING_SITE)


def _drop_rows(
    x: tf.Tensor,
    batch: tf.Tensor,
    seq_len: int,
    rate: float,
    dropout_key: DropoutKey | None,
    site: int,
) -> tf.Tensor:
    """Drop elements of `x` `[b * s, h]` with masks that are keyed by example, not by token."""
    if dropout_key is None or rate == 0:
        return x
    hidden = x.shape[1]
    dropped = dropout(tf.reshape(x, [batch, seq_len * hidden]), rate, dropout_key, site)
    return tf.reshape(dropped, [-1, hidden])


def transformer_layer(
    x: tf.Tensor,
    adder: tf.Tensor,
    weights: Mapping[str, tf.Tensor],
    config: BertConfig,
    dropout_key: DropoutKey | None,
    site: int,
) -> tf.Tensor:
    """Run one encoder layer.

    Args:
        x: `[b * s, h]`.
        adder: `[b, 1, 1, s]`, 0 for tokens and -10000 for padding.
        weights: the layer's weights, by the end of their names.
        config: the encoder's configuration.
        dropout_key: None for no dropout.
        site: number of the layer's first dropout; it has three.

    Returns:
        `[b * s, h]`.
    """
    batch, seq_len = tf.shape(adder)[0], adder.shape[3]
    heads, head_size, hidden = config.num_attention_heads, config.head_size, config.hidden_size

    def project(name: str) -> tf.Tensor:  # [b, a, s, d]
        projected = dense(
            x, weights[f"attention/self/{name}/kernel"], weights[f"attention/self/{name}/bias"]
        )
        return tf.transpose(tf.reshape(projected, [batch, seq_len, heads, head_size]), [0, 2, 1, 3])

    # Scaling the query costs s * d multiplications a head, scaling the scores s * s.
    query = project("query") * (1.0 / math.sqrt(head_size))
    scores = tf.matmul(query, project("key"), transpose_b=True)  # [b, a, s, s]
    probabilities = tf.nn.softmax(scores + adder)
    probabilities = dropout(probabilities, config.attention_probs_dropout_prob, dropout_key, site)
    context = tf.matmul(probabilities, project("value"))  # [b, a, s, d]
    context = tf.reshape(tf.transpose(context, [0, 2, 1, 3]), [-1, hidden])

    def close(sublayer: tf.Tensor, residual: tf.Tensor, name: str, site: int) -> tf.Tensor:
        sublayer = _drop_rows(
            sublayer, batch, seq_len, config.hidden_dropout_prob, dropout_key, site
        )
        return layer_norm(
            sublayer + residual,
            weights[f"{name}/LayerNorm/gamma"],
            weights[f"{name}/LayerNorm/beta"],
            config.layer_norm_eps,
        )

    attended = dense(
        context,
        weights["attention/output/dense/kernel"],
        weights["attention/output/dense/bias"],
    )
    attended = close(attended, x, "attention/output", site + 1)
    inner = dense(
        attended, weights["intermediate/dense/kernel"], weights["intermediate/dense/bias"]
    )  # [b * s, f]
    output = dense(
        activation(inner, config.hidden_act),
        weights["output/dense/kernel"],
        weights["output/dense/bias"],
    )
    return close(output, attended, "output", site + 2)


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
            `hidden_dropout_prob` decides, which is 0.1 in every published model.

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
    pooled = dropout(pooled, config.hidden_dropout_prob, dropout_key, _POOLED_SITE)
    return tf.nn.bias_add(
        tf.matmul(pooled, variables["output_weights"], transpose_b=True),
        variables["output_bias"],
    )
