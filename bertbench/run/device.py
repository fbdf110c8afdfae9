"""The device of a run: this process is bound to it, and to its budget."""

from __future__ import annotations

import os
from typing import Any

from bertbench.devices import tpu
from bertbench.devices.device import Budget, check_free
from bertbench.memory.allocator.limit import child_environment


def open_device(budget: Budget) -> Any:
    """Bind this process to the device of a run, or to several that share its batch.

    Returns:
        A `tf.distribute.Strategy` if it has several replicas, else None.

    Raises:
        InputError: see `bind_budget` and `bertbench.devices.tpu.connect`.
        bertbench.core.errors.WorkError: the TPU cannot be reached.
    """
    if budget.device.tpu is not None:
        return tpu.connect(budget.device.tpu)
    bind_budget(budget)
    if budget.device.replicas == 1:
        return None
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([f"GPU:{n}" for n in range(budget.device.replicas)])


def bind_budget(budget: Budget) -> str:
    """Put this process under a budget; TensorFlow must not have been imported.

    Returns:
        TensorFlow's name of the device.

    Raises:
        InputError: the device has less than the budget free, or cannot be used.
    """
    check_free(budget)
    os.environ.update(child_environment(budget))
    from bertbench.memory.allocator.tensorflow_setup import start_tensorflow

    return start_tensorflow(budget)
