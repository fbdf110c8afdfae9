"""The catalogue of accelerators: memory and rates of GPUs and TPUs, from data sheets.

A plan can be made for each of them, whether it is attached or not.

Sources: NVIDIA's data sheets and architecture white papers of each product (memory, bandwidth,
peak single-precision rate without tensor cores, compute capability); Google Cloud's pages on TPU
v2, v3, v4 and v5e (memory, bandwidth and peak bfloat16 rate of a chip, cores of a chip).
"""

from __future__ import annotations

import dataclasses

from bertbench.core.units import GIB_BYTES, MIB_BYTES
from bertbench.core.workload import Levers
from finetune.errors import InputError

_USABLE_FRACTION = 0.93
"""Fraction of the nominal memory that the allocator of a training step gets: TensorFlow gets 11,430
MiB of the 12 GiB of a Titan X, and XLA 7.48 GiB of the 8 GiB of a TPU v2 core."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """An accelerator of the catalogue.

    Attributes:
        name: what `--gpu` takes.
        memory_bytes: nominal memory of one device.
        flops_per_second: peak float32 rate of one device, without tensor cores. A TPU has a
            bfloat16 rate only.
        bytes_per_second: memory bandwidth of one device.
        compute_capability: CUDA's version of what a GPU can do; None for a TPU.
        replicas: number of devices in the product: 1 for a GPU, the cores of a TPU.
    """

    name: str
    memory_bytes: int
    flops_per_second: float
    bytes_per_second: float
    compute_capability: float | None = None
    replicas: int = 1

    @property
    def kind(self) -> str:
        """`gpu` or `tpu`."""
        return "tpu" if self.name.startswith("tpu-") else "gpu"

    @property
    def usable_bytes(self) -> int:
        """Bytes that the allocator gets where no other process uses the device, in whole MiB.

        The driver, the CUDA context and the workspaces of libraries take the rest.
        """
        return int(self.memory_bytes * _USABLE_FRACTION) // MIB_BYTES * MIB_BYTES


_ROWS = (
    # name, GiB, TFLOP/s float32, GB/s, CUDA compute capability
    ("gtx-1050-ti", 4, 2.1, 112, 6.1),
    ("gtx-1060", 6, 4.4, 192, 6.1),
    ("gtx-1070", 8, 6.5, 256, 6.1),
    ("gtx-1080", 8, 8.9, 320, 6.1),
    ("gtx-1080-ti", 11, 11.3, 484, 6.1),
    ("titan-x", 12, 10.2, 480, 6.1),
    ("titan-rtx", 24, 16.3, 672, 7.5),
    ("rtx-2060", 6, 6.5, 336, 7.5),
    ("rtx-2070", 8, 7.5, 448, 7.5),
    ("rtx-2080", 8, 10.1, 448, 7.5),
    ("rtx-2080-ti", 11, 13.4, 616, 7.5),
    ("rtx-3060", 12, 12.7, 360, 8.6),
    ("rtx-3070", 8, 20.3, 448, 8.6),
    ("rtx-3080", 10, 29.8, 760, 8.6),
    ("rtx-3090", 24, 35.6, 936, 8.6),
    ("rtx-4060", 8, 15.1, 272, 8.9),
    ("rtx-4070", 12, 29.1, 504, 8.9),
    ("rtx-4080", 16, 48.7, 717, 8.9),
    ("rtx-4090", 24, 82.6, 1008, 8.9),
    ("k80", 12, 4.4, 240, 3.7),
    ("p100", 16, 9.3, 732, 6.0),
    ("t4", 16, 8.1, 320, 7.5),
    ("v100", 16, 15.7, 900, 7.0),
    ("a10", 24, 31.2, 600, 8.6),
    ("l4", 24, 30.3, 300, 8.9),
    ("a100", 40, 19.5, 1555, 8.0),
    ("h100", 80, 67.0, 3350, 9.0),
    ("h200", 141, 67.0, 4800, 9.0),
)

_TPU_ROWS = (
    # name, devices that TensorFlow sees, and of each GiB, TFLOP/s, GB/s
    ("tpu-v2-8", 8, 8, 22.5, 350),
    ("tpu-v3-8", 8, 16, 61.5, 450),
    ("tpu-v4-8", 4, 32, 275.0, 1200),
    ("tpu-v5e-8", 8, 16, 197.0, 819),
)

ACCELERATORS = {
    **{
        name: Accelerator(name, gib * GIB_BYTES, tera * 1e12, giga * 1e9, capability)
        for name, gib, tera, giga, capability in _ROWS
    },
    **{
        name: Accelerator(name, gib * GIB_BYTES, tera * 1e12, giga * 1e9, replicas=replicas)
        for name, replicas, gib, tera, giga in _TPU_ROWS
    },
}


def find_accelerator(name: str) -> Accelerator:
    """Look up an accelerator; case, spaces, underscores and the maker's name do not matter.

    Raises:
        InputError: the name is not in the catalogue.
    """
    key = name.lower().replace(" ", "-").replace("_", "-")
    for prefix in ("nvidia-", "geforce-", "tesla-", "gpu-"):
        key = key.removeprefix(prefix)
    if key not in ACCELERATORS:
        raise InputError(
            f"{name!r} is not in the catalogue",
            hint="see `bertbench plan --gpu list`, or give --memory",
        )
    return ACCELERATORS[key]


def gpus_with(usable_bytes: int) -> list[Accelerator]:
    """Return the GPUs with at least so much usable memory, the smallest first."""
    large = [a for a in ACCELERATORS.values() if a.kind == "gpu" and a.usable_bytes >= usable_bytes]
    return sorted(large, key=lambda gpu: gpu.memory_bytes)


def match_accelerator(product: str) -> Accelerator | None:
    """Find the accelerator of a driver's device name, such as `NVIDIA H100 80GB HBM3`."""
    key = product.lower().replace(" ", "-")
    matches = [name for name in ACCELERATORS if f"-{name}-" in f"-{key}-"]
    return ACCELERATORS[max(matches, key=len)] if matches else None


def check_levers(kind: str, product: str, levers: Levers, replicas: int = 1) -> None:
    """Check that a device supports some levers.

    Args:
        kind: `cpu`, `gpu` or `tpu`.
        product: name of the device.
        levers: lever settings.
        replicas: devices that share the effective batch.

    Raises:
        InputError: the device, or several of them together, do not support a lever.
    """
    check_precision(product, levers.precision)
    if kind == "tpu" and levers.precision in ("fp16", "tf32"):
        raise InputError(
            f"{product} does not support {levers.precision}", hint="use bf16 or float32"
        )
    if levers.placement == "host" and levers.xla:
        raise InputError(
            "XLA does not support the optimizer's state on the host",
            hint="leave --xla or --placement host out",
        )
    if levers.placement == "host" and replicas > 1:
        raise InputError(
            "the optimizer's state cannot be on the host with several replicas",
            hint="leave --placement host out, or train on one device",
        )
    if levers.placement == "host" and kind != "gpu":
        raise InputError(
            f"the optimizer's state cannot be on the host of {product}",
            hint="--placement host is for GPUs, whose memory is not the host's",
        )


def check_precision(product: str, precision: str) -> None:
    """Check that a device supports a precision; one that is not in the catalogue is not checked.

    Raises:
        InputError: the device does not support it.
    """
    accelerator = match_accelerator(product)
    capability = None if accelerator is None else accelerator.compute_capability
    if precision in _AMPERE_PRECISIONS and capability is not None and capability < 8.0:
        raise InputError(
            f"{product} does not support {precision}: compute capability {capability}, not 8.0 or "
            "newer",
            hint="use fp16 or float32" if precision == "bf16" else "use float32",
        )


_AMPERE_PRECISIONS = ("bf16", "tf32")
"""Precisions that need compute capability 8.0 (CUDA C++ Programming Guide, table of arithmetic)."""
