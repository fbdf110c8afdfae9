"""TensorFlow's allocator under a budget: the environment and the settings that limit it.

TensorFlow is imported only by `apply_budget`, which configures it.
"""

from __future__ import annotations

import os
from typing import Any

from bertbench.bytes import MIB_BYTES
from bertbench.devices import Budget
from finetune.errors import InputError

_FIRST_REGION_BYTES = 2 * MIB_BYTES
"""What the first operation makes TensorFlow's CPU allocator take from the system."""


def child_environment(budget: Budget) -> dict[str, str]:
    """Environment variables of a process that trains under a budget.

    They must be set before TensorFlow's first op. A GPU's limit has no variable; it is set by
    `apply_budget`, which every such process calls.
    """
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2"}
    if budget.device.kind == "tpu":
        return {**environment, "CUDA_VISIBLE_DEVICES": "-1"}
    if budget.device.kind == "cpu":
        return {
            **environment,
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPU_ALLOCATOR_USE_BFC": "true",
            "TF_CPU_BFC_MEM_LIMIT_IN_MB": str(budget.budget_bytes // MIB_BYTES),
        }
    return {
        **environment,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": budget.device.uuid or str(budget.device.index),
        # A user's setting of these would make trials incomparable without a trace in the ledger.
        "TF_FORCE_GPU_ALLOW_GROWTH": "false",
        "TF_GPU_ALLOCATOR": "",
    }


def apply_budget(budget: Budget) -> str:
    """Put TensorFlow under a budget, before its first op, and name the device to run on.

    The process must run with `child_environment(budget)`.

    Returns:
        TensorFlow's name of the device, `CPU:0` or `GPU:0`.

    Raises:
        InputError: TensorFlow sees no GPU.
        RuntimeError: the environment is not in force, or TensorFlow has run an op before.
    """
    wrong = [
        f"{name}={os.environ.get(name)!r} instead of {value!r}"
        for name, value in child_environment(budget).items()
        if name != "TF_CPP_MIN_LOG_LEVEL" and os.environ.get(name) != value
    ]
    if wrong:
        raise RuntimeError(f"the environment of the budget is not set: {', '.join(wrong)}")

    import tensorflow as tf

    if budget.device.kind == "cpu":
        if not _counts_small_tensors(tf):
            raise RuntimeError(
                "TensorFlow made its CPU allocator before the budget's environment was set"
            )
        _reserve(tf, budget.budget_bytes)
        return "CPU:0"
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        raise InputError(
            f"TensorFlow cannot use {budget.device.label} ({budget.device.name})",
            hint="install it with CUDA: pip install 'bertbench[gpu]'",
        )
    limit = tf.config.LogicalDeviceConfiguration(memory_limit=budget.budget_bytes // MIB_BYTES)
    tf.config.set_logical_device_configuration(gpus[0], [limit])
    return "GPU:0"


def allocator_regions(budget: Budget) -> tuple[int, ...]:
    """Bytes of each piece of memory that TensorFlow's allocator has under a budget."""
    if budget.device.kind == "cpu":
        return (_FIRST_REGION_BYTES, budget.budget_bytes - _FIRST_REGION_BYTES)
    return (budget.budget_bytes,)


def _counts_small_tensors(tf: Any) -> bool:
    # oneDNN's allocator, the usual one, has statistics too, but only of large tensors; the plain
    # one has none. Only the allocator with a limit counts every byte.
    with tf.device("CPU:0"):
        held = tf.ones([1024])
    try:
        current_bytes = tf.config.experimental.get_memory_info("CPU:0")["current"]
    except ValueError:
        return False
    del held
    return bool(current_bytes)


def _reserve(tf: Any, budget_bytes: int) -> None:
    """Have the CPU's allocator take its whole budget from the system in one piece.

    As a GPU's does. Left alone it takes ever larger pieces as it needs them, and what fits depends
    on where their borders happen to be: the same batch of BERT-Mini needed up to 12 % more in one
    process than in another. The system gives the pages only when they are used.
    """
    mebibytes = (budget_bytes - _FIRST_REGION_BYTES) // MIB_BYTES
    if mebibytes > 0:
        with tf.device("CPU:0"):
            tf.raw_ops.Empty(shape=[mebibytes, MIB_BYTES], dtype=tf.uint8, init=False)
        tf.config.experimental.reset_memory_stats("CPU:0")
