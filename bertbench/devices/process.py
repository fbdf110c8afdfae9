"""What the system says that this process holds: more than TensorFlow's allocator knows of."""

from __future__ import annotations

import sys

from bertbench.devices import nvml
from bertbench.devices.device import Device


def process_peak_bytes(device: Device) -> int | None:
    """Largest memory of a device that this process has held; None where the system does not tell.

    On a GPU what the driver counts for the process now: the allocator's reservation, which never
    shrinks, and the CUDA context with its libraries. On a CPU the largest resident set, with
    Python and TensorFlow's code.
    """
    if device.kind == "gpu":
        return nvml.process_bytes(device)
    if device.kind == "tpu":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
