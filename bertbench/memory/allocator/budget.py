"""TensorFlow's allocator under a budget: the environment variables and settings that do it.

TensorFlow is imported only by `apply_budget`, which configures it.
"""

from __future__ import annotations

import os
from typing import Any

from bertbench.core.errors import WorkError
from bertbench.core.units import MIB_BYTES, format_bytes
from bertbench.hardware.device import Budget
from bertbench.memory.allocator.bfc import Memory
from bertbench.memory.allocator.xla_flags import without_rematerialization
from finetune.errors import InputError

_FIRST_REGION_BYTES = 2 * MIB_BYTES
"""What the first operation makes TensorFlow's CPU allocator take from the system."""

# Small pieces are set aside in pairs, one held and one free. Of a step's small tensors up to 36 a
# variable are live at once (`selective` in chunks of examples, two micro-batches): 1,300 with
# BERT-Tiny, 14,000 with BERT-Large. A model that needs more pairs than a budget gives is too large
# for this budget anyway. More than `_MAX_PAIRS` would take longer than it gains.
_MIN_PAIRS, _BYTES_A_PAIR, _MAX_PAIRS = 2048, 320 * 1024, 16384
_MIN_BYTES_A_PAIR = 32 * 1024

_held: list[Any] = []
"""Small pieces that are held as long as the process lives."""


def child_environment(budget: Budget) -> dict[str, str]:
    """Environment variables of a process that trains under a budget.

    They must be set before TensorFlow's first op. A GPU's budget has no variable; it is set by
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
        "CUDA_VISIBLE_DEVICES": ",".join(one.uuid or str(one.index) for one in budget.device.each),
        # A user's setting of these would make trials incomparable without a trace in the ledger.
        "TF_FORCE_GPU_ALLOW_GROWTH": "false",
        "TF_GPU_ALLOCATOR": "",
        "XLA_FLAGS": without_rematerialization(os.environ.get("XLA_FLAGS", "")),
    }


def apply_budget(budget: Budget) -> str:
    """Put TensorFlow under a budget, before its first op, and name the device to run on.

    The process must run with `child_environment(budget)`. Of several GPUs each is put under it.

    Returns:
        TensorFlow's name of the device, `CPU:0` or `GPU:0`, which is the first of several.

    Raises:
        InputError: TensorFlow does not see the GPU, or not all of them.
        RuntimeError: the environment is not in force, or TensorFlow has run an op before.
        WorkError: the system does not give the CPU's allocator its whole budget.
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
        _set_small_pieces_aside(tf, "CPU:0", empty_memory(budget).small_pieces)
        return "CPU:0"
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) < budget.device.replicas:
        raise InputError(
            f"TensorFlow cannot use {budget.device.label} ({budget.device.name})",
            hint="install it with CUDA: pip install 'bertbench[gpu]'",
        )
    limit = tf.config.LogicalDeviceConfiguration(memory_limit=budget.budget_bytes // MIB_BYTES)
    for gpu in gpus:
        tf.config.set_logical_device_configuration(gpu, [limit])
    for index in range(budget.device.replicas):
        _set_small_pieces_aside(tf, f"GPU:{index}", empty_memory(budget).small_pieces)
    return "GPU:0"


def empty_memory(budget: Budget) -> Memory:
    """What TensorFlow's allocator has after `apply_budget`."""
    return memory_of(budget.device.kind, budget.budget_bytes)


def memory_of(device_kind: str, budget_bytes: int) -> Memory:
    """What the allocator has under a budget, also of a device that is not attached.

    Args:
        device_kind: `cpu` or `gpu`.
        budget_bytes: what the allocator may use.
    """
    pairs = min(_MIN_PAIRS + budget_bytes // _BYTES_A_PAIR, _MAX_PAIRS)
    pieces = 2 * min(pairs, budget_bytes // _MIN_BYTES_A_PAIR) + 1
    if device_kind == "cpu":
        first_bytes = min(_FIRST_REGION_BYTES, budget_bytes)
        return Memory((first_bytes, budget_bytes - first_bytes), pieces)
    return Memory((budget_bytes,), pieces)


def _counts_small_tensors(tf: Any) -> bool:
    # TensorFlow's usual CPU allocator, oneDNN's, counts large tensors only; the plain one counts
    # nothing. Only the allocator with a budget counts every byte.
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

    A GPU's allocator does the same. Otherwise the CPU's allocator takes larger and larger regions
    when it needs them, and what fits depends on where these end: the same batch of BERT-Mini needed
    up to 12 % more in one process than in another. The system gives the pages only when they are
    used. A step that runs out of memory later has then used up the budget, not the system's memory.

    Raises:
        WorkError: the system does not give so much memory.
    """
    mebibytes = (budget_bytes - _FIRST_REGION_BYTES) // MIB_BYTES
    if mebibytes <= 0:
        return
    try:
        with tf.device("CPU:0"):
            tf.raw_ops.Empty(shape=[mebibytes, MIB_BYTES], dtype=tf.uint8, init=False)
    except tf.errors.ResourceExhaustedError as error:
        raise WorkError(
            f"the system does not give a process {format_bytes(budget_bytes)}: raise the limit of "
            "its address space (`ulimit -v`) or of what the system promises, or give a smaller "
            "--memory"
        ) from error


def _set_small_pieces_aside(tf: Any, device: str, count: int) -> None:
    """Set small pieces aside for small tensors, so that these never split large free memory.

    When a scalar is freed depends on threads. A scalar in the middle of free memory splits it: the
    same batch, with nine tenths of the memory in use, fitted in one process and not in another. The
    allocator takes the smallest free piece that is large enough. So scalars go into the small free
    pieces that are made here, each between two that are held for good.
    """
    with tf.device("CPU:0"):
        shape = tf.constant([1])
    on_cpu = device == "CPU:0"
    with tf.device(device):
        pieces = [
            tf.raw_ops.Empty(shape=shape, dtype=tf.float32, init=False)
            for _ in range(count - on_cpu)
        ]
    # On a CPU the shape itself took the first small piece.
    _held.extend([shape, *pieces][::2] if on_cpu else pieces[::2])
    del pieces
    tf.config.experimental.reset_memory_stats(device)
