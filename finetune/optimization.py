"""BERT's optimizer and learning-rate schedule (the original's `optimization.py`).

Adam without bias correction, epsilon 1e-6, with decoupled weight decay that is added to the
update; none on LayerNorm and biases. Gradients are clipped by their global norm first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from finetune.errors import InputError

_NO_DECAY = re.compile("LayerNorm|layer_norm|bias")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Hyperparameters of one fine-tuning.

    Attributes:
        learning_rate: peak of the schedule.
        num_train_steps: optimizer steps in all; the rate reaches 0 there.
        num_warmup_steps: steps of linear rise from 0.
        weight_decay: the rate of decay per unit of learning rate.
        beta_1: decay of the first moment.
        beta_2: decay of the second moment.
        epsilon: added to the root of the second moment.
        clip_norm: largest global norm of the gradient.
        bias_correction: divide the moments by 1 - beta^t as Adam's paper does; the original does
            not, which makes its first few hundred updates 2 to 5 times larger.
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

    def __post_init__(self) -> None:
        """Refuse what would divide by zero or run backwards."""
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
    """What the optimizer remembers.

    Attributes:
        step: optimizer steps done, int64 scalar.
        first_moments: one per trained variable, in the variables' order.
        second_moments: likewise.
    """

    step: tf.Variable
    first_moments: tuple[tf.Variable, ...]
    second_moments: tuple[tf.Variable, ...]


def create_state(trained: Sequence[tf.Variable]) -> OptimizerState:
    """Create moments of zeros for the trained variables, 8 bytes a parameter."""
    return OptimizerState(
        tf.Variable(0, dtype=tf.int64, trainable=False, name="global_step"),
        tuple(tf.Variable(tf.zeros_like(v), trainable=False) for v in trained),
        tuple(tf.Variable(tf.zeros_like(v), trainable=False) for v in trained),
    )


def decays(name: str) -> bool:
    """Whether weight decay applies to a variable; not to LayerNorm and biases."""
    return _NO_DECAY.search(name) is None


def learning_rate(settings: OptimizerSettings, step: tf.Tensor) -> tf.Tensor:
    """Learning rate of the step that follows `step` finished ones, float32.

    Linear warm-up, then linear decay to 0, counted from step 0 and not from the end of the
    warm-up, as in the original.
    """
    done = tf.cast(step, tf.float32)
    decayed = settings.learning_rate * (
        1.0 - tf.minimum(done, settings.num_train_steps) / settings.num_train_steps
    )
    if not settings.num_warmup_steps:
        return decayed
    rising = settings.learning_rate * done / settings.num_warmup_steps
    return tf.where(done < settings.num_warmup_steps, rising, decayed)


def apply_gradients(
    settings: OptimizerSettings,
    state: OptimizerState,
    trained: Sequence[tf.Variable],
    gradients: Sequence[tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Clip, decay, update all variables in place, and count the step.

    Every replica makes the same update of its own copy, so nothing but handles is used: what
    assigns through a variable would be synchronised once more between replicas.

    Variables are updated one after another, so that the temporaries of only one of them exist at
    a time; the largest, the word embeddings, come last, when most gradients are gone.

    The global norm is that of dense gradients: `tf.clip_by_global_norm` would take the un-merged
    rows of a sparse gradient, and so depend on how a batch was cut.

    Args:
        settings: hyperparameters.
        state: moments and step; changed.
        trained: variables; changed.
        gradients: dense, in the same order.

    Returns:
        The learning rate used, and the global norm before clipping; float32 scalars.
    """
    rate = learning_rate(settings, state.step)
    # Powers of 0 switch the correction off in TensorFlow's Adam.
    power_1 = power_2 = tf.zeros([])
    if settings.bias_correction:
        updates = tf.cast(state.step + 1, tf.float32)
        power_1, power_2 = settings.beta_1**updates, settings.beta_2**updates
    norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(gradient) for gradient in gradients]))
    # As tf.clip_by_global_norm: a norm that is not finite makes every gradient NaN.
    scale = settings.clip_norm / tf.maximum(norm, settings.clip_norm)
    scale = tf.where(tf.math.is_finite(norm), scale, float("nan"))
    before: list[Any] = [norm]
    parts = zip(trained, state.first_moments, state.second_moments, gradients, strict=True)
    for variable, first, second, gradient in reversed(list(parts)):
        if decays(variable.name):
            # From the value before the update, as the original has it: the decay and Adam's term
            # do not depend on each other, so they may be taken off in turn.
            with tf.control_dependencies(before):
                decay = variable * (rate * settings.weight_decay)
                before = [tf.raw_ops.AssignSubVariableOp(resource=variable.handle, value=decay)]
        with tf.control_dependencies(before):
            update = tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=first.handle,
                v=second.handle,
                beta1_power=power_1,
                beta2_power=power_2,
                lr=rate,
                beta1=settings.beta_1,
                beta2=settings.beta_2,
                epsilon=settings.epsilon,
                grad=gradient * scale,
            )
            before = [update]
    with tf.control_dependencies(before):
        one = tf.ones([], tf.int64)
        tf.raw_ops.AssignAddVariableOp(resource=state.step.handle, value=one)
    return rate, norm
