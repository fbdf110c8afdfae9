"""The device of a run: bound to this process and its budget; and what to say if memory runs out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from bertbench.core.errors import WorkError
from bertbench.hardware import tpu
from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.device import Budget, TpuSettings, check_free, make_budget
from bertbench.hardware.discover import tpu_device
from bertbench.memory.allocator.budget import child_environment
from bertbench.trials.outcome import classify_error, memory_ran_out, summarise_error


def tpu_budget(settings: TpuSettings, core_bytes: int | None) -> Budget:
    """The budget of each core of a TPU.

    Args:
        settings: where the TPU is.
        core_bytes: what the user says; None takes that of the smallest TPU, as a plan does: which
            one it is cannot be asked before connecting.
    """
    usable_bytes = find_accelerator("tpu-v2-8").usable_bytes
    return make_budget(tpu_device(settings, core_bytes or usable_bytes))


def shrink_to_free(budget: Budget) -> Budget:
    """The budget, or what is free now if others have taken some of it since the run began.

    Raises:
        InputError: too little memory is free.
    """
    device = budget.device
    if any(budget.budget_bytes > one.free_bytes for one in device.each):
        return make_budget(device)
    return budget


def open_device(budget: Budget) -> Any:
    """Bind this process to the device of a run, or to several that share its batch.

    Returns:
        A `tf.distribute.Strategy` if it has several replicas, else None.

    Raises:
        InputError: see `bind_budget` and `bertbench.hardware.tpu.connect`.
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


@contextlib.contextmanager
def memory_errors_explained(what: str) -> Iterator[None]:
    """Say in one line that memory ran out while something was done in the block.

    Args:
        what: was done, as in `weights were loaded`.

    Raises:
        WorkError: memory ran out; other errors pass unchanged.
    """
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        if not is_out_of_memory(error):
            raise
        raise WorkError(f"out of memory while {what} ({summarise(error)})") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of TensorFlow says that memory ran out, the device's or the host's."""
    return memory_ran_out(type(error).__name__, str(error))


def is_out_of_device_memory(error: Exception) -> bool:
    """Whether an error of TensorFlow says that the device's own allocator had no memory left."""
    return classify_error(type(error).__name__, str(error)) == "oom"


def summarise(error: Exception) -> str:
    """Write an error of TensorFlow, which may be pages long, in one line."""
    return summarise_error(type(error).__name__, str(error))
