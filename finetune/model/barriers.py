"""What XLA must not move or merge, so that a compiled step keeps what it is written to keep.

XLA drops control dependencies. It finds that the backward pass computes something again which the
forward pass has computed already, and keeps that instead. And it may keep what a mask was made of,
four times as large, instead of the mask. An optimization barrier is an operation that XLA knows
nothing about, so that it does neither.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

_for_xla = contextvars.ContextVar("for_xla", default=False)


@contextlib.contextmanager
def barriers(xla: bool) -> Iterator[None]:
    """Build the operations of the block, and their gradients, with barriers for XLA or without.

    Args:
        xla: whether XLA will compile them. TensorFlow has no kernel for a barrier.
    """
    token = _for_xla.set(xla)
    try:
        yield
    finally:
        _for_xla.reset(token)


def after(triggers: Sequence[tf.Tensor], x: tf.Tensor) -> tf.Tensor:
    """Return `x`, but for XLA not before `triggers` are known.

    Example:
        >>> with barriers(xla=True):
        ...     again = tf.tanh(after([dy], x))

    Args:
        triggers: tensors, at least one.
        x: a tensor.
    """
    if not _for_xla.get():
        return x
    return gen_xla_ops.xla_optimization_barrier([x, *triggers])[0]


def stored(x: tf.Tensor) -> tf.Tensor:
    """Return `x`; XLA then keeps `x` for the backward pass, and not what it was computed from."""
    return gen_xla_ops.xla_optimization_barrier([x])[0] if _for_xla.get() else x
