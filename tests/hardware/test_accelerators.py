"""The catalogue of accelerators: its facts agree with each other, and names find the right row."""

from __future__ import annotations

import pytest

from bertbench.core.units import GIB_BYTES, MIB_BYTES
from bertbench.core.workload import Levers
from bertbench.hardware.accelerators import (
    ACCELERATORS,
    WITHOUT_KERNELS,
    check_levers,
    find_accelerator,
    match_accelerator,
)
from bertbench.hardware.gpu_targets import MULTIPROCESSORS
from finetune.errors import InputError

GPUS = [a for a in ACCELERATORS.values() if a.kind == "gpu"]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_rate_of_a_gpu_is_that_of_its_cores_and_clock(gpu) -> None:
    cores = gpu.chip.multiprocessors * MULTIPROCESSORS[gpu.compute_capability].float32_cores
    # The rate of these two is that at a lower clock than the highest one.
    least = 0.92 if gpu.name in ("titan-x", "p4") else 0.98
    assert least < gpu.flops_per_second / (2 * cores * gpu.chip.clock_hertz) < 1.02


@pytest.mark.parametrize(
    ("name", "devices", "usable_gib"),
    [
        ("tpu-v2-8", 8, 7.48),
        ("tpu-v3-8", 8, 15.48),
        ("tpu-v4-8", 4, 30.75),
        ("tpu-v5e-8", 8, 15.75),
        ("tpu-v5p-8", 4, 95.74),
        ("tpu-v6e-8", 8, 31.25),
        ("tpu7x-8", 8, 94.75),
    ],
)
def test_a_tpu_has_the_memory_that_its_compiler_says(
    name: str, devices: int, usable_gib: float
) -> None:
    tpu = ACCELERATORS[name]
    assert 0 <= usable_gib * GIB_BYTES - tpu.usable_bytes < MIB_BYTES
    assert (tpu.kind, tpu.replicas) == ("tpu", devices)


def test_every_tpu_and_no_gpu_has_a_topology() -> None:
    topologies = {a.name: a.topology for a in ACCELERATORS.values() if a.topology is not None}
    assert topologies == {
        "tpu-v2-8": "v2:2x2",
        "tpu-v3-8": "v3:2x2",
        "tpu-v4-8": "v4:2x2x1",
        "tpu-v5e-8": "v5e:2x2",
        "tpu-v5p-8": "v5p:2x2x1",
        "tpu-v6e-8": "v6e:2x2",
        "tpu7x-8": "tpu7x:2x2x1",
    }
    assert set(topologies) == {a.name for a in ACCELERATORS.values() if a.kind == "tpu"}


def test_usable_memory_is_whole_mebibytes_of_the_nominal_one() -> None:
    for accelerator in ACCELERATORS.values():
        assert accelerator.usable_bytes % MIB_BYTES == 0
        assert 0.9 < accelerator.usable_bytes / accelerator.memory_bytes < 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("titan-x", "titan-x"),
        ("NVIDIA TITAN X (Pascal)", "titan-x"),
        ("NVIDIA GeForce RTX_2080 Ti", "rtx-2080-ti"),
        ("4090", "rtx-4090"),
        ("1080 ti", "gtx-1080-ti"),
        ("A6000", "rtx-a6000"),
        ("RTX 4060 Ti 8GB", "rtx-4060-ti"),
        ("RTX 4060 Ti 16 GB", "rtx-4060-ti-16gb"),
        ("a100-40gb", "a100"),
        ("A100 80GB", "a100-80gb"),
        ("TPU v5e-8", "tpu-v5e-8"),
    ],
)
def test_names_on_the_command_line(text: str, name: str) -> None:
    assert find_accelerator(text).name == name


@pytest.mark.parametrize("text", ["", "-", "voodoo-2", "rtx-4090-8gb", "6000", "tpu"])
def test_names_that_are_not_in_the_catalogue(text: str) -> None:
    with pytest.raises(InputError, match="is not in the catalogue"):
        find_accelerator(text)


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("Quadro RTX 6000", "quadro-rtx-6000"),
        ("NVIDIA TITAN Xp", "titan-xp"),
        ("NVIDIA TITAN X (Pascal)", "titan-x"),
        ("NVIDIA GeForce GTX TITAN X", None),
        ("NVIDIA GeForce GTX 980 Ti", None),
        ("Voodoo 2", None),
    ],
)
def test_names_of_drivers(product: str, name: str | None) -> None:
    found = match_accelerator(product)
    assert (found.name if found else None) == name


@pytest.mark.parametrize("text", [*WITHOUT_KERNELS, "GeForce GTX TITAN X", "Tesla M40 24GB", "980"])
def test_gpus_without_kernels_are_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match=r"no kernels for [^\n]*capability [35]\.\d, not 6"):
        find_accelerator(text)


def test_the_other_titan_x_is_told_from_the_one_of_the_original_release() -> None:
    for text in ("titan-x-maxwell", "GeForce GTX TITAN X"):
        with pytest.raises(InputError, match=r"capability 5\.2") as error:
            find_accelerator(text)
        assert "titan-x is the Pascal one" in str(error.value)


def test_an_attached_gpu_without_kernels_is_refused_whatever_is_asked_of_it() -> None:
    with pytest.raises(InputError, match=r"no kernels for k80: compute capability 3\.7"):
        check_levers("gpu", "Tesla K80", Levers())
    # A CPU may have such a name.
    check_levers("cpu", "Apple M4", Levers())
    check_levers("gpu", "NVIDIA GeForce GTX 1060 3GB", Levers())


def test_what_speaks_against_a_product_is_known_of_those_it_is_true_of() -> None:
    cautioned = {a.name for a in ACCELERATORS.values() if a.caution is not None}
    assert cautioned == {
        *(a.name for a in GPUS if a.generation == "Blackwell"),
        "tpu7x-8",
    }
