"""Dropout as a pure function of (seed, optimizer step, example row, site).

Three promises of the package depend on this module:

- A recomputed layer draws the same masks as the first time.
- A micro-batch draws its rows of the masks that the whole effective batch would have drawn, so
  that accumulation equals one large batch, with dropout on.
- The masks are the same whether TensorFlow's kernels compute them, on any device, or a program
  compiled by XLA.

The first two follow from Philox, a counter-based generator (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"). Block c of its stream depends only on the key and on c, and holds
four 32-bit numbers. Each example row of n elements has ceil(n / 4) blocks of its own.

For the third, masks are made of Philox's integers. TensorFlow documents only for these that they
are the same everywhere (`tf.random.Generator`). A uniform float is made of an integer's low 23 bits
by TensorFlow's kernels, but of its high bits by XLA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from finetune.model.barriers import stored

_PHILOX = 1
_SITES = 1 << 16
_BITS = 23
"""Number of low bits that decide; TensorFlow's kernels make a float32 of as many."""


@dataclasses.dataclass(frozen=True)
class DropoutKey:
    """What a mask depends on, besides the site.

    Attributes:
        seed: seed of the run, a Python integer below 2**63.
        step: number of finished optimizer steps, int64 scalar.
        first_row: index within the effective batch of the first row, int64 scalar.
    """

    seed: int
    step: tf.Tensor
    first_row: tf.Tensor


def dropout(x: tf.Tensor, rate: float, key: DropoutKey | None, site: int) -> tf.Tensor:
    """Zero elements with probability `rate` and scale the others by 1 / (1 - rate).

    For the gradient it keeps the mask, one byte for each element; a scaled mask would be four.

    Args:
        x: `[rows, ...]`; the size of a row must be known when the graph is built.
        rate: dropout rate in [0, 1).
        key: what the mask depends on; None for no dropout.
        site: number of this dropout within the model, in [0, 65536). The masks of different sites
            are independent.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: the size of a row is unknown, or `site` is out of range.
    """
    if key is None or rate == 0:
        return x
    return apply_mask(x, draw_mask(tf.shape(x)[0], x.shape[1:], rate, key, site), rate)


def draw_mask(
    rows: tf.Tensor, row_shape: Sequence[int], rate: float, key: DropoutKey, site: int
) -> tf.Tensor:
    """Draw a mask that is False with probability `rate`.

    Args:
        rows: number of examples, int32 scalar.
        row_shape: shape of an example; all of it must be known when the graph is built.
        rate: dropout rate in [0, 1).
        key: what the mask depends on.
        site: number of this dropout within the model, see `dropout`.

    Returns:
        Bool `[rows, *row_shape]`.

    Raises:
        ValueError: the size of a row is unknown, or `site` is out of range.
    """
    if not 0 <= site < _SITES:
        raise ValueError(f"site {site} is outside 0 to {_SITES - 1}")
    row_elements = tf.TensorShape(row_shape).num_elements()
    if row_elements is None:
        raise ValueError(f"dropout needs the size of a row to be known, got shape {row_shape}")
    blocks = math.ceil(row_elements / 4)
    counter = tf.bitcast(tf.stack([key.first_row * blocks, key.step * _SITES + site]), tf.uint64)
    # Unsigned: GPUs have no kernels that compare int32 tensors, so the host would do it.
    numbers = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=tf.stack([rows, blocks * 4]),
        key=tf.constant([key.seed], tf.uint64),
        counter=counter,
        alg=_PHILOX,
        dtype=tf.uint32,
    )  # [rows, 4 * blocks]
    # In place: the result gets the memory of the numbers.
    numbers = tf.bitwise.bitwise_and(numbers, tf.constant((1 << _BITS) - 1, tf.uint32))
    mask = numbers >= tf.constant(_dropped_numbers(rate), tf.uint32)
    if row_elements != blocks * 4:
        mask = mask[:, :row_elements]
    return stored(tf.reshape(mask, [rows, *row_shape]))


def _dropped_numbers(rate: float) -> int:
    """Return how many of the 2**23 numbers n are dropped: those with n / 2**23 below the rate."""
    return math.ceil(float(np.float32(rate)) * (1 << _BITS))


def apply_mask(x: tf.Tensor, mask: tf.Tensor, rate: float) -> tf.Tensor:
    """Zero `x` where `mask` is False and scale the rest by 1 / (1 - rate).

    The gradient reads only the mask. The gradient of `tf.where` asks for the shape of `x`, so a
    recomputed layer would compute `x`, its last and largest matrix product, again only for that.
    """

    @tf.custom_gradient
    def masked(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def scaled(x: tf.Tensor) -> tf.Tensor:
            return tf.where(mask, x * (1.0 / (1.0 - rate)), tf.zeros([], x.dtype))

        return scaled(x), scaled

    return masked(x)
