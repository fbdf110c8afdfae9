"""One encoder layer of BERT: attention and feed-forward sublayer (Devlin et al. 2019).

A layer is a region of `finetune.model.recomputation`: a pure function of tensors, so that its
backward pass may run it again.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import tensorflow as tf

from finetune.model.barriers import after
from finetune.model.chunks import Tensors
from finetune.model.dropout import DropoutKey, apply_mask, draw_mask
from finetune.model.layers import activation, add, attention, dense, layer_norm, split_heads
from finetune.model.recomputation import Keep, compute
from finetune.spec.config import BertConfig

EMBEDDING_SITE, POOLED_SITE = 0, 1
"""Dropout sites of the embeddings and of the pooled output, see `finetune.model.dropout`."""

_FIRST_LAYER_SITE, _SITES_PER_LAYER = 2, 3

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

_PROJECTIONS = {"query": "gradient_3", "key": "gradient_2", "value": "gradient_1"}
"""The projections of attention, and the names of their gradients in the order of the backward pass,
see `finetune.model.layers.dense`."""


def norm_weight_names(index: int) -> list[str]:
    """Names of the LayerNorm before a layer; with the number of layers, of the last LayerNorm."""
    before = "embeddings" if index == 0 else f"encoder/layer_{index - 1}/output"
    return [f"bert/{before}/{name}" for name in _NORM_WEIGHTS]


def layer_weight_names(index: int) -> list[str]:
    """Names of a layer's weights.

    They begin with the LayerNorm before the layer. The LayerNorm at its end is not among them: it
    belongs to the next layer.
    """
    return norm_weight_names(index) + [
        f"bert/encoder/layer_{index}/{name}" for name in _LAYER_WEIGHTS
    ]


@dataclasses.dataclass(frozen=True)
class EncoderLayer:
    """An encoder layer; a `finetune.model.recomputation.Region`.

    Attributes:
        config: the encoder's configuration.
        index: number of the layer, from 0.
        dropout_key: what the dropout masks of the micro-batch depend on; None for no dropout.
    """

    config: BertConfig
    index: int
    dropout_key: DropoutKey | None = None

    def __call__(
        self, first: tf.Tensor, inputs: Tensors, weights: Tensors, constants: Tensors, keep: Keep
    ) -> tf.Tensor:
        """Compute the rows of some examples.

        Args:
            first: index of the first example within the micro-batch, int32 scalar.
            inputs: the sum that enters the LayerNorm before this layer, `[b * s, h]`.
            weights: those that `layer_weight_names` names.
            constants: `[b, 1, 1, s]`, 0 for tokens and -10000 for padding.
            keep: asked to keep the products of activations and weights, except the last, which no
                gradient reads, and the dropout masks of the sublayers.

        Returns:
            The sum that enters the layer's last LayerNorm, `[b * s, h]`.
        """
        (sums,), (adder,) = inputs, constants
        gamma, beta, *own = weights
        rows, seq_len = tf.shape(adder)[0], adder.shape[3]
        call = _LayerCall(
            self.config,
            self._key_of_chunk(first, sums),
            dict(zip(_LAYER_WEIGHTS, own, strict=True)),
            keep,
            (rows, seq_len),
        )
        site = _FIRST_LAYER_SITE + _SITES_PER_LAYER * self.index
        x = layer_norm(sums, gamma, beta, self.config.layer_norm_eps)
        if self.index == 0:
            x = call.drop(x, EMBEDDING_SITE, compute)
        attended = call.attend(x, adder, site)
        attended = add(call.drop(attended, site + 1, keep), x)
        attended = call.norm(attended)
        output = call.feed_forward(attended)
        return add(call.drop(output, site + 2, keep), attended)

    def kept_types(self, compute_type: tf.DType) -> list[tf.DType]:
        """Types of what the layer asks to keep, in its order.

        Args:
            compute_type: type of the activations.
        """
        masks = self.dropout_key is not None and self.config.hidden_dropout_prob > 0
        return [
            *[compute_type] * 3,  # query, key, value
            compute_type,  # attention output
            *[tf.bool] * masks,
            compute_type,  # intermediate
            *[tf.bool] * masks,
        ]

    def _key_of_chunk(self, first: tf.Tensor, sums: tf.Tensor) -> DropoutKey | None:
        if self.dropout_key is None:
            return None
        # Masks depend on no activation. Without this the masks of all layers would be drawn as
        # soon as the step begins, or those of a recomputation be found to equal the first ones,
        # and be kept.
        with tf.control_dependencies([sums]):
            first_row = self.dropout_key.first_row + tf.cast(after([sums], first), tf.int64)
        return dataclasses.replace(self.dropout_key, first_row=first_row)


@dataclasses.dataclass(frozen=True)
class _LayerCall:
    """What the parts of a layer share while it computes some examples.

    Attributes:
        config: the encoder's configuration.
        dropout_key: of these examples; None for no dropout.
        weights: the layer's weights, by the end of their names.
        keep: see `EncoderLayer.__call__`.
        size: number of examples, int32 scalar, and tokens of each.
    """

    config: BertConfig
    dropout_key: DropoutKey | None
    weights: dict[str, tf.Tensor]
    keep: Keep
    size: tuple[tf.Tensor, int]

    def attend(self, x: tf.Tensor, adder: tf.Tensor, site: int) -> tf.Tensor:
        """Attention and its output projection, `[b * s, h]`; `site` is that of its dropout."""
        query, key, value = (
            self.keep(
                functools.partial(self._project, gradient_name),
                *self._linear(x, f"attention/self/{name}"),
            )
            for name, gradient_name in _PROJECTIONS.items()
        )
        # Scaling the query costs s * d multiplications a head, scaling the scores s * s.
        query *= 1.0 / math.sqrt(self.config.head_size)
        scores = tf.matmul(query, key, transpose_b=True)  # [b, a, s, s]
        scores += adder
        rate, mask = self.config.attention_probs_dropout_prob, None
        if self.dropout_key is not None and rate > 0:
            mask = draw_mask(self.size[0], scores.shape[1:], rate, self.dropout_key, site)
        context = attention(scores, value, mask, rate)  # [b * s, h]
        return self.keep(dense, *self._linear(context, "attention/output/dense"))

    def norm(self, x: tf.Tensor) -> tf.Tensor:
        """The LayerNorm between the sublayers."""
        gamma, beta = (self.weights[f"attention/output/{name}"] for name in _NORM_WEIGHTS)
        return layer_norm(x, gamma, beta, self.config.layer_norm_eps)

    def feed_forward(self, x: tf.Tensor) -> tf.Tensor:
        """The feed-forward sublayer, `[b * s, h]`."""
        inner = self.keep(dense, *self._linear(x, "intermediate/dense"))  # [b * s, f]
        return dense(*self._linear(activation(inner, self.config.hidden_act), "output/dense"))

    def drop(self, x: tf.Tensor, site: int, keep: Keep) -> tf.Tensor:
        """Dropout of hidden states `[b * s, h]`; `keep` is asked to keep the mask."""
        key, rate, (rows, seq_len) = self.dropout_key, self.config.hidden_dropout_prob, self.size
        if key is None or rate == 0:
            return x
        hidden = self.config.hidden_size
        # Masks are keyed by example, not by token.
        mask = keep(lambda: draw_mask(rows, [seq_len * hidden], rate, key, site))
        return apply_mask(x, tf.reshape(mask, [-1, hidden]), rate)

    def _project(
        self, gradient_name: str, x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
    ) -> tf.Tensor:
        rows, seq_len = self.size
        projected = dense(x, kernel, bias, gradient_name)
        return split_heads(projected, rows, seq_len, self.config.num_attention_heads)

    def _linear(self, x: tf.Tensor, name: str) -> list[tf.Tensor]:
        return [x, self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"]]
