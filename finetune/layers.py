"""Arithmetic of BERT's sublayers, written for what it keeps in memory until the backward pass.

Weights come in as tensors, not variables: the functions are pure, so that
`finetune.checkpointing.recompute` may run them twice.

The gradients wait for the gradient that comes in before they compute anything. Much of each
depends on the forward pass alone: TensorFlow would compute it as soon as it can, in the forward
pass, and keep it, three times the activation's own size for a GELU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def dense(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """Multiply `x` `[n, inputs]` by `kernel` `[inputs, outputs]` and add `bias` `[outputs]`."""
    return tf.nn.bias_add(tf.matmul(x, kernel), bias)


@tf.custom_gradient
def add(
    x: tf.Tensor, y: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
    """Add tensors of one shape.

    The gradient of `+` asks for the shapes of both, so that a recomputed layer would compute its
    last matrix product again for nothing but its shape.
    """
    return x + y, lambda dy: (dy, dy)


def fresh_zeros(like: tf.Tensor | tf.Variable, examples: tf.Tensor) -> tf.Tensor:
    """Make zeros of the shape and type of `like` each time a graph is run.

    `tf.zeros_like` of a weight is folded into a constant, and a constant stays in memory for as
    long as its graph exists.

    Args:
        like: gives shape and type.
        examples: any int32 scalar that is not negative, and not known before the graph is run.
    """
    return tf.fill(like.shape, tf.cast(tf.minimum(examples, 0), like.dtype))


def layer_norm(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Normalise `x` `[n, h]` over its last axis, then scale and shift.

    Keeps `x` and two numbers a row for the gradient; the composition of TensorFlow's own ops
    keeps about three times as much.
    """

    @tf.custom_gradient
    def normalised(
        x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]]:
        mean = tf.reduce_mean(x, axis=-1, keepdims=True)  # [n, 1]
        variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axis=-1, keepdims=True)
        inverse = tf.math.rsqrt(variance + epsilon)  # [n, 1]

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            with tf.control_dependencies([dy]):
                x_hat = (x - mean) * inverse
                scaled = dy * gamma
                centred = scaled - tf.reduce_mean(scaled, axis=-1, keepdims=True)
                dx = inverse * (
                    centred - x_hat * tf.reduce_mean(scaled * x_hat, axis=-1, keepdims=True)
                )
                return dx, tf.reduce_sum(dy * x_hat, axis=0), tf.reduce_sum(dy, axis=0)

        return (x - mean) * (inverse * gamma) + beta, gradient

    return normalised(x, gamma, beta)


def attention(
    scores: tf.Tensor, value: tf.Tensor, mask: tf.Tensor | None = None, rate: float = 0.0
) -> tf.Tensor:
    """Softmax, dropout and the weighted sum of values.

    Keeps one float an element of `scores` for the gradient: the probability, with the sign of
    minus where dropout took it. TensorFlow's own ops keep the probabilities before and after
    dropout, and the mask.

    Args:
        scores: `[b, a, s, s]`, padding already masked.
        value: `[b, a, s, d]`.
        mask: bool `[b, a, s, s]`, False where dropped; None for no dropout.
        rate: of dropout.

    Returns:
        `[b, a, s, d]`.
    """
    scale = 1.0 / (1.0 - rate)

    @tf.custom_gradient
    def weighted(
        scores: tf.Tensor, value: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
        signed = tf.nn.softmax(scores)
        if mask is not None:
            signed = tf.where(mask, signed, -signed)

        def dropped() -> tf.Tensor:
            return signed if mask is None else tf.nn.relu(signed) * scale

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.control_dependencies([dy]):
                again = dropped()
                d_value = tf.matmul(again, dy, transpose_a=True)
                # With q for the dropped probabilities, p for those before, d for the gradient of
                # q: the gradient of the scores is q * d - p * sum(q * d).
                product = again * tf.matmul(dy, value, transpose_b=True)
                total = tf.reduce_sum(product, axis=-1, keepdims=True)
                return product - tf.abs(signed) * total, d_value

        return tf.matmul(dropped(), value), gradient

    return weighted(scores, value)


@tf.custom_gradient
def _gelu_tanh(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    def gradient(dy: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([dy]):
            square = tf.square(x)
            tanh = tf.tanh(_SQRT_2_OVER_PI * x * (1.0 + 0.044715 * square))
            slope = (1.0 - tf.square(tanh)) * (_SQRT_2_OVER_PI * (1.0 + 3 * 0.044715 * square))
            return dy * (0.5 * (1.0 + tanh) + 0.5 * x * slope)

    inner = _SQRT_2_OVER_PI * x * (1.0 + 0.044715 * tf.square(x))
    return 0.5 * x * (1.0 + tf.tanh(inner)), gradient


@tf.custom_gradient
def _gelu_erf(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    def cumulative() -> tf.Tensor:
        return 0.5 * (1.0 + tf.math.erf(x * math.sqrt(0.5)))

    def gradient(dy: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([dy]):
            density = tf.exp(-0.5 * tf.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))
            return dy * (cumulative() + x * density)

    return x * cumulative(), gradient


def activation(x: tf.Tensor, name: str) -> tf.Tensor:
    """Apply `gelu_tanh` (the original's `modeling.gelu`), `gelu_erf` or `relu`.

    Both GELUs keep only `x` and compute the rest again in the gradient.

    Raises:
        ValueError: unknown name.
    """
    if name == "gelu_tanh":
        return _gelu_tanh(x)
    if name == "gelu_erf":
        return _gelu_erf(x)
    if name == "relu":
        return tf.nn.relu(x)
    raise ValueError(f"unknown activation {name!r}")
