"""Devices and budgets: what is attached, and how many of its bytes a training step may use.

This module does not import TensorFlow, except in `apply_budget`, which configures it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pynvml

from bertbench.bytes import MIB_BYTES, format_bytes
from bertbench.hostmemory import host_memory
from finetune.errors import InputError

GPU_CONTEXT_RESERVE_BYTES = 600 * MIB_BYTES
"""Left free on a GPU by default: the CUDA context and the handles and workspaces of cuBLAS and
cuDNN live outside TensorFlow's allocator (300 to 600 MiB, by card and CUDA version)."""

CPU_SHARE = 0.75
"""Part of the available host memory that a default budget takes: Python, TensorFlow's code and
the input pipeline live outside the allocator, and the machine must not begin to swap."""

_DESKTOP_SHARE, _DESKTOP_BYTES = 0.1, 1024 * MIB_BYTES

_FIRST_REGION_BYTES = 2 * MIB_BYTES
"""What the first operation makes TensorFlow's CPU allocator take from the system."""


@dataclasses.dataclass(frozen=True)
class Device:
    """Something that a training step can run on.

    Attributes:
        kind: `cpu`, `gpu` or `tpu`.
        index: number among devices of its kind; for GPUs NVML's, which is PCI bus order.
        name: product name; for a CPU with the number of usable cores.
        uuid: NVML's identifier of a GPU.
        total_bytes: memory of the device; for a CPU what its control groups allow.
        free_bytes: memory that nobody holds.
        held_by: (process id, process name, bytes) of every process with memory on a GPU.
        driver: version of a GPU's driver.
    """

    kind: str
    index: int
    name: str
    uuid: str | None
    total_bytes: int
    free_bytes: int
    held_by: tuple[tuple[int, str, int], ...] = ()
    driver: str | None = None

    @property
    def label(self) -> str:
        """Name on the command line: `cpu`, `gpu:0`."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    def key(self) -> str:
        """Canonical text for the ledger: equal for devices that need the same memory."""
        return json.dumps(
            {"kind": self.kind, "name": self.name, "driver": self.driver}, sort_keys=True
        )

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return dataclasses.asdict(self)


def device_from_json(values: dict[str, Any]) -> Device:
    """Read what `Device.to_json` wrote."""
    held_by = tuple((int(pid), str(name), int(size)) for pid, name, size in values["held_by"])
    return Device(**{**values, "held_by": held_by})


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of a device that TensorFlow's allocator may use.

    Attributes:
        device: where.
        budget_bytes: whole MiB, because TensorFlow's limits are; `make_budget` rounds down.
    """

    device: Device
    budget_bytes: int

    def __post_init__(self) -> None:
        """Refuse what the device cannot hold."""
        if self.budget_bytes < MIB_BYTES:
            raise InputError(f"a budget of {self.budget_bytes} bytes is below 1 MiB")
        if self.budget_bytes > self.device.total_bytes:
            raise InputError(
                f"a budget of {format_bytes(self.budget_bytes)} is more than the "
                f"{format_bytes(self.device.total_bytes)} of {self.device.label} "
                f"({self.device.name})",
                hint="give a smaller --memory",
            )

    def key(self) -> str:
        """Canonical text for the ledger: equal where the same trial has the same outcome."""
        values = {
            "kind": self.device.kind,
            "name": self.device.name,
            "driver": self.device.driver,
            "budget_bytes": self.budget_bytes,
        }
        return json.dumps(values, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {"device": self.device.to_json(), "budget_bytes": self.budget_bytes}


def budget_from_json(values: dict[str, Any]) -> Budget:
    """Read what `Budget.to_json` wrote."""
    return Budget(device_from_json(values["device"]), int(values["budget_bytes"]))


def list_devices() -> list[Device]:
    """GPUs in NVML's order, then the CPU; a machine without GPU or driver has only the CPU.

    GPUs that `CUDA_VISIBLE_DEVICES` hides are left out: a batch scheduler has given them to
    somebody else.
    """
    return [*visible_gpus(_nvml_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")), _cpu()]


def visible_gpus(gpus: Sequence[Device], visible: str | None) -> list[Device]:
    """Choose the GPUs that a value of `CUDA_VISIBLE_DEVICES` names, in its order.

    Numbers are taken as PCI bus order (`CUDA_DEVICE_ORDER=PCI_BUS_ID`); CUDA's own default
    differs from it only on machines with cards of different speed.

    Args:
        gpus: all GPUs.
        visible: numbers or beginnings of UUIDs, with commas; None means all. As in CUDA, the
            first entry that names no GPU ends the list.
    """
    if visible is None:
        return list(gpus)
    chosen: list[Device] = []
    for entry in (part.strip() for part in visible.split(",")):
        found = [gpu for gpu in gpus if _names(entry, gpu)]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def resolve_device(text: str, devices: Iterable[Device] | None = None) -> Device:
    """Find the device that a `--device` value names.

    Args:
        text: `auto` (the GPU with the most free memory, else the CPU), `gpu`, `gpu:N`,
            `gpu:UUID` (its beginning is enough), `cpu` or `tpu`.
        devices: what there is to choose from; None asks the machine.

    Raises:
        InputError: no such device, or not a device name.
    """
    devices = list_devices() if devices is None else list(devices)
    gpus = sorted((d for d in devices if d.kind == "gpu"), key=lambda d: (-d.free_bytes, d.index))
    kind, _, which = text.strip().partition(":")
    kind = kind.lower()
    if kind == "tpu":
        raise InputError("tpu is not supported by this version", hint="use --device gpu:N or cpu")
    if kind == "cpu" or (kind == "auto" and not gpus and not which):
        return next(device for device in devices if device.kind == "cpu")
    if kind == "auto" and not which:
        return gpus[0]
    if kind != "gpu":
        raise InputError(f"unknown device {text!r}", hint="use auto, gpu:N, gpu:UUID or cpu")
    if not gpus:
        raise InputError(
            f"no GPU is attached, so {text!r} is not a device here",
            hint="see `bertbench devices`, or use --device cpu",
        )
    found = [gpu for gpu in gpus if not which or _names(which, gpu)]
    if not found:
        there = ", ".join(gpu.label for gpu in sorted(gpus, key=lambda gpu: gpu.index))
        raise InputError(f"there is no {text!r}", hint=f"attached: {there}")
    return found[0]


def default_budget_bytes(device: Device) -> int:
    """Bytes that a training step may use when the user does not say, in whole MiB.

    A GPU's free memory less `GPU_CONTEXT_RESERVE_BYTES`, or `CPU_SHARE` of the available host
    memory.

    Raises:
        InputError: too little memory is free.
    """
    if device.kind == "cpu":
        budget_bytes = int(device.free_bytes * CPU_SHARE)
    else:
        budget_bytes = device.free_bytes - GPU_CONTEXT_RESERVE_BYTES
    budget_bytes = budget_bytes // MIB_BYTES * MIB_BYTES
    if budget_bytes < MIB_BYTES:
        raise InputError(f"{device.label} has too little free memory: {describe_use(device)}")
    return budget_bytes


def make_budget(device: Device, budget_bytes: int | None = None) -> Budget:
    """Budget of a device, rounded down to whole MiB; None means `default_budget_bytes`.

    Raises:
        InputError: more than the device has, or too little is free for a default.
    """
    if budget_bytes is None:
        return Budget(device, default_budget_bytes(device))
    return Budget(device, budget_bytes // MIB_BYTES * MIB_BYTES)


def check_free(budget: Budget) -> None:
    """Refuse a budget that cannot be had now, because others hold the device's memory.

    A trial in such a budget would meet the end of the device before the end of the budget, and
    a limit would be reported that belongs to somebody else's process.

    Raises:
        InputError: less than the budget is free.
    """
    if budget.budget_bytes > budget.device.free_bytes:
        raise InputError(
            f"a budget of {format_bytes(budget.budget_bytes)} is more than {budget.device.label} "
            f"has free: {describe_use(budget.device)}",
            hint="give a smaller --memory, or end what holds the memory",
        )


def check_alone(device: Device) -> None:
    """Refuse a GPU that others use: they may take or give back memory while it is measured.

    The little that a desktop holds is let pass.

    Raises:
        InputError: others hold more than that.
    """
    # Boards with one memory for CPU and GPU are never free of others.
    if device.kind != "gpu" or device.total_bytes == host_memory()[0]:
        return
    held_bytes = device.total_bytes - device.free_bytes
    if held_bytes > max(device.total_bytes * _DESKTOP_SHARE, _DESKTOP_BYTES):
        raise InputError(
            f"others use {device.label}: {describe_use(device)}",
            hint="end them, choose another --device, or probe what is free now with --share",
        )


def describe_use(device: Device) -> str:
    """Free and total memory and who holds the rest, as one line."""
    held = "".join(
        f"; process {pid} ({name}) holds {format_bytes(size)}" for pid, name, size in device.held_by
    )
    return f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free{held}"


def child_environment(budget: Budget) -> dict[str, str]:
    """Environment variables of a process that trains under a budget.

    They must be set before TensorFlow's first op. A GPU's limit has no variable; it is set by
    `apply_budget`, which every such process calls.
    """
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2"}
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


def _names(which: str, gpu: Device) -> bool:
    if which.isdigit():
        return int(which) == gpu.index
    prefix = which.upper().removeprefix("GPU-")
    return bool(prefix) and (gpu.uuid or "").upper().removeprefix("GPU-").startswith(prefix)


def _cpu() -> Device:
    total_bytes, free_bytes = host_memory()
    return Device("cpu", 0, _cpu_name(), None, total_bytes, free_bytes)


def _cpu_name() -> str:
    # Cores belong to the name: step times depend on them, and so do oneDNN's scratch buffers.
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model} ({cores} core{'' if cores == 1 else 's'})"


def _nvml_gpus() -> list[Device]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return [_nvml_gpu(index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _nvml_gpu(index: int, driver: str) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total_bytes, free_bytes = int(memory.total), int(memory.free)
    except pynvml.NVMLError_NotSupported:
        # Boards with one memory for CPU and GPU have no figure of their own.
        host = _cpu()
        total_bytes, free_bytes = host.total_bytes, host.free_bytes
    held: dict[int, int] = {}
    for processes in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            found = processes(handle)
        except pynvml.NVMLError:  # not permitted, or not on this platform
            continue
        for process in found:
            held[process.pid] = max(held.get(process.pid, 0), int(process.usedGpuMemory or 0))
    held_by = tuple((pid, _process_name(pid), size) for pid, size in sorted(held.items()))
    return Device("gpu", index, _text(name), _text(uuid), total_bytes, free_bytes, held_by, driver)


def _process_name(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:  # ended, of another user, or outside this container
        return "unknown"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
