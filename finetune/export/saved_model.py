"""SavedModels for serving: any batch, any sequence length, no need of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow as tf

from finetune.export.export_weights import StoredModel, file_errors, write_original_files
from finetune.model.layers import dense
from finetune.model.modeling import classifier_logits
from finetune.spec.config import INPUT_NAMES, BertConfig
from finetune.text.tokenization import Tokenizer


def export_saved_model(
    model: StoredModel, tokenizer: Tokenizer, folder: Path, labels: Sequence[str] | None = None
) -> None:
    """Write a SavedModel that `tf.saved_model.load` and TensorFlow Serving open by themselves.

    Its signature `serving_default` takes `input_ids`, `input_mask` and `segment_ids`, int32
    `[batch, sequence]` of any batch and any sequence length that the model has positions for. It
    returns float32:

    - for SQuAD: `start_logits` and `end_logits`, `[batch, sequence]`;
    - for a classifier: `logits` and `probabilities`, `[batch, labels]`;
    - for a regression: `logits`, `[batch, 1]`;
    - for an encoder alone: `sequence_output`, `[batch, sequence, hidden]`, and, with a pooler,
      `pooled_output`, `[batch, hidden]`.

    There is no dropout. The folder `assets.extra` holds configuration and tokenizer.

    Example:
        `tf.saved_model.load(folder).signatures["serving_default"](input_ids=…, input_mask=…,
        segment_ids=…)["logits"]`

    Args:
        model: the model.
        tokenizer: the tokenizer with which it was trained.
        folder: an empty folder.
        labels: the classifier's classes.

    Raises:
        InputError: the weights cannot be read, or the number of labels differs.
        OSError: the disk is full.
    """
    module = tf.Module()
    with tf.device("CPU:0"):
        weights = {name: tf.Variable(model.read(name), name=name) for name in model.shapes}
    module.weights = list(weights.values())
    signature = [tf.TensorSpec([None, None], tf.int32, name) for name in INPUT_NAMES]

    @tf.function(input_signature=signature, autograph=False)
    def serve(
        input_ids: tf.Tensor, input_mask: tf.Tensor, segment_ids: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        sequence = _encode(weights, model.config, input_ids, input_mask, segment_ids)
        return _outputs(weights, model, sequence)

    with file_errors(folder):
        tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})
    extra = folder / "assets.extra"
    extra.mkdir()
    write_original_files(model, tokenizer, extra, labels)


def _outputs(
    weights: Mapping[str, tf.Variable], model: StoredModel, sequence: tf.Tensor
) -> dict[str, tf.Tensor]:
    if model.head == "classifier":
        logits = classifier_logits(weights, model.config, sequence)
        if model.is_regression:
            return {"logits": logits}
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}
    if model.head == "squad":
        scores = dense(
            tf.reshape(sequence, [-1, model.config.hidden_size]),
            tf.transpose(weights["cls/squad/output_weights"]),
            weights["cls/squad/output_bias"],
        )
        shape = tf.concat([tf.shape(sequence)[:2], [2]], axis=0)
        start_logits, end_logits = tf.unstack(tf.reshape(scores, shape), axis=2)
        return {"start_logits": start_logits, "end_logits": end_logits}
    outputs = {"sequence_output": sequence}
    if model.has_pooler:
        kernel, bias = (weights[f"bert/pooler/dense/{part}"] for part in ("kernel", "bias"))
        outputs["pooled_output"] = tf.tanh(dense(sequence[:, 0], kernel, bias))
    return outputs


def _encode(
    weights: Mapping[str, tf.Variable],
    config: BertConfig,
    input_ids: tf.Tensor,
    input_mask: tf.Tensor,
    segment_ids: tf.Tensor,
) -> tf.Tensor:
    """Run the encoder on `[b, s]`, with both dimensions unknown; return `[b, s, h]`.

    `finetune.model.modeling.encode` is written for training. It needs the sequence length when the
    graph is built. It also has custom gradients, which a SavedModel cannot hold as they are, so
    that every load would log a warning.
    """
    batch, seq_len = tf.unstack(tf.shape(input_ids))
    heads, hidden = config.num_attention_heads, config.hidden_size

    def linear(x: tf.Tensor, name: str) -> tf.Tensor:
        return dense(x, weights[f"{name}/kernel"], weights[f"{name}/bias"])

    def norm(x: tf.Tensor, name: str) -> tf.Tensor:
        mean = tf.reduce_mean(x, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axis=-1, keepdims=True)
        scale = tf.math.rsqrt(variance + config.layer_norm_eps) * weights[f"{name}/gamma"]
        return (x - mean) * scale + weights[f"{name}/beta"]

    def split(x: tf.Tensor) -> tf.Tensor:  # [b, a, s, d]
        shape = [batch, seq_len, heads, config.head_size]
        return tf.transpose(tf.reshape(x, shape), [0, 2, 1, 3])

    def activate(x: tf.Tensor) -> tf.Tensor:
        if config.hidden_act == "relu":
            return tf.nn.relu(x)
        return tf.nn.gelu(x, approximate=config.hidden_act == "gelu_tanh")

    x = tf.gather(weights["bert/embeddings/word_embeddings"], input_ids)  # [b, s, h]
    x += tf.gather(weights["bert/embeddings/token_type_embeddings"], segment_ids)
    x += weights["bert/embeddings/position_embeddings"][:seq_len]
    x = norm(tf.reshape(x, [-1, hidden]), "bert/embeddings/LayerNorm")  # [b * s, h]
    adder = (1.0 - tf.cast(input_mask, tf.float32))[:, tf.newaxis, tf.newaxis] * -10000.0
    for layer in range(config.num_hidden_layers):
        prefix = f"bert/encoder/layer_{layer}/"
        query, key, value = (
            split(linear(x, f"{prefix}attention/self/{name}")) for name in ("query", "key", "value")
        )
        scores = tf.matmul(query * (1.0 / math.sqrt(config.head_size)), key, transpose_b=True)
        context = tf.matmul(tf.nn.softmax(scores + adder), value)  # [b, a, s, d]
        context = tf.reshape(tf.transpose(context, [0, 2, 1, 3]), [-1, hidden])
        attended = linear(context, f"{prefix}attention/output/dense")
        x = norm(attended + x, f"{prefix}attention/output/LayerNorm")
        inner = activate(linear(x, f"{prefix}intermediate/dense"))  # [b * s, f]
        x = norm(linear(inner, f"{prefix}output/dense") + x, f"{prefix}output/LayerNorm")
    return tf.reshape(x, [batch, seq_len, hidden])
