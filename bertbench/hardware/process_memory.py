"""Memory that this process holds by the system's count, which exceeds the allocator's."""

from __future__ import annotations

import sys

from bertbench.hardware import nvml
from bertbench.hardware.device import Device


def process_peak_bytes(device: Device) -> int | None:
    """Return the most memory of a device that this process has held.

    - GPU: what the driver counts for the process now: the memory that the allocator has reserved,
      which never shrinks, and the CUDA context with its libraries.
    - CPU: the largest resident set, which includes Python and TensorFlow's code.

    Returns:
        Bytes; None if the system does not report them.
    """
    if device.kind == "gpu":
        return nvml.process_bytes(device)
    if device.kind == "tpu":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
