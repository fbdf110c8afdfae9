"""The devices of this machine, and their names on the command line."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from bertbench.hardware.device import TPU_CORE_BYTES, Device, TpuSettings, join_gpus
from bertbench.hardware.host import host_memory
from bertbench.hardware.nvml import list_gpus
from bertbench.hardware.tensorflow_support import has_kernels
from bertbench.hardware.threads import usable_cores
from finetune.errors import InputError


def list_devices() -> list[Device]:
    """List the GPUs in NVML's order, and then the CPU.

    Without a GPU or a driver there is only the CPU. GPUs that `CUDA_VISIBLE_DEVICES` hides are left
    out, because a batch scheduler has assigned them to another job.
    """
    return [*visible_gpus(list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")), _cpu()]


def visible_gpus(gpus: Sequence[Device], visible: str | None) -> list[Device]:
    """Return the GPUs that a value of `CUDA_VISIBLE_DEVICES` names, in its order.

    Numbers count in PCI bus order (`CUDA_DEVICE_ORDER=PCI_BUS_ID`). CUDA's own default differs from
    it only on machines with GPUs of different speed.

    Args:
        gpus: all GPUs.
        visible: numbers or beginnings of UUIDs, separated by commas; None means all. As in CUDA,
            the first entry that names no GPU ends the list.
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
        text: `auto` (the GPU with the most free memory that TensorFlow has kernels for, else the
            CPU), `gpu`, `gpu:N`, `gpu:UUID` (its beginning is enough), `cpu`, `tpu` or `tpu:NAME`.
        devices: the devices to choose from; None takes those of this machine.

    Raises:
        InputError: the text is not a device name, there is no such device, or TensorFlow has no
            kernels for it.
    """
    kind, _, which = text.strip().partition(":")
    kind = kind.lower()
    if kind == "tpu":
        return tpu_device(TpuSettings(which or None))
    devices = list_devices() if devices is None else list(devices)
    gpus = sorted((d for d in devices if d.kind == "gpu"), key=lambda d: (-d.free_bytes, d.index))
    if not which:
        # If there are none with kernels, `gpu` is refused below.
        gpus = [d for d in gpus if has_kernels(d)] or (gpus if kind == "gpu" else [])
    if kind == "cpu" or (kind == "auto" and not gpus and not which):
        return next(device for device in devices if device.kind == "cpu")
    if kind == "auto" and not which:
        return gpus[0]
    if kind != "gpu":
        raise InputError(f"unknown device {text!r}", hint="use auto, gpu:N, gpu:UUID, cpu or tpu")
    if not gpus:
        raise InputError(
            f"no GPU is attached, so {text!r} is not a device here",
            hint="see `bertbench devices`, or use --device cpu",
        )
    found = [gpu for gpu in gpus if not which or _names(which, gpu)]
    if not found:
        there = ", ".join(gpu.label for gpu in sorted(gpus, key=lambda gpu: gpu.index))
        raise InputError(f"there is no device {text!r}", hint=f"attached: {there}")
    if not has_kernels(found[0]):
        raise InputError(
            f"TensorFlow has no kernels for {found[0].label} ({found[0].name}): compute capability "
            f"{found[0].compute_capability}",
            hint="use another --device; see `bertbench devices`",
        )
    return found[0]


def resolve_devices(text: str, devices: Sequence[Device] | None = None) -> Device:
    """Find the device of a `--device` value that may name several GPUs, as in `gpu:0,gpu:1`.

    Args:
        text: names for `resolve_device`, separated by commas.
        devices: the devices to choose from; None takes those of this machine.

    Raises:
        InputError: there is no such device, or the devices cannot share a batch.
    """
    return join_gpus([resolve_device(name, devices) for name in text.split(",")])


def tpu_device(tpu: TpuSettings, core_bytes: int = TPU_CORE_BYTES) -> Device:
    """Return the device of a TPU's core; whether the TPU exists is not checked."""
    name = f"TPU {tpu.name or ''}".strip()
    return Device("tpu", 0, f"{name}, {tpu.cores} cores", None, core_bytes, core_bytes, tpu=tpu)


def _names(which: str, gpu: Device) -> bool:
    if which.isdecimal() and len(which) < 10:
        return int(which) == gpu.index
    prefix = which.upper().removeprefix("GPU-")
    return bool(prefix) and (gpu.uuid or "").upper().removeprefix("GPU-").startswith(prefix)


def _cpu() -> Device:
    total_bytes, free_bytes = host_memory()
    return Device("cpu", 0, _cpu_name(), None, total_bytes, free_bytes)


def _cpu_name() -> str:
    # The number of cores is part of the name: step times and oneDNN's buffers depend on it.
    cores = usable_cores()
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
