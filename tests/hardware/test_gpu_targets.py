"""The text by which XLA's compiler knows a GPU."""

from __future__ import annotations

import re

import pytest

from bertbench.hardware.accelerators import ACCELERATORS, find_accelerator
from bertbench.hardware.gpu_targets import MULTIPROCESSORS, gpu_target
from finetune.errors import InputError


def numbers(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)\b", text)}


COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}


@pytest.mark.parametrize(
    ("name", "expected", "about"),
    [
        (
            "titan-x",
            {
                "shared_memory_per_core": 98304,
                "threads_per_core_limit": 2048,
                "core_count": 28,
                "fpus_per_core": 128,
                "l2_cache_size": 3145728,
                "clock_rate_ghz": 1.531,
                "shared_memory_per_block_optin": 49152,
            },
            {"memory_bandwidth": 480_400_000_000, "device_memory_size": 12_781_682_688},
        ),
        (
            "t4",
            {
                "shared_memory_per_core": 65536,
                "threads_per_core_limit": 1024,
                "core_count": 40,
                "fpus_per_core": 64,
                "l2_cache_size": 4194304,
                "clock_rate_ghz": 1.59,
                "shared_memory_per_block_optin": 65536,
            },
            {"memory_bandwidth": 320_000_000_000},
        ),
        (
            "h100",
            {
                "shared_memory_per_core": 233472,
                "threads_per_core_limit": 2048,
                "core_count": 132,
                "fpus_per_core": 128,
                "l2_cache_size": 52428800,
                "clock_rate_ghz": 1.98,
                "shared_memory_per_block_optin": 232448,
            },
            {"memory_bandwidth": 3_352_320_000_000, "device_memory_size": 84_929_347_584},
        ),
    ],
)
def test_targets_are_as_the_driver_reports_the_gpus(
    name: str, expected: dict[str, float], about: dict[str, float]
) -> None:
    found = numbers(gpu_target(find_accelerator(name)))
    expected = {**COMMON, **expected}
    assert {key: found[key] for key in expected} == expected
    assert {key: found[key] for key in about} == pytest.approx(about, rel=0.012)


def test_versions_and_capability_are_written_as_messages() -> None:
    text = gpu_target(find_accelerator("titan-x"))
    assert "cuda_compute_capability { major: 6 minor: 1 }" in text
    assert "runtime_version { major: 12 minor: 8 patch: 0 }" in text
    assert "dnn_version_info { major: 9 minor: 7 patch: 0 }" in text
    assert 'platform_name: "CUDA"' in text
    assert "{ major: 12 minor: 0 }" in gpu_target(find_accelerator("rtx-5090"))


def test_every_gpu_of_the_catalogue_has_a_target() -> None:
    used = set()
    for accelerator in ACCELERATORS.values():
        if accelerator.kind == "gpu":
            assert numbers(gpu_target(accelerator))["core_count"] > 0
            used.add(accelerator.compute_capability)
    assert used == set(MULTIPROCESSORS)


def test_a_tpu_is_no_gpu() -> None:
    with pytest.raises(InputError, match="tpu-v2-8 is no GPU"):
        gpu_target(find_accelerator("tpu-v2-8"))
