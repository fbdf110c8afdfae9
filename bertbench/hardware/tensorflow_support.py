"""What TensorFlow's package can run on, read without importing TensorFlow.

There are two questions. Which compute capabilities does TensorFlow have kernels for? A plan asks it
for a product of the catalogue. Can the TensorFlow that is installed here use what is attached?
`bertbench devices` asks it.

CUDA's rules: a binary for X.y runs on GPUs of compute capability X.z with z at least y. PTX, an
intermediate code, for X.y is compiled by the driver for every capability from X.y on.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import platform
import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from bertbench.hardware.device import Device
from finetune.errors import InputError

TENSORFLOW = "TensorFlow 2.21"
"""The version that `CUDA_CAPABILITIES` is of."""

CUDA_CAPABILITIES = ("sm_60", "sm_70", "sm_80", "sm_89", "compute_90")
"""What TensorFlow's package for Linux has kernels for: `cuda_compute_capabilities` of
`tf.sysconfig.get_build_info()` of 2.21.0. `sm_` stands for a binary, `compute_` for a binary and
PTX (the questions of TensorFlow's `configure.py`)."""

PTX_CAUTION = (
    f"{TENSORFLOW} has no binary for this generation, only PTX of 9.0 that the driver compiles at "
    "the first start, which takes minutes. Users report that it fails with CUDA_ERROR_INVALID_PTX, "
    "and XLA with PTX 8.5. NVIDIA's container nvcr.io/nvidia/tensorflow has binaries"
)
"""Reports 89272, 97387, 101746 and 111958 of the repository tensorflow/tensorflow, of 2.20 and of
later builds. CUDA 12.5, which the package is built with, knows no capability above 9.0."""

_DISTRIBUTIONS = (
    "tensorflow",
    "tensorflow-cpu",
    "tensorflow-tpu",
    "tf-nightly",
    "tf-nightly-cpu",
    "tf-nightly-tpu",
)
"""Packages that hold the module `tensorflow`."""

TPU_PACKAGE = "tensorflow-tpu==2.20.0"
"""The newest TensorFlow for TPUs on PyPI, 2026-12-01; there is none of 2.21. It writes to the same
folder as the package `tensorflow`, so it must replace it, and cannot be an extra beside it."""

NEWEST_LIBTPU = "0.0.30"
"""The newest libtpu that was tried and with which that package can be imported. Its requirement is
any 0.0 from 0.0.14 on, but from 0.0.32 on libtpu lacks a function that it calls
(`TpuExecutable_FreeMaybeOwningDeviceMemoryArray`), which ends the process at the import. 0.0.14,
17, 24 and 30 worked, 32, 34, 35 and 52 did not, on a machine without a TPU, 2026-12-01."""

_GOOGLE = "0x1ae0"
_TPU_CHIPS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""PCI numbers of TPUs v2 and v3, v4, v5p, v5e, v6e and TPU7x (JAX 0.10.2, `hardware_utils`)."""

INSTALL_GPU = "pip install 'bertbench[gpu]'"
INSTALL_TPU = f"pip uninstall -y tensorflow && pip install {TPU_PACKAGE} libtpu=={NEWEST_LIBTPU}"


@dataclasses.dataclass(frozen=True)
class Software:
    """What is installed on a machine, as far as it decides which devices TensorFlow can use.

    Attributes:
        packages: (name, version) of the packages that hold TensorFlow; usually one.
        cuda_capabilities: what TensorFlow was built for, as in `CUDA_CAPABILITIES`; empty if it was
            built without CUDA, None if that cannot be read.
        missing_cuda: packages of TensorFlow's extra `and-cuda` that are not installed.
        libtpu: version of the package libtpu; None if it is not installed.
        system: `Linux`, `Windows` or `Darwin`.
        in_wsl: whether this Linux runs in Windows (WSL2).
        tpu_chips: number of TPU chips that this machine has.
    """

    packages: tuple[tuple[str, str], ...] = ()
    cuda_capabilities: tuple[str, ...] | None = None
    missing_cuda: tuple[str, ...] = ()
    libtpu: str | None = None
    system: str = "Linux"
    in_wsl: bool = False
    tpu_chips: int = 0

    @property
    def name(self) -> str:
        """TensorFlow's name and version."""
        return " and ".join(f"{name} {version}" for name, version in self.packages)

    @property
    def for_tpu(self) -> bool:
        """Whether a TensorFlow for TPUs is among the packages."""
        return any(name.endswith("-tpu") for name, _ in self.packages)


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether the installed TensorFlow can use a device.

    Attributes:
        usable: whether it can, as far as is known here; false where it certainly cannot.
        why: the reason, in one line.
        remedy: what to do, in one line; None where nothing is to be done.
    """

    usable: bool
    why: str
    remedy: str | None = None

    def describe(self) -> str:
        """Write it in one line."""
        can = "can use it" if self.usable else "cannot use it"
        return f"TensorFlow {can}: {self.why}{f'; {self.remedy}' if self.remedy else ''}"


def kernels_for(capability: float, built_for: Iterable[str] = CUDA_CAPABILITIES) -> str:
    """Return which kernels a GPU gets from a package of TensorFlow: `binary`, `ptx` or `none`.

    Args:
        capability: the GPU's compute capability.
        built_for: capabilities that the package was built for, as in `CUDA_CAPABILITIES`.
    """
    own, found = _parts(str(capability)), "none"
    for text in built_for:
        built = _parts(text)
        if built[0] == own[0] and built[1] <= own[1]:
            return "binary"
        if text.startswith("compute") and built <= own:
            found = "ptx"
    return found


def has_kernels(gpu: Device) -> bool:
    """Whether the installed TensorFlow has kernels for an attached GPU.

    Where the driver does not tell the capability, or the package not what it was built for, the
    answer is that of `CUDA_CAPABILITIES`, or yes. A package without CUDA is another matter.
    """
    capability = gpu.compute_capability
    if capability is None:
        return True
    return kernels_for(capability, _built_for(_build_info_file()) or CUDA_CAPABILITIES) != "none"


def check_kernels(product: str, capability: float) -> None:
    """Check that TensorFlow's package has kernels for a GPU that need not be attached.

    Raises:
        InputError: it has none.
    """
    if kernels_for(capability) == "none":
        major, minor = min(map(_parts, CUDA_CAPABILITIES))
        raise InputError(
            f"{TENSORFLOW} has no kernels for {product}: compute capability {capability}, not "
            f"{major}.{minor} or newer",
            hint="choose a GPU that `bertbench plan --gpu list` shows",
        )


def device_support(device: Device, software: Software) -> Support | None:
    """Tell whether the installed TensorFlow can use a device; None for a CPU, which it always can.

    Args:
        device: an attached device.
        software: what is installed.
    """
    if device.kind == "gpu":
        return gpu_support(device.compute_capability, software)
    return tpu_support(software) if device.kind == "tpu" else None


def gpu_support(capability: float | None, software: Software) -> Support:
    """Tell whether the installed TensorFlow can use an attached GPU.

    Args:
        capability: the GPU's compute capability; None if the driver does not tell it.
        software: what is installed.
    """
    if not software.packages:
        return Support(False, "it is not installed", INSTALL_GPU)
    if len(software.packages) > 1:
        return Support(
            False,
            f"{software.name} write to the same files",
            f"uninstall all of them, then {INSTALL_GPU}",
        )
    if software.system == "Windows":
        return Support(
            False,
            "since 2.11 it has no CUDA on native Windows",
            "use WSL2, and install it there: " + INSTALL_GPU,
        )
    if software.cuda_capabilities == ():
        return Support(
            False,
            f"{software.name} was built without CUDA",
            "use the package tensorflow on Linux with an x86-64 CPU: " + INSTALL_GPU,
        )
    built_for = software.cuda_capabilities or CUDA_CAPABILITIES
    where = f"compute capability {capability}" if capability else "unknown compute capability"
    kernels = "binary" if capability is None else kernels_for(capability, built_for)
    if kernels == "none":
        return Support(
            False,
            f"{software.name} has no kernels for {where}, only for {', '.join(built_for)}",
            "use another device, as with --device cpu",
        )
    if software.missing_cuda:
        return Support(
            False,
            f"CUDA packages are not installed ({', '.join(software.missing_cuda)})",
            f"{INSTALL_GPU}, unless the system has CUDA 12 and cuDNN 9",
        )
    if kernels == "ptx":
        return Support(True, f"{software.name}, {where}", f"but {PTX_CAUTION}")
    return Support(True, f"{software.name}, {where}{', in WSL2' if software.in_wsl else ''}")


def tpu_support(software: Software) -> Support:
    """Tell whether the installed TensorFlow can use a TPU."""
    if not software.for_tpu:
        found = software.name or "no TensorFlow"
        return Support(False, f"{found} is installed, not tensorflow-tpu", INSTALL_TPU)
    if len(software.packages) > 1:
        return Support(
            False,
            f"{software.name} write to the same files",
            f"uninstall all of them, then pip install {TPU_PACKAGE} libtpu=={NEWEST_LIBTPU}",
        )
    if software.libtpu is None:
        return Support(False, "libtpu is not installed", f"pip install libtpu=={NEWEST_LIBTPU}")
    if _numbers(software.libtpu) > _numbers(NEWEST_LIBTPU):
        return Support(
            False,
            f"{software.name} cannot be imported with libtpu {software.libtpu}, which is too new",
            f"pip install libtpu=={NEWEST_LIBTPU}",
        )
    return Support(True, f"{software.name}, libtpu {software.libtpu}; bertbench never ran on a TPU")


def tensorflow_version() -> str | None:
    """Version of the installed TensorFlow; None without one."""
    found = _installed(_DISTRIBUTIONS)
    return found[0][1] if found else None


def find_software() -> Software:
    """Find out what is installed on this machine."""
    packages = _installed(_DISTRIBUTIONS)
    libtpu = _installed(("libtpu", "libtpu-nightly"))
    return Software(
        packages,
        _built_for(_build_info_file()),
        _missing(metadata.requires(packages[0][0]) or []) if packages else (),
        libtpu[0][1] if libtpu else None,
        platform.system(),
        "microsoft" in platform.release().lower(),
        count_tpu_chips(),
    )


def built_for(build_info: str) -> tuple[str, ...] | None:
    """Read what TensorFlow was built for.

    Args:
        build_info: text of its module `build_info`, which ends in
            `build_info = collections.OrderedDict([...])`.

    Returns:
        As `Software.cuda_capabilities`.
    """
    found = re.search(r"^build_info = collections\.OrderedDict\((.*)\)$", build_info, re.MULTILINE)
    try:
        values = dict(ast.literal_eval(found[1])) if found else None
    except (ValueError, SyntaxError, TypeError):
        return None
    if values is None:
        return None
    return tuple(values.get("cuda_compute_capabilities", ())) if values.get("is_cuda_build") else ()


def count_tpu_chips(folder: Path = Path("/sys/bus/pci/devices")) -> int:
    """Count the TPU chips among the PCI devices, as Linux lists them in a folder."""
    count = 0
    for device in folder.glob("*"):
        try:
            vendor, number = ((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        count += vendor == _GOOGLE and number in _TPU_CHIPS
    return count


def _build_info_file() -> Path | None:
    found = importlib.util.find_spec("tensorflow")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0], "python", "platform", "build_info.py")


def _built_for(file: Path | None) -> tuple[str, ...] | None:
    if file is None:
        return None
    try:
        return built_for(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _installed(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for name in names:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def _missing(requirements: Iterable[str]) -> tuple[str, ...]:
    """Name the packages of the extra `and-cuda` that are not installed."""
    names = [
        re.split(r"[^\w.-]", text)[0]
        for text in requirements
        if re.search(r"""extra == ["']and-cuda["']""", text)
    ]
    there = {name for name, _ in _installed(names)}
    return tuple(name for name in names if name not in there)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)][:3]


def _parts(capability: str) -> tuple[int, int]:
    """Major and minor number of `8.6`, `sm_86`, `compute_120` or `sm_90a`."""
    digits = re.sub(r"\D", "", capability)
    return int(digits[:-1]), int(digits[-1])
