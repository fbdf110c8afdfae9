"""What TensorFlow's package can run on, with facts that are given instead of those of a machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tensorflow as tf

from bertbench.hardware.tensorflow_support import (
    CUDA_CAPABILITIES,
    TENSORFLOW,
    Software,
    built_for,
    check_kernels,
    count_tpu_chips,
    find_software,
    gpu_support,
    kernels_for,
    tensorflow_version,
    tpu_support,
)
from finetune.errors import InputError

LINUX = Software((("tensorflow", "2.21.0"),), CUDA_CAPABILITIES)


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [
        (3.7, "none"),
        (5.2, "none"),
        (6.0, "binary"),
        (6.1, "binary"),
        (7.5, "binary"),
        (8.0, "binary"),
        (8.6, "binary"),
        (8.9, "binary"),
        (9.0, "binary"),
        (10.0, "ptx"),
        (12.0, "ptx"),
    ],
)
def test_kernels_of_the_package(capability: float, kernels: str) -> None:
    assert kernels_for(capability) == kernels


def test_a_binary_runs_on_later_minor_versions_only() -> None:
    assert kernels_for(8.0, ["sm_86"]) == "none"
    assert kernels_for(8.9, ["sm_86"]) == "binary"
    assert kernels_for(9.0, ["sm_86"]) == "none"
    assert kernels_for(9.0, ["compute_86"]) == "ptx"
    assert kernels_for(12.0, ["sm_90", "sm_120"]) == "binary"


def test_a_gpu_without_kernels_is_refused_in_one_line() -> None:
    check_kernels("titan-x", 6.1)
    with pytest.raises(InputError) as error:
        check_kernels("k80", 3.7)
    assert str(error.value) == (
        f"{TENSORFLOW} has no kernels for k80: compute capability 3.7, not 6.0 or newer; choose a "
        "GPU that `bertbench plan --gpu list` shows"
    )


def test_the_capabilities_are_those_of_the_installed_package() -> None:
    build = tf.sysconfig.get_build_info()
    if not build["is_cuda_build"]:
        pytest.skip("this TensorFlow was built without CUDA")
    assert tuple(build["cuda_compute_capabilities"]) == CUDA_CAPABILITIES
    assert find_software().cuda_capabilities == CUDA_CAPABILITIES


def test_the_installed_package_is_found_without_importing_it() -> None:
    software = find_software()
    assert tf.__version__ in software.name
    assert tensorflow_version() == tf.__version__


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "import collections\nbuild_info = collections.OrderedDict([('is_cuda_build', True), "
            "('cuda_compute_capabilities', ['sm_60', 'compute_90'])])\n",
            ("sm_60", "compute_90"),
        ),
        ("build_info = collections.OrderedDict([('is_cuda_build', False)])", ()),
        ("build_info = collections.OrderedDict([os.getenv('X')])", None),
        ("build_info = collections.OrderedDict(7)", None),
        ("", None),
    ],
)
def test_what_a_package_was_built_for(text: str, expected: tuple[str, ...] | None) -> None:
    assert built_for(text) == expected


@pytest.mark.parametrize(
    ("capability", "changed", "words"),
    [
        (8.6, {"packages": ()}, "it is not installed; pip install 'bertbench[gpu]'"),
        (8.6, {"system": "Windows"}, "no CUDA on native Windows; use WSL2"),
        (8.6, {"cuda_capabilities": ()}, "tensorflow 2.21.0 was built without CUDA"),
        (5.2, {}, "no kernels for compute capability 5.2, only for sm_60, "),
        (8.6, {"cuda_capabilities": ("sm_90",)}, "no kernels for compute capability 8.6"),
        (
            8.6,
            {"missing_cuda": ("nvidia-cudnn-cu12", "nvidia-nccl-cu12")},
            "CUDA packages are not installed (nvidia-cudnn-cu12, nvidia-nccl-cu12); "
            "pip install 'bertbench[gpu]', unless the system has",
        ),
        (
            8.6,
            {"packages": (("tensorflow", "2.21.0"), ("tensorflow-cpu", "2.21.0"))},
            "tensorflow 2.21.0 and tensorflow-cpu 2.21.0 write to the same files",
        ),
    ],
)
def test_why_a_gpu_cannot_be_used(
    capability: float, changed: dict[str, object], words: str
) -> None:
    support = gpu_support(capability, dataclasses.replace(LINUX, **changed))
    assert not support.usable
    assert words in support.describe()
    assert "\n" not in support.describe()


def test_gpus_that_can_be_used() -> None:
    known = gpu_support(8.6, LINUX)
    assert (known.usable, known.remedy) == (True, None)
    assert known.describe() == "TensorFlow can use it: tensorflow 2.21.0, compute capability 8.6"
    assert gpu_support(8.6, dataclasses.replace(LINUX, in_wsl=True)).why.endswith("in WSL2")
    newest = gpu_support(12.0, LINUX)
    assert newest.usable
    assert "CUDA_ERROR_INVALID_PTX" in newest.describe()
    # What the driver or the package does not tell is not held against them.
    assert gpu_support(None, LINUX).usable
    assert gpu_support(8.6, dataclasses.replace(LINUX, cuda_capabilities=None)).usable
    assert not gpu_support(3.7, dataclasses.replace(LINUX, cuda_capabilities=None)).usable


def test_a_tpu_needs_its_own_package_alone() -> None:
    plain = tpu_support(LINUX)
    assert not plain.usable
    assert "pip uninstall -y tensorflow && pip install tensorflow-tpu==" in plain.describe()
    tpu = ("tensorflow-tpu", "2.20.0")
    both = tpu_support(Software((("tensorflow", "2.21.0"), tpu), libtpu="0.0.20"))
    assert not both.usable
    assert "write to the same files" in both.why
    assert "libtpu is not installed" in tpu_support(Software((tpu,))).describe()
    for libtpu, usable in (("0.0.14", True), ("0.0.17.1", True), ("0.0.32", False)):
        assert tpu_support(Software((tpu,), libtpu=libtpu)).usable == usable
    too_new = tpu_support(Software((tpu,), libtpu="0.0.52"))
    assert "too new; pip install libtpu==0.0.30" in too_new.describe()
    assert not tpu_support(Software()).usable


def test_tpu_chips_are_told_from_other_devices_of_their_maker(tmp_path: Path) -> None:
    for number, (vendor, device) in enumerate(
        [("0x1ae0", "0x0063"), ("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x10de", "0x0063")]
    ):
        folder = tmp_path / f"0000:00:0{number}.0"
        folder.mkdir()
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    (tmp_path / "empty").mkdir()
    assert count_tpu_chips(tmp_path) == 2
    assert count_tpu_chips(tmp_path / "none") == 0
