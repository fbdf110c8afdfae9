"""Arithmetic of BERT's sublayers, written so that little is kept until the backward pass.

Weights are passed as tensors, not as variables. So the functions are pure, and
`finetune.model.recomputation` may run them twice.

Each gradient waits for the incoming gradient before it computes anything. Many of its parts depend
on the forward pass alone. TensorFlow would compute them as soon as it can, in the forward pass, and
keep them: for a GELU three times the bytes of the activation itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tensorflow as tf

from finetune.model.barriers import after, stored

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715 * _SQRT_2_OVER_PI
_LOG_OF_DENSITY = -0.5 * math.log(2.0 * math.pi)


def dense(
    x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, gradient_name: str | None = None
) -> tf.Tensor:
    """Multiply `x` `[n, inputs]` by `kernel` `[inputs, outputs]` and add `bias` `[outputs]`.

    Kernel and bias are rounded to the type of `x`, and rounded again in the gradient, so that no
    copy of the weights in that type outlives the product.

    Args:
        x: `[n, inputs]`.
        kernel: `[inputs, outputs]`.
        bias: `[outputs]`.
        gradient_name: name of the operation that makes the gradient of `x`. TensorFlow sorts the
            terms of a sum by name, and makes the sum in the memory of the first term. If the names
            of two terms ended in `_99` and `_101`, their order, and so the memory of the sum, would
            differ from that of all other layers.
    """

    @tf.custom_gradient
    def product(
        x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]]:
        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            d_kernel = tf.cast(tf.matmul(x, dy, transpose_a=True), kernel.dtype)
            if x.dtype == bias.dtype:
                d_bias = tf.raw_ops.BiasAddGrad(out_backprop=dy)
            else:
                d_bias = tf.reduce_sum(tf.cast(dy, bias.dtype), axis=0)
            # First the gradients that nothing waits for. Otherwise TensorFlow would first run the
            # backward pass of all layers below, and `x` and `dy` would live until then.
            with tf.control_dependencies([d_kernel, d_bias]):
                wide = tf.cast(after([d_kernel, d_bias], kernel), x.dtype)
                d_x = tf.matmul(dy, wide, transpose_b=True, name=gradient_name)
            return d_x, d_kernel, d_bias

        y = tf.matmul(x, tf.cast(kernel, x.dtype))
        return tf.nn.bias_add(y, tf.cast(bias, x.dtype)), gradient

    return product(x, kernel, bias)


@tf.custom_gradient
def add(
    x: tf.Tensor, y: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
    """Add tensors of one shape.

    The gradient of `+` asks for the shapes of both. A recomputed layer would then compute its last
    matrix product again only for its shape.
    """
    return x + y, lambda dy: (dy, dy)


def fresh_zeros(like: tf.Tensor | tf.Variable) -> tf.Tensor:
    """Make zeros of the shape and type of `like` each time a graph is run, to be added to in place.

    TensorFlow folds `tf.zeros_like` of a weight into a constant, and a constant stays in memory for
    as long as its graph exists. It also merges two equal `tf.fill` into one tensor. It does neither
    to the operation used here, because that counts as one with a state.
    """
    return tf.raw_ops.Empty(shape=like.shape, dtype=like.dtype, init=True)


def unfilled(shape: Sequence[int]) -> tf.Tensor:
    """Make a float32 tensor of a shape whose values nobody has written, and that takes no memory.

    Its values are not to be read. On a CPU the system gives memory to the pages of a large tensor
    when they are first written to.
    """
    with tf.device("/device:CPU:0"):
        return tf.raw_ops.Empty(shape=list(shape), dtype=tf.float32, init=False)


def layer_norm(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    output_type: tf.DType | None = None,
) -> tf.Tensor:
    """Normalise `x` `[n, h]` over its last axis, then scale and shift.

    For the gradient it keeps `x` and two numbers for each row. The same formula written with
    TensorFlow's own operations keeps about three times as much. It computes in the type of `gamma`.

    Args:
        x: `[n, h]`.
        gamma: scale `[h]`.
        beta: shift `[h]`.
        epsilon: added to the variance.
        output_type: type of the result; by default that of `x`.
    """

    @tf.custom_gradient
    def normalised(
        x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]]:
        wide = tf.cast(x, gamma.dtype)
        mean = tf.reduce_mean(wide, axis=-1, keepdims=True)  # [n, 1]
        variance = tf.reduce_mean(tf.math.squared_difference(wide, mean), axis=-1, keepdims=True)
        inverse = tf.math.rsqrt(variance + epsilon)  # [n, 1]

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            with tf.control_dependencies([dy]):
                dy = tf.cast(dy, gamma.dtype)
                x_hat = (tf.cast(x, gamma.dtype) - mean) * inverse
                scaled = dy * gamma
                centred = scaled - tf.reduce_mean(scaled, axis=-1, keepdims=True)
                dx = inverse * (
                    centred - x_hat * tf.reduce_mean(scaled * x_hat, axis=-1, keepdims=True)
                )
                return (
                    tf.cast(dx, x.dtype),
                    tf.reduce_sum(dy * x_hat, axis=0),
                    tf.reduce_sum(dy, axis=0),
                )

        y = (wide - mean) * (inverse * gamma) + beta
        return tf.cast(y, output_type or x.dtype), gradient

    return normalised(x, gamma, beta)


def split_heads(x: tf.Tensor, batch: tf.Tensor, seq_len: int, heads: int) -> tf.Tensor:
    """Reshape `[b * s, h]` to `[b, a, s, d]`."""
    shape = [batch, seq_len, heads, x.shape[1] // heads]
    return tf.transpose(tf.reshape(x, shape), [0, 2, 1, 3])


def attention(
    scores: tf.Tensor, value: tf.Tensor, mask: tf.Tensor | None = None, rate: float = 0.0
) -> tf.Tensor:
    """Compute softmax, dropout and the weighted sum of values.

    For the gradient it keeps one number for each element of `scores`: the probability, with a minus
    sign where it was dropped. TensorFlow's own operations keep the probabilities before and after
    dropout, and the mask.

    Args:
        scores: `[b, a, s, s]`, padding already masked.
        value: `[b, a, s, d]`.
        mask: bool `[b, a, s, s]`, False where dropped; None for no dropout.
        rate: dropout rate.

    Returns:
        `[b * s, h]`.
    """
    scale = 1.0 / (1.0 - rate)
    batch, (heads, seq_len, head_size) = tf.shape(value)[0], value.shape[1:]

    @tf.custom_gradient
    def weighted(
        scores: tf.Tensor, value: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
        signed = tf.nn.softmax(scores)
        if mask is not None:
            signed = tf.where(mask, signed, -signed)
        signed = stored(signed)

        def dropped(signed: tf.Tensor) -> tf.Tensor:
            return signed if mask is None else tf.nn.relu(signed) * scale

        context = tf.reshape(
            tf.transpose(tf.matmul(dropped(signed), value), [0, 2, 1, 3]), [-1, heads * head_size]
        )

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.control_dependencies([dy]):
                dy = split_heads(dy, batch, seq_len, heads)
                probabilities = after([dy], signed)
                again = dropped(probabilities)
                d_value = tf.matmul(again, dy, transpose_a=True)
                # Let p be the probabilities before dropout, q those after it, and d the gradient
                # of q. The gradient of the scores is q * d - p * sum(q * d). The sum could be
                # computed from the result and its gradient without reading an [s, s], but then a
                # row with a single token would get rounding errors instead of a gradient of 0.
                product = again * tf.matmul(dy, value, transpose_b=True)
                total = _row_sums(product)
                return product - tf.abs(probabilities) * total, d_value

        return context, gradient

    return weighted(scores, value)


def _row_sums(x: tf.Tensor) -> tf.Tensor:
    """Sum over the last axis, which is kept with size 1.

    A matrix product adds up in float32 whatever its type is, and it needs no float32 copy of `x`.
    """
    if x.dtype == tf.float32:
        return tf.reduce_sum(x, axis=-1, keepdims=True)
    return tf.matmul(x, tf.ones([x.shape[-1], 1], x.dtype))


@tf.custom_gradient
def _gelu_tanh(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    # Each factor is made in place, one after the other, and TanhGrad multiplies by 1 - tanh^2
    # without making it first. So two arrays of the size of x live at a time beside `dy`, not four.
    def tanh_of_inner(x: tf.Tensor) -> tf.Tensor:
        return tf.tanh(x * (_SQRT_2_OVER_PI + _GELU_CUBIC * tf.square(x)))

    def gradient(dy: tf.Tensor) -> tf.Tensor:
        kept = after([dy], x)
        with tf.control_dependencies([dy]):
            tanh = tanh_of_inner(kept)
        with tf.control_dependencies([tanh]):
            # In float16 the cube is infinite beyond 107, and infinity times 1 - tanh^2 is NaN.
            bounded = tf.clip_by_value(kept, -20.0, 20.0) if x.dtype == tf.float16 else kept
            slope = bounded * (0.5 * _SQRT_2_OVER_PI + 1.5 * _GELU_CUBIC * tf.square(bounded))
            slope = tf.raw_ops.TanhGrad(y=tanh, dy=slope)
        with tf.control_dependencies([slope]):
            return dy * (slope + (0.5 + 0.5 * tanh))

    return x * (0.5 + 0.5 * tanh_of_inner(x)), gradient


@tf.custom_gradient
def _gelu_erf(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    # This has the same operations in the same order as the GELU by tanh. Even one name is the same:
    # TensorFlow sorts the factors of a product by name, and makes it in the memory of the first.
    # So a step allocates in the same order with both GELUs, and one step trace serves for both.
    def error_function(x: tf.Tensor) -> tf.Tensor:
        return tf.math.erf(x * math.sqrt(0.5))

    def gradient(dy: tf.Tensor) -> tf.Tensor:
        kept = after([dy], x)
        with tf.control_dependencies([dy]):
            error = error_function(kept)
        with tf.control_dependencies([error]):
            slope = kept * tf.exp(_LOG_OF_DENSITY - 0.5 * tf.square(kept), name="add")
        with tf.control_dependencies([slope]):
            return dy * (slope + (0.5 + 0.5 * error))

    return x * (0.5 + 0.5 * error_function(x)), gradient


def activation(x: tf.Tensor, name: str) -> tf.Tensor:
    """Apply `gelu_tanh` (the original's `modeling.gelu`), `gelu_erf` or `relu`.

    Both GELUs keep only `x`, and compute the rest again in the gradient.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "gelu_tanh":
        return _gelu_tanh(x)
    if name == "gelu_erf":
        return _gelu_erf(x)
    if name == "relu":
        return tf.nn.relu(x)
    raise ValueError(f"unknown activation {name!r}")
