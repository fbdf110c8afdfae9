"""GPUs as NVIDIA's driver reports them, and the memory that processes hold on them."""

from __future__ import annotations

import os

import psutil
import pynvml

from bertbench.hardware.device import Device
from bertbench.hardware.host import host_memory


def list_gpus() -> list[Device]:
    """List all GPUs in NVML's order; none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return [_nvml_gpu(index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def process_bytes(device: Device) -> int | None:
    """Return the bytes of a GPU that this process holds; None if they are not reported."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if device.uuid is None:
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index)
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    # In a container the driver may use other process ids than the container does.
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return int(own[0]) if own and own[0] else None


def _nvml_gpu(index: int, driver: str) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total_bytes, free_bytes = int(memory.total), int(memory.free)
    except pynvml.NVMLError_NotSupported:
        # Where CPU and GPU share one memory, the driver reports no memory of the GPU.
        total_bytes, free_bytes = host_memory()
    held: dict[int, int] = {}
    for processes in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            found = processes(handle)
        except pynvml.NVMLError:  # not permitted, or not supported on this platform
            continue
        for process in found:
            held[process.pid] = max(held.get(process.pid, 0), int(process.usedGpuMemory or 0))
    held_by = tuple((pid, _process_name(pid), size) for pid, size in sorted(held.items()))
    return Device(
        "gpu",
        index,
        _text(name),
        _text(uuid),
        total_bytes,
        free_bytes,
        held_by,
        driver,
        compute_capability=_compute_capability(handle),
    )


def _compute_capability(handle: object) -> float | None:
    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    return float(f"{major}.{minor}")


def _process_name(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:  # it has ended, is of another user, or is outside this container
        return "unknown"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
