"""Dynamic loss scaling, which keeps small gradients from vanishing in float16.

The method is that of Micikevicius et al. 2018, "Mixed precision training", section 3.2. The loss is
multiplied by a scale before the backward pass, and the gradients of the weights, which are float32,
are divided by it. If a gradient is not finite, nothing is updated and the scale is halved. After
many updates in a row it is doubled.

A step without an update is repeated with the smaller scale, on the same examples and with the same
dropout masks. So no example is left out, and the schedule counts only updates.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

INITIAL_SCALE = 2.0**15
MAX_SCALE = 2.0**24
UPDATES_BEFORE_GROWTH = 2000


@dataclasses.dataclass(frozen=True)
class LossScale:
    """The scale, and what it depends on.

    Attributes:
        scale: float32 scalar, a power of 2, at least 1.
        updates: number of updates since the scale last changed, int64 scalar.
    """

    scale: tf.Variable
    updates: tf.Variable


def create_loss_scale() -> LossScale:
    """Create the scale that a training begins with."""
    return LossScale(
        tf.Variable(INITIAL_SCALE, trainable=False, name="loss_scale"),
        tf.Variable(0, dtype=tf.int64, trainable=False, name="loss_scale_updates"),
    )


def adjust(loss_scale: LossScale, finite: tf.Tensor) -> None:
    """Adjust the scale after one attempt at a step.

    Args:
        loss_scale: the scale; changed.
        finite: whether the gradients of the attempt were finite, bool scalar.
    """
    scale, updates = loss_scale.scale.read_value(), loss_scale.updates.read_value() + 1
    grows = updates >= UPDATES_BEFORE_GROWTH
    larger = tf.where(grows, tf.minimum(2.0 * scale, MAX_SCALE), scale)
    # Assign by the handles, as to weights: every replica makes the same change to its own copy.
    for variable, value in (
        (loss_scale.scale, tf.where(finite, larger, tf.maximum(0.5 * scale, 1.0))),
        (loss_scale.updates, tf.where(finite & ~grows, updates, tf.zeros_like(updates))),
    ):
        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
