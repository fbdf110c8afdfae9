"""The catalogue of accelerators: memory and rates of GPUs and TPUs, from data sheets.

A plan can be made for each of them, whether it is attached or not. `bertbench.hardware.gpu_targets`
describes its GPUs to XLA's compiler.

Sources of the GPUs:

- NVIDIA's data sheets of each product, and the white papers of the architectures ("NVIDIA Tesla
  P100", "Tesla V100 GPU Architecture", "Turing GPU Architecture", "Ampere GA102 GPU Architecture",
  "A100 Tensor Core GPU Architecture", "Ada GPU Architecture", "H100 Tensor Core GPU Architecture",
  "RTX Blackwell GPU Architecture"): memory, bandwidth, single-precision rate without tensor cores,
  multiprocessors, boost clock, L2 cache.
- https://developer.nvidia.com/cuda-gpus and its page of legacy GPUs: compute capability.
- XLA's own descriptions of GPUs (`xla/backends/gpu/target_config/specs`), which are what the driver
  reports: clock of V100, A100, RTX A6000, H100, H200 and B200, and the L2 cache of B200. The
  L2 caches of RTX 3060, 3060 Ti and 5060 and the clock of P4 are those that CUDA's `deviceQuery`
  prints.

Where a product comes in several forms, the row is the desktop GPU, or the one with the SXM
connector (P100: PCIe). `titan-x` is the Pascal one (GP102, 12 GB), which the original BERT release
used, not the GeForce GTX TITAN X of the generation before.

Sources of the TPUs: Google Cloud's page of each version ("TPU v2", …, "TPU7x (Ironwood)": memory,
bandwidth and bfloat16 rate of a chip, cores of a chip), and libtpu 0.0.52 for the usable memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from bertbench.core.units import GIB_BYTES, MIB_BYTES
from bertbench.core.workload import Levers
from bertbench.hardware.tensorflow_support import PTX_CAUTION, check_kernels, kernels_for
from finetune.errors import InputError

_USABLE_FRACTION = 0.93
"""Fraction of a GPU's nominal memory that the allocator of a training step gets: TensorFlow gets
11,430 MiB of the 12 GiB of a Titan X. It has not been measured on others. Of a GPU that corrects
errors in GDDR memory (T4, L4, A10, A40, L40) the driver reports only 92 to 94 %."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What XLA's compiler must know of a GPU beside its compute capability.

    Attributes:
        multiprocessors: number of streaming multiprocessors.
        clock_hertz: boost clock.
        l2_cache_bytes: size of the L2 cache.
    """

    multiprocessors: int
    clock_hertz: float
    l2_cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """An accelerator of the catalogue.

    Attributes:
        name: what `--gpu` takes.
        generation: the architecture's name, as in `Ampere`; `TPU` for a TPU.
        memory_bytes: nominal memory of one device.
        usable_bytes: bytes that the allocator gets where no other process uses the device, in whole
            MiB. The driver, the CUDA context and the workspaces of libraries take the rest.
        flops_per_second: peak float32 rate of one device, without tensor cores. A TPU has a
            bfloat16 rate only.
        bytes_per_second: memory bandwidth of one device.
        compute_capability: CUDA's version of what a GPU can do; None for a TPU.
        chip: further facts of a GPU; None for a TPU.
        replicas: number of devices in the product: 1 for a GPU, the devices of a TPU that
            TensorFlow sees.
        topology: libtpu's name of four such chips, which a program is compiled for that needs one
            device; None for a GPU.
        caution: why TensorFlow may not run on it, in one line; None if nothing is known.
    """

    name: str
    generation: str
    memory_bytes: int
    usable_bytes: int
    flops_per_second: float
    bytes_per_second: float
    compute_capability: float | None = None
    chip: Chip | None = None
    replicas: int = 1
    topology: str | None = None
    caution: str | None = None

    @property
    def kind(self) -> str:
        """`gpu` or `tpu`."""
        return "tpu" if self.compute_capability is None else "gpu"


_ROWS = (
    # name, GiB, TFLOP/s float32, GB/s, CUDA compute capability,
    # multiprocessors, boost clock in MHz, L2 cache in MiB
    ("gtx-1050-ti", 4, 2.1, 112, 6.1, 6, 1392, 1),
    ("gtx-1060", 6, 4.4, 192, 6.1, 10, 1708, 1.5),
    ("gtx-1070", 8, 6.5, 256, 6.1, 15, 1683, 2),
    ("gtx-1070-ti", 8, 8.2, 256, 6.1, 19, 1683, 2),
    ("gtx-1080", 8, 8.9, 320, 6.1, 20, 1733, 2),
    ("gtx-1080-ti", 11, 11.3, 484, 6.1, 28, 1582, 2.75),
    ("titan-x", 12, 10.2, 480, 6.1, 28, 1531, 3),
    ("titan-xp", 12, 12.1, 548, 6.1, 30, 1582, 3),
    ("p4", 8, 5.5, 192, 6.1, 20, 1114, 2),
    ("p40", 24, 11.8, 346, 6.1, 30, 1531, 3),
    ("p100", 16, 9.3, 732, 6.0, 56, 1303, 4),
    ("titan-v", 12, 14.9, 653, 7.0, 80, 1455, 4.5),
    ("v100", 16, 15.7, 900, 7.0, 80, 1530, 6),
    ("v100-32gb", 32, 15.7, 900, 7.0, 80, 1530, 6),
    ("gtx-1650", 4, 3.0, 128, 7.5, 14, 1665, 1),
    ("gtx-1650-super", 4, 4.4, 192, 7.5, 20, 1725, 1),
    ("gtx-1660", 6, 5.0, 192, 7.5, 22, 1785, 1.5),
    ("gtx-1660-super", 6, 5.0, 336, 7.5, 22, 1785, 1.5),
    ("gtx-1660-ti", 6, 5.4, 288, 7.5, 24, 1770, 1.5),
    ("rtx-2060", 6, 6.5, 336, 7.5, 30, 1680, 3),
    ("rtx-2060-12gb", 12, 7.2, 336, 7.5, 34, 1650, 3),
    ("rtx-2060-super", 8, 7.2, 448, 7.5, 34, 1650, 4),
    ("rtx-2070", 8, 7.5, 448, 7.5, 36, 1620, 4),
    ("rtx-2070-super", 8, 9.1, 448, 7.5, 40, 1770, 4),
    ("rtx-2080", 8, 10.1, 448, 7.5, 46, 1710, 4),
    ("rtx-2080-super", 8, 11.2, 496, 7.5, 48, 1815, 4),
    ("rtx-2080-ti", 11, 13.4, 616, 7.5, 68, 1545, 5.5),
    ("titan-rtx", 24, 16.3, 672, 7.5, 72, 1770, 6),
    ("quadro-rtx-5000", 16, 11.2, 448, 7.5, 48, 1815, 4),
    ("quadro-rtx-6000", 24, 16.3, 672, 7.5, 72, 1770, 6),
    ("quadro-rtx-8000", 48, 16.3, 672, 7.5, 72, 1770, 6),
    ("t4", 16, 8.1, 320, 7.5, 40, 1590, 4),
    ("rtx-3050", 8, 9.1, 224, 8.6, 20, 1777, 2),
    ("rtx-3060", 12, 12.7, 360, 8.6, 28, 1777, 2.25),
    ("rtx-3060-ti", 8, 16.2, 448, 8.6, 38, 1665, 3),
    ("rtx-3070", 8, 20.3, 448, 8.6, 46, 1725, 4),
    ("rtx-3070-ti", 8, 21.7, 608, 8.6, 48, 1770, 4),
    ("rtx-3080", 10, 29.8, 760, 8.6, 68, 1710, 5),
    ("rtx-3080-12gb", 12, 30.6, 912, 8.6, 70, 1710, 6),
    ("rtx-3080-ti", 12, 34.1, 912, 8.6, 80, 1665, 6),
    ("rtx-3090", 24, 35.6, 936, 8.6, 82, 1695, 6),
    ("rtx-3090-ti", 24, 40.0, 1008, 8.6, 84, 1860, 6),
    ("rtx-a4000", 16, 19.2, 448, 8.6, 48, 1560, 4),
    ("rtx-a4500", 20, 23.7, 640, 8.6, 56, 1650, 6),
    ("rtx-a5000", 24, 27.8, 768, 8.6, 64, 1695, 6),
    ("rtx-a6000", 48, 38.7, 768, 8.6, 84, 1800, 6),
    ("a2", 16, 4.5, 200, 8.6, 10, 1770, 2),
    ("a10", 24, 31.2, 600, 8.6, 72, 1695, 6),
    ("a40", 48, 37.4, 696, 8.6, 84, 1740, 6),
    ("a30", 24, 10.3, 933, 8.0, 56, 1440, 24),
    ("a100", 40, 19.5, 1555, 8.0, 108, 1410, 40),
    ("a100-80gb", 80, 19.5, 2039, 8.0, 108, 1410, 40),
    ("rtx-4060", 8, 15.1, 272, 8.9, 24, 2460, 24),
    ("rtx-4060-ti", 8, 22.1, 288, 8.9, 34, 2535, 32),
    ("rtx-4060-ti-16gb", 16, 22.1, 288, 8.9, 34, 2535, 32),
    ("rtx-4070", 12, 29.1, 504, 8.9, 46, 2475, 36),
    ("rtx-4070-super", 12, 35.5, 504, 8.9, 56, 2475, 48),
    ("rtx-4070-ti", 12, 40.1, 504, 8.9, 60, 2610, 48),
    ("rtx-4070-ti-super", 16, 44.1, 672, 8.9, 66, 2610, 48),
    ("rtx-4080", 16, 48.7, 717, 8.9, 76, 2505, 64),
    ("rtx-4080-super", 16, 52.2, 736, 8.9, 80, 2550, 64),
    ("rtx-4090", 24, 82.6, 1008, 8.9, 128, 2520, 72),
    ("rtx-6000-ada", 48, 91.1, 960, 8.9, 142, 2505, 96),
    ("l4", 24, 30.3, 300, 8.9, 58, 2040, 48),
    ("l40", 48, 90.5, 864, 8.9, 142, 2490, 96),
    ("l40s", 48, 91.6, 864, 8.9, 142, 2520, 96),
    ("h100", 80, 67.0, 3350, 9.0, 132, 1980, 50),
    ("h100-pcie", 80, 51.2, 2039, 9.0, 114, 1755, 50),
    ("h200", 141, 67.0, 4800, 9.0, 132, 1980, 50),
    ("rtx-5060", 8, 19.2, 448, 12.0, 30, 2497, 24),
    ("rtx-5060-ti", 8, 23.7, 448, 12.0, 36, 2572, 32),
    ("rtx-5060-ti-16gb", 16, 23.7, 448, 12.0, 36, 2572, 32),
    ("rtx-5070", 12, 30.9, 672, 12.0, 48, 2512, 48),
    ("rtx-5070-ti", 16, 43.9, 896, 12.0, 70, 2452, 48),
    ("rtx-5080", 16, 56.3, 960, 12.0, 84, 2617, 64),
    ("rtx-5090", 32, 104.8, 1792, 12.0, 170, 2407, 96),
    ("rtx-pro-6000", 96, 125.0, 1792, 12.0, 188, 2600, 128),
    ("b200", 180, 75.0, 7700, 10.0, 148, 1965, 126.5),
)  # fmt: skip

_TPU7X_CAUTION = (
    "Google's page on TPU7x says that TensorFlow is not supported on it; its memory and rates are "
    "here for comparison"
)

_TPU_ROWS = (
    # name, libtpu's topology, devices that TensorFlow sees, and of each: GiB, GiB that a program
    # may use, TFLOP/s, GB/s. Such a device is a core of v2, v3 and TPU7x. It is a chip of v4 and
    # v5p, whose two cores work as one and share the memory, and of v5e and v6e, with one core.
    ("tpu-v2-8", "v2:2x2", 8, 8, 7.48, 22.5, 350),
    ("tpu-v3-8", "v3:2x2", 8, 16, 15.48, 61.5, 450),
    ("tpu-v4-8", "v4:2x2x1", 4, 32, 30.75, 275.0, 1200),
    ("tpu-v5e-8", "v5e:2x2", 8, 16, 15.75, 197.0, 819),
    ("tpu-v5p-8", "v5p:2x2x1", 4, 96, 95.74, 459.0, 2765),
    ("tpu-v6e-8", "v6e:2x2", 8, 32, 31.25, 918.0, 1638),
    ("tpu7x-8", "tpu7x:2x2x1", 8, 96, 94.75, 1153.5, 3690),
)
"""Usable memory is "available HBM" in the message with which libtpu's compiler refuses a program
that is too large. Google's page says 95 GB of a v5p, which is what a program may use of 96 GiB."""

_GENERATIONS = {
    6.0: "Pascal",
    6.1: "Pascal",
    7.0: "Volta",
    7.5: "Turing",
    8.0: "Ampere",
    8.6: "Ampere",
    8.9: "Ada Lovelace",
    9.0: "Hopper",
    10.0: "Blackwell",
    12.0: "Blackwell",
}

WITHOUT_KERNELS = {
    "gtx-750-ti": 5.0,
    "gtx-950": 5.2,
    "gtx-960": 5.2,
    "gtx-970": 5.2,
    "gtx-980": 5.2,
    "gtx-980-ti": 5.2,
    "titan-x-maxwell": 5.2,
    "m4": 5.2,
    "m40": 5.2,
    "m60": 5.2,
    "k20": 3.5,
    "k40": 3.5,
    "k80": 3.7,
}
"""Known GPUs, with their compute capability, that TensorFlow's package has no kernels for."""

_OTHER_NAMES = {
    "gtx-titan-x": "titan-x-maxwell",
    "titan-x-pascal": "titan-x",
}
"""Names of a driver or a shop, and what they are called here."""

_REMARKS = {"titan-x-maxwell": " (GeForce GTX TITAN X; titan-x is the Pascal one)"}


def _whole_mib(gib: float) -> int:
    return int(gib * GIB_BYTES) // MIB_BYTES * MIB_BYTES


def _gpu(row: tuple[str, int, float, int, float, int, int, float]) -> Accelerator:
    name, gib, tera, giga, capability, multiprocessors, megahertz, l2_mib = row
    return Accelerator(
        name,
        _GENERATIONS[capability],
        gib * GIB_BYTES,
        _whole_mib(gib * _USABLE_FRACTION),
        tera * 1e12,
        giga * 1e9,
        capability,
        Chip(multiprocessors, megahertz * 1e6, int(l2_mib * MIB_BYTES)),
        caution=PTX_CAUTION if kernels_for(capability) == "ptx" else None,
    )


def _tpu(row: tuple[str, str, int, int, float, float, int]) -> Accelerator:
    name, topology, devices, gib, usable_gib, tera, giga = row
    return Accelerator(
        name,
        "TPU",
        gib * GIB_BYTES,
        _whole_mib(usable_gib),
        tera * 1e12,
        giga * 1e9,
        replicas=devices,
        topology=topology,
        caution=_TPU7X_CAUTION if name.startswith("tpu7x") else None,
    )


ACCELERATORS = {a.name: a for a in (*map(_gpu, _ROWS), *map(_tpu, _TPU_ROWS))}


def find_accelerator(name: str) -> Accelerator:
    """Look up an accelerator; case, punctuation and the maker's name do not matter.

    The series may be left out (`4090`), and the memory be named (`RTX 4060 Ti 8GB`).

    Raises:
        InputError: the name is not in the catalogue, or TensorFlow has no kernels for the product.
    """
    key = _key(name)
    for prefix in ("nvidia-", "geforce-", "tesla-", "gpu-"):
        key = key.removeprefix(prefix)
    found = _look_up(key)
    sized = re.fullmatch(r"(.+?)-(\d+)gb", key)
    if found is None and sized:
        found = _look_up(sized[1])
        if found is not None and found.memory_bytes != int(sized[2]) * GIB_BYTES:
            found = None
    if found is None:
        raise InputError(
            f"{name!r} is not in the catalogue",
            hint="see `bertbench plan --gpu list`, or give --memory",
        )
    return found


def _look_up(key: str) -> Accelerator | None:
    for one in (key, f"gtx-{key}", f"rtx-{key}"):
        name = _OTHER_NAMES.get(one, one)
        _check_known(name)
        if name in ACCELERATORS:
            return ACCELERATORS[name]
    return None


def gpus_with(usable_bytes: int) -> list[Accelerator]:
    """Return the GPUs with at least so much usable memory, the smallest first."""
    large = [a for a in ACCELERATORS.values() if a.kind == "gpu" and a.usable_bytes >= usable_bytes]
    return sorted(large, key=lambda gpu: gpu.memory_bytes)


def match_accelerator(product: str) -> Accelerator | None:
    """Find the accelerator of a driver's device name, such as `NVIDIA H100 80GB HBM3`."""
    return ACCELERATORS.get(_match(product) or "")


def check_product(product: str) -> None:
    """Check that TensorFlow's package has kernels for a GPU, if its driver's name is known.

    Raises:
        InputError: it has none.
    """
    _check_known(_match(product))


def _check_known(name: str | None) -> None:
    if name in WITHOUT_KERNELS:
        check_kernels(f"{name}{_REMARKS.get(name, '')}", WITHOUT_KERNELS[name])


def _match(product: str) -> str | None:
    """Find the longest known name whose words are those of a product, in this order."""
    words = _key(product).split("-")
    matches = [
        name
        for name in (*ACCELERATORS, *WITHOUT_KERNELS, *_OTHER_NAMES)
        if _are_in_order(name.split("-"), words)
    ]
    if not matches:
        return None
    longest = max(matches, key=lambda name: (name.count("-"), len(name)))
    return _OTHER_NAMES.get(longest, longest)


def _are_in_order(some: Sequence[str], words: Sequence[str]) -> bool:
    left = iter(words)
    return all(word in left for word in some)


def _key(name: str) -> str:
    """Write a name as the catalogue does: `RTX 4060 Ti 16 GB` as `rtx-4060-ti-16gb`."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return re.sub(r"-(\d+)-gb\b", r"-\1gb", words)


def check_levers(kind: str, product: str, levers: Levers, replicas: int = 1) -> None:
    """Check that a device supports some levers.

    Args:
        kind: `cpu`, `gpu` or `tpu`.
        product: name of the device.
        levers: lever settings.
        replicas: devices that share the effective batch.

    Raises:
        InputError: the device, or several of them together, do not support a lever, or TensorFlow
            does not support the device.
    """
    if kind == "gpu":
        check_product(product)
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
    if levers.xla and kind == "gpu" and replicas > 1:
        raise InputError(
            "XLA does not compile a step of several GPUs",
            hint="leave --xla out, or train on one GPU",
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
