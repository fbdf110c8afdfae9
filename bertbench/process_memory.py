"""What the system says that this process holds: more than TensorFlow's allocator knows of."""

from __future__ import annotations

import os
import sys

import pynvml

from bertbench.devices import Device


def process_peak_bytes(device: Device) -> int | None:
    """Largest memory of a device that this process has held; None where the system does not tell.

    On a GPU what the driver counts for the process now: the allocator's reservation, which never
    shrinks, and the CUDA context with its libraries. On a CPU the largest resident set, with
    Python and TensorFlow's code.
    """
    if device.kind == "gpu":
        return _on_gpu(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _on_gpu(device: Device) -> int | None:
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
    # In a container the driver may use other process numbers than those seen here.
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return int(own[0]) if own and own[0] else None
