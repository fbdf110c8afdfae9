"""GPUs of the catalogue as XLA's compiler takes them, to compile for one that is not attached.

XLA's GPU compiler needs no GPU but a text of its properties (`GpuTargetConfigProto`, in text
format). The properties that follow from the compute capability are those of the tables "Feature
Support" and "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide
12.8. The others are in the catalogue.
"""

from __future__ import annotations

import dataclasses

from bertbench.core.units import KIB_BYTES
from bertbench.hardware.accelerators import Accelerator
from finetune.errors import InputError

RUNTIME_VERSION = (12, 8, 0)
"""CUDA's version that is compiled for: the oldest one that knows all GPUs of the catalogue."""

CUDNN_VERSION = (9, 7, 0)
"""cuDNN's version that is compiled for, of the same time."""

_WARP_THREADS = 32
_BLOCK_THREADS = 1024
_BLOCK_SHARED_BYTES = 48 * KIB_BYTES
_REGISTERS = 65536
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
"""The same for all compute capabilities from 5.0 on, as are those above."""


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What a streaming multiprocessor of some compute capability has.

    Attributes:
        float32_cores: operations of float32 that it begins in a clock.
        threads: threads that it holds at most.
        shared_kib: shared memory.
        block_shared_kib: shared memory that a block of threads may ask for; without asking for it,
            a block gets 48 KiB.
    """

    float32_cores: int
    threads: int
    shared_kib: int
    block_shared_kib: int


MULTIPROCESSORS = {
    6.0: Multiprocessor(64, 2048, 64, 48),
    6.1: Multiprocessor(128, 2048, 96, 48),
    7.0: Multiprocessor(64, 2048, 96, 96),
    7.5: Multiprocessor(64, 1024, 64, 64),
    8.0: Multiprocessor(64, 2048, 164, 163),
    8.6: Multiprocessor(128, 1536, 100, 99),
    8.9: Multiprocessor(128, 1536, 100, 99),
    9.0: Multiprocessor(128, 2048, 228, 227),
    10.0: Multiprocessor(128, 2048, 228, 227),
    12.0: Multiprocessor(128, 1536, 100, 99),
}
"""By compute capability."""


def gpu_target(accelerator: Accelerator) -> str:
    """Describe a GPU to XLA's compiler.

    Its memory is the nominal one. The driver reports about 1 % less, or 8 % less where error
    correction takes a part. The compiler reads it only to know when to prefer less memory to more
    speed.

    Example:
        >>> from bertbench.hardware.accelerators import find_accelerator
        >>> gpu_target(find_accelerator("t4")).splitlines()[-1]
        'device_description_str: "t4"'

    Args:
        accelerator: a GPU of the catalogue.

    Returns:
        A `stream_executor.GpuTargetConfigProto` in text format.

    Raises:
        InputError: it is a TPU, whose compiler takes `accelerator.topology` instead.
    """
    chip, capability = accelerator.chip, accelerator.compute_capability
    if chip is None or capability is None:
        raise InputError(
            f"{accelerator.name} is no GPU", hint="a TPU is described by the name of its topology"
        )
    of_each = MULTIPROCESSORS[capability]
    major, minor = str(capability).split(".")
    numbers = {
        "threads_per_block_limit": _BLOCK_THREADS,
        "threads_per_warp": _WARP_THREADS,
        "shared_memory_per_block": _BLOCK_SHARED_BYTES,
        "shared_memory_per_core": of_each.shared_kib * KIB_BYTES,
        "threads_per_core_limit": of_each.threads,
        "core_count": chip.multiprocessors,
        "fpus_per_core": of_each.float32_cores,
        **_by_axis("block_dim_limit", _GRID_LIMITS),
        "memory_bandwidth": int(accelerator.bytes_per_second),
        "l2_cache_size": chip.l2_cache_bytes,
        "clock_rate_ghz": chip.clock_hertz / 1e9,
        "device_memory_size": accelerator.memory_bytes,
        "shared_memory_per_block_optin": of_each.block_shared_kib * KIB_BYTES,
        "cuda_compute_capability": f"{{ major: {major} minor: {minor} }}",
        "registers_per_core_limit": _REGISTERS,
        "registers_per_block_limit": _REGISTERS,
    }
    lines = [f"  {name}{'' if 'capability' in name else ':'} {v}" for name, v in numbers.items()]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            f"runtime_version {_version(RUNTIME_VERSION)}",
            'platform_name: "CUDA"',
            f"dnn_version_info {_version(CUDNN_VERSION)}",
            f'device_description_str: "{accelerator.name}"',
            "",
        ]
    )


def _by_axis(name: str, limits: tuple[int, int, int]) -> dict[str, int]:
    return {f"{name}_{axis}": limit for axis, limit in zip("xyz", limits, strict=True)}


def _version(numbers: tuple[int, int, int]) -> str:
    major, minor, patch = numbers
    return f"{{ major: {major} minor: {minor} patch: {patch} }}"
