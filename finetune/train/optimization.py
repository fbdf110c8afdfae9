"""BERT's optimizer and learning-rate schedule (the original's `optimization.py`), and others.

The original has Adam without bias correction, with epsilon 1e-6. Its weight decay is decoupled: it
is added to the update, except for LayerNorm and biases. Gradients are clipped by their global norm
first. The optimizers that need less memory, see `finetune.spec.optimizers`, have the same schedule,
decay and clipping.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from finetune.errors import InputError
from finetune.model.layers import fresh_zeros
from finetune.spec.optimizers import EXACT_OPTIMIZER, OPTIMIZERS, PLACEMENTS, slot_shapes
from finetune.train.loss_scaling import LossScale, adjust, create_loss_scale

_HOST = "/device:CPU:0"

_NO_DECAY = re.compile("LayerNorm|layer_norm|bias")

# The published constants: Lion's two decays. For Adafactor the exponent of a step's share in the
# averages, the least squared gradient, and the largest root mean square of an update.
_LION_BETAS = (0.9, 0.99)
_ADAFACTOR_EXPONENT, _ADAFACTOR_FLOOR, _ADAFACTOR_CLIP = -0.8, 1e-30, 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Hyperparameters of one fine-tuning.

    Attributes:
        learning_rate: peak of the schedule.
        num_train_steps: all optimizer steps of the training; after them the rate is 0.
        num_warmup_steps: number of first steps in which the rate rises linearly from 0.
        weight_decay: rate of decay, multiplied by the learning rate.
        beta_1: decay of the first moment.
        beta_2: decay of the second moment.
        epsilon: added to the root of the second moment.
        clip_norm: largest global norm of the gradient.
        bias_correction: divide the moments by 1 - beta^t, as in Adam's paper (Kingma and Ba 2015,
            algorithm 1). The original does not, so its first few hundred updates are 2 to 5 times
            larger.
        optimizer: one of `finetune.spec.optimizers.OPTIMIZERS`. Betas, epsilon and bias_correction
            are for AdamW; the other optimizers have the constants of their papers.
    """

    learning_rate: float
    num_train_steps: int
    num_warmup_steps: int = 0
    weight_decay: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-6
    clip_norm: float = 1.0
    bias_correction: bool = False
    optimizer: str = EXACT_OPTIMIZER

    def __post_init__(self) -> None:
        """Refuse settings that no training can have."""
        if self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"unknown optimizer {self.optimizer!r}", hint=f"use one of {', '.join(OPTIMIZERS)}"
            )
        if self.bias_correction and self.optimizer != "adamw":
            raise InputError(f"{self.optimizer} has no bias correction", hint="use adamw")
        if self.num_train_steps < 1:
            raise InputError(
                f"{self.num_train_steps} training steps",
                hint="use more examples, more epochs or a smaller batch",
            )
        if not 0 <= self.num_warmup_steps <= self.num_train_steps:
            raise InputError(
                f"{self.num_warmup_steps} warm-up steps of {self.num_train_steps} steps in all",
                hint="use a warm-up proportion between 0 and 1",
            )
        if not self.learning_rate >= 0:
            raise InputError(f"learning rate {self.learning_rate} is not positive")


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer.

    Attributes:
        step: number of finished optimizer steps, int64 scalar.
        slots: for each trained variable, in the variables' order, its state by name, see
            `finetune.spec.optimizers.slot_shapes`.
        loss_scale: what the loss is multiplied by; None if it is not.
        change: a variable on the host without a fixed shape, in which the host computes the change
            of one trained variable after the other; None if the slots are on the device.
    """

    step: tf.Variable
    slots: tuple[Mapping[str, tf.Variable], ...]
    loss_scale: LossScale | None = None
    change: tf.Variable | None = None

    @property
    def variables(self) -> list[tf.Variable]:
        """All slots, variable by variable."""
        return [variable for slots in self.slots for variable in slots.values()]


def create_state(
    trained: Sequence[tf.Variable],
    optimizer: str = EXACT_OPTIMIZER,
    *,
    scales_loss: bool = False,
    placement: str = PLACEMENTS[0],
    value: Callable[[Sequence[int]], tf.Tensor] = tf.zeros,
) -> OptimizerState:
    """Create the state of an optimizer, with slots of zeros.

    Args:
        trained: the trained variables.
        optimizer: one of `finetune.spec.optimizers.OPTIMIZERS`.
        scales_loss: create a loss scale too.
        placement: where the slots are, one of `finetune.spec.optimizers.PLACEMENTS`.
        value: makes a slot's value of its shape, as `finetune.model.layers.unfilled` does for a
            step that is lowered and not run.

    Raises:
        ValueError: optimizer or placement is unknown.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}")
    on_host = placement == "host"
    with tf.device(_HOST) if on_host else contextlib.nullcontext():
        slots = tuple(
            {
                name: tf.Variable(value(shape), trainable=False)
                for name, shape in slot_shapes(optimizer, v.shape.as_list()).items()
            }
            for v in trained
        )
        change = tf.Variable(0.0, shape=tf.TensorShape(None), trainable=False) if on_host else None
    return OptimizerState(
        tf.Variable(0, dtype=tf.int64, trainable=False, name="global_step"),
        slots,
        create_loss_scale() if scales_loss else None,
        change,
    )


def decays(name: str) -> bool:
    """Return whether weight decay applies to a variable: not to LayerNorm and biases."""
    return _NO_DECAY.search(name) is None


def learning_rate(settings: OptimizerSettings, step: tf.Tensor) -> tf.Tensor:
    """Return the learning rate of the step that follows `step` finished steps, float32.

    The rate rises linearly during the warm-up and then falls linearly to 0. As in the original,
    the fall is counted from step 0, not from the end of the warm-up.
    """
    # The steps that are left are counted in integers. Near the end 1 - done / all would be the
    # difference of two float32 numbers that are nearly equal.
    left = settings.num_train_steps - tf.minimum(step, settings.num_train_steps)
    decayed = settings.learning_rate * (tf.cast(left, tf.float32) / settings.num_train_steps)
    if not settings.num_warmup_steps:
        return decayed
    rising = settings.learning_rate * (tf.cast(step, tf.float32) / settings.num_warmup_steps)
    return tf.where(step < settings.num_warmup_steps, rising, decayed)


def apply_gradients(
    settings: OptimizerSettings,
    state: OptimizerState,
    trained: Sequence[tf.Variable],
    gradients: Sequence[tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Clip the gradients, count the step, decay and update all variables in place.

    Every replica makes the same update to its own copy. So only handles are used: an assignment
    through a variable would synchronise the replicas once more.

    The variables are updated one after the other, so that only the temporaries of one of them exist
    at a time. The largest, the word embeddings, are last, when most gradients are freed. The step
    is counted before the first update: as long as it is not counted, weights and slots are as they
    were, whatever goes wrong.

    The global norm is that of dense gradients. `tf.clip_by_global_norm` would use the rows of a
    sparse gradient before equal rows are added up, and so depend on how the batch was cut.

    With a loss scale the gradients are those of the scaled loss. If they are not finite, nothing is
    updated or counted, and the scale becomes smaller.

    Args:
        settings: hyperparameters.
        state: slots, step and loss scale; changed.
        trained: the trained variables; changed.
        gradients: dense gradients, in the order of the variables.

    Returns:
        The learning rate of the update, and the global norm before clipping; float32 scalars.
    """
    rate = learning_rate(settings, state.step)
    norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(gradient) for gradient in gradients]))
    if state.loss_scale is None:
        _update_all(settings, state, trained, gradients, rate, norm, 1.0)
        return rate, norm
    loss_scale = state.loss_scale.scale.read_value()
    norm /= loss_scale
    finite = tf.math.is_finite(norm)

    def update() -> tf.Tensor:
        _update_all(settings, state, trained, gradients, rate, norm, loss_scale)
        return finite

    updated = tf.cond(finite, update, lambda: finite)
    adjust(state.loss_scale, updated)
    return rate, norm


def _update_all(
    settings: OptimizerSettings,
    state: OptimizerState,
    trained: Sequence[tf.Variable],
    gradients: Sequence[tf.Tensor],
    rate: tf.Tensor,
    norm: tf.Tensor,
    loss_scale: tf.Tensor | float,
) -> None:
    # As with tf.clip_by_global_norm, a norm that is not finite makes every gradient NaN.
    scale = settings.clip_norm / tf.maximum(norm, settings.clip_norm)
    scale = tf.where(tf.math.is_finite(norm), scale, float("nan")) / loss_scale
    updates_done = tf.cast(state.step + 1, tf.float32)
    with tf.control_dependencies([norm, rate, updates_done]):
        one = tf.ones([], tf.int64)
        counted = tf.raw_ops.AssignAddVariableOp(resource=state.step.handle, value=one)
    before: list[Any] = [counted]
    for variable, slots, gradient in reversed(
        list(zip(trained, state.slots, gradients, strict=True))
    ):
        if decays(variable.name):
            # The original computes the decay from the value before the update. Neither the decay
            # nor the optimizer's term depends on the other, so they may be subtracted in turn.
            with tf.control_dependencies(before):
                decay = variable * (rate * settings.weight_decay)
                before = [_subtract(variable.handle, decay)]
        handles = {name: slot.handle for name, slot in slots.items()}
        optimize = functools.partial(
            _OPTIMIZERS[settings.optimizer], settings, handles, rate, updates_done
        )
        with tf.control_dependencies(before):
            clipped = gradient * scale
            if state.change is None:
                before = optimize(variable.handle, clipped)
            else:
                before = [_on_host(optimize, state.change.handle, variable, clipped)]


_Handles = Mapping[str, tf.Tensor]


def _on_host(
    optimize: Callable[[tf.Tensor, tf.Tensor], list[tf.Operation]],
    change: tf.Tensor,
    variable: tf.Variable,
    gradient: tf.Tensor,
) -> tf.Operation:
    """Compute the change of one variable on the host, where its slots are; add it on the device.

    The host updates a variable of zeros. 0 - x is -x to the last bit, so the sum is the same as
    after an update in place.
    """
    with tf.device(_HOST):
        cleared = tf.raw_ops.AssignVariableOp(resource=change, value=fresh_zeros(variable))
        with tf.control_dependencies([cleared]):
            made = optimize(change, gradient)
        with tf.control_dependencies(made):
            value = tf.raw_ops.ReadVariableOp(resource=change, dtype=gradient.dtype)
    return tf.raw_ops.AssignAddVariableOp(
        resource=variable.handle, value=tf.ensure_shape(value, variable.shape)
    )


def _adam(
    settings: OptimizerSettings,
    handles: _Handles,
    rate: tf.Tensor,
    updates_done: tf.Tensor,
    variable: tf.Tensor,
    gradient: tf.Tensor,
) -> list[tf.Operation]:
    """Update one variable in place, without temporaries."""
    epsilon: tf.Tensor | float = settings.epsilon
    if settings.bias_correction:
        # m / c1 / (sqrt(v / c2) + epsilon) is sqrt(c2) / c1 * m / (sqrt(v) + sqrt(c2) * epsilon).
        root = tf.sqrt(_one_minus_power(settings.beta_2, updates_done))
        rate *= root / _one_minus_power(settings.beta_1, updates_done)
        epsilon *= root
    applied = tf.raw_ops.ResourceApplyAdam(
        var=variable,
        m=handles["adam_m"],
        v=handles["adam_v"],
        # Powers of 0 switch off the bias correction of TensorFlow's Adam, which unlike the paper's
        # does not correct epsilon.
        beta1_power=tf.zeros([]),
        beta2_power=tf.zeros([]),
        lr=rate,
        beta1=settings.beta_1,
        beta2=settings.beta_2,
        epsilon=epsilon,
        grad=gradient,
    )
    return [applied]


def _one_minus_power(base: float, exponent: tf.Tensor) -> tf.Tensor:
    """Return 1 - base^exponent in float32 without cancellation; the base is rounded to float32."""
    if base == 0:
        return tf.ones([])
    return -tf.math.expm1(exponent * math.log(float(np.float32(base))))


def _lion(
    _: OptimizerSettings,
    handles: _Handles,
    rate: tf.Tensor,
    __: tf.Tensor,
    variable: tf.Tensor,
    gradient: tf.Tensor,
) -> list[tf.Operation]:
    """Update one variable (Chen et al. 2023, algorithm 2)."""
    of_update, of_moment = _LION_BETAS
    moment = tf.raw_ops.ReadVariableOp(resource=handles["lion_m"], dtype=gradient.dtype)
    # Two averages of moment and gradient, both computed from their difference.
    gap = moment - gradient
    update = _subtract(variable, rate * tf.sign(gradient + of_update * gap))
    with tf.control_dependencies([update]):
        return [_subtract(handles["lion_m"], (1.0 - of_moment) * gap)]


def _adafactor(
    _: OptimizerSettings,
    handles: _Handles,
    rate: tf.Tensor,
    updates_done: tf.Tensor,
    variable: tf.Tensor,
    gradient: tf.Tensor,
) -> list[tf.Operation]:
    """Update one variable (Shazeer and Stern 2018, algorithms 4 and 5)."""
    share = updates_done**_ADAFACTOR_EXPONENT
    square = tf.square(gradient) + _ADAFACTOR_FLOOR

    def average(slot: str, value: tf.Tensor) -> tf.Tensor:
        old = tf.raw_ops.ReadVariableOp(resource=handles[slot], dtype=value.dtype)
        # Not old * (1 - share) + value * share: in float32 few digits of a small share are left in
        # 1 - share. The update is in place, as a slot that moves with every step would fragment
        # the memory.
        added = tf.raw_ops.AssignAddVariableOp(resource=handles[slot], value=share * (value - old))
        with tf.control_dependencies([added]):
            return tf.raw_ops.ReadVariableOp(resource=handles[slot], dtype=value.dtype)

    if "adafactor_v" in handles:
        update = gradient * tf.math.rsqrt(average("adafactor_v", square))
    else:
        rows = average("adafactor_row", tf.reduce_mean(square, axis=-1))
        columns = average("adafactor_column", tf.reduce_mean(square, axis=-2))
        rows /= tf.reduce_mean(rows, axis=-1, keepdims=True)
        update = gradient * tf.math.rsqrt(rows)[..., None] * tf.math.rsqrt(columns)[..., None, :]
    size = tf.sqrt(tf.reduce_mean(tf.square(update)))
    change = update * (rate / tf.maximum(1.0, size / _ADAFACTOR_CLIP))
    return [_subtract(variable, change)]


_OPTIMIZERS = {"adamw": _adam, "lion": _lion, "adafactor": _adafactor}


def _subtract(handle: tf.Tensor, value: tf.Tensor) -> tf.Operation:
    return tf.raw_ops.AssignSubVariableOp(resource=handle, value=value)
