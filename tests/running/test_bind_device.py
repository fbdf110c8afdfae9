"""Tests of bertbench.running.bind_device: a run's budget, before and after others took memory."""

from __future__ import annotations

import dataclasses

import pytest

from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.device import Device, TpuSettings, default_budget_bytes, make_budget
from bertbench.running.bind_device import (
    is_out_of_device_memory,
    is_out_of_memory,
    shrink_to_free,
    tpu_budget,
)

GIB_BYTES = 1 << 30
GPU = Device("gpu", 0, "NVIDIA Test", "GPU-0", 16 * GIB_BYTES, 12 * GIB_BYTES)


def test_a_continued_run_makes_do_with_what_is_free() -> None:
    budget = make_budget(GPU, 10 * GIB_BYTES)
    assert shrink_to_free(budget) == budget
    fuller = dataclasses.replace(GPU, free_bytes=8 * GIB_BYTES)
    shrunk = shrink_to_free(dataclasses.replace(budget, device=fuller))
    assert shrunk.budget_bytes == default_budget_bytes(fuller) < 8 * GIB_BYTES


def test_one_full_device_of_several_is_enough_to_shrink() -> None:
    fuller = dataclasses.replace(GPU, index=1, uuid="GPU-1", free_bytes=8 * GIB_BYTES)
    both = dataclasses.replace(GPU, peers=(fuller,))
    assert shrink_to_free(make_budget(both, 10 * GIB_BYTES)).budget_bytes < 8 * GIB_BYTES


def test_a_tpu_has_the_memory_of_the_smallest_unless_the_user_says_more() -> None:
    usable_bytes = find_accelerator("tpu-v2-8").usable_bytes
    tpu = TpuSettings("name")
    assert usable_bytes - (1 << 20) < tpu_budget(tpu, None).budget_bytes <= usable_bytes
    assert tpu_budget(tpu, 16 * GIB_BYTES).budget_bytes == 16 * GIB_BYTES


class ResourceExhaustedError(Exception):
    """As TensorFlow's."""


@pytest.mark.parametrize(
    ("message", "is_of_device"),
    [
        (
            "OOM when allocating tensor with shape[8,128] and type float on cpu:0 by allocator bfc",
            True,
        ),
        ("OOM when allocating tensor with shape[8,128] on gpu:0 by allocator GPU_0_bfc", True),
        ("OOM when allocating tensor with shape[8,128] and type float by allocator cpu", False),
        ("OOM when allocating tensor with shape[8] by allocator gpu_host_bfc", False),
    ],
)
def test_memory_that_ran_out_is_the_device_s_or_the_host_s(
    message: str, is_of_device: bool
) -> None:
    error = ResourceExhaustedError(message)
    assert is_out_of_memory(error)
    assert is_out_of_device_memory(error) is is_of_device
