"""Devices, budgets and host memory, on machines that are simulated where they are not at hand."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import tensorflow as tf

from bertbench.core.units import GIB_BYTES, MIB_BYTES
from bertbench.hardware import host
from bertbench.hardware.device import (
    GPU_CONTEXT_RESERVE_BYTES,
    Budget,
    Device,
    budget_from_json,
    check_free,
    default_budget_bytes,
    describe_use,
    device_from_json,
    make_budget,
)
from bertbench.hardware.discover import list_devices, resolve_device, resolve_devices, visible_gpus
from bertbench.hardware.host import cgroup_limits, memory_cgroups, oom_kill_counts
from bertbench.memory.allocator import budget as allocator_budget
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES
from bertbench.memory.allocator.budget import apply_budget, child_environment, empty_memory
from finetune.errors import InputError
from helpers.paths import REPOSITORY

CPU = Device("cpu", 0, "Some CPU (2 cores)", None, 16 * GIB_BYTES, 8 * GIB_BYTES)
FULL = Device(
    "gpu", 0, "Card", "GPU-aaaa-1", 24 * GIB_BYTES, GIB_BYTES, ((41, "game", 23 * GIB_BYTES),), "5"
)
FREE = Device("gpu", 1, "Card", "GPU-bbbb-2", 24 * GIB_BYTES, 23 * GIB_BYTES, (), "5")
ALL = [FULL, FREE, CPU]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", FREE),
        ("gpu", FREE),
        ("gpu:0", FULL),
        ("gpu:1", FREE),
        ("gpu:GPU-aaaa", FULL),
        ("GPU:bbbb-2", FREE),
        ("cpu", CPU),
    ],
)
def test_resolve_device(text: str, expected: Device) -> None:
    assert resolve_device(text, ALL) == expected


LIKE = dataclasses.replace(FULL, index=2, uuid="GPU-cccc", free_bytes=20 * GIB_BYTES, held_by=())


def test_gpus_that_share_a_batch() -> None:
    assert resolve_devices("gpu:1", ALL) == FREE
    both = resolve_devices("gpu:1,gpu:GPU-c", [*ALL, LIKE])
    assert (both.label, both.replicas, both.each) == ("gpu:1,gpu:2", 2, (FREE, LIKE))
    # Trials run on one of them, and each has its own memory: that of the fuller one is promised.
    assert both.key() == FREE.key()
    assert default_budget_bytes(both) == 20 * GIB_BYTES - GPU_CONTEXT_RESERVE_BYTES
    check_free(make_budget(both, 20 * GIB_BYTES))
    with pytest.raises(InputError, match=r"is more than gpu:2 has free: 20\.0 GiB of 24\.0 GiB"):
        check_free(make_budget(both, 21 * GIB_BYTES))
    assert device_from_json(json.loads(json.dumps(both.to_json()))) == both
    with_game = resolve_devices("gpu:1,gpu:0", ALL)
    assert "process 41 (game)" in describe_use(with_game)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu:1,gpu:1", "gpu:1,gpu:1 names a device twice"),
        ("gpu:1,cpu", "only GPUs share a batch"),
        ("gpu:1,gpu:2", "several products"),
        ("gpu:1,", "unknown device ''"),
    ],
)
def test_devices_that_cannot_share_a_batch(text: str, words: str) -> None:
    there = [*ALL, dataclasses.replace(LIKE, name="Other")]
    with pytest.raises(InputError, match=words):
        resolve_devices(text, there)


def test_a_budget_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(resolve_devices("gpu:1,gpu:2", [*ALL, LIKE]), GIB_BYTES)
    for name, value in child_environment(budget).items():
        monkeypatch.setenv(name, value)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb-2,GPU-cccc"
    cards = ["first", "second"]
    limits, set_aside = {}, []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: cards)
    monkeypatch.setattr(
        tf.config,
        "set_logical_device_configuration",
        lambda card, parts: limits.update({card: [part.memory_limit for part in parts]}),
    )
    monkeypatch.setattr(
        allocator_budget, "_set_small_pieces_aside", lambda _, *what: set_aside.append(what)
    )
    assert apply_budget(budget) == "GPU:0"
    assert limits == {"first": [1024], "second": [1024]}
    pieces = empty_memory(budget).small_pieces
    assert set_aside == [("GPU:0", pieces), ("GPU:1", pieces)]
    cards.pop()
    with pytest.raises(InputError, match="cannot use gpu:1,gpu:2"):
        apply_budget(budget)


OLD = dataclasses.replace(FREE, index=3, name="GTX 960M", uuid="GPU-d", compute_capability=5.0)


def test_a_gpu_without_kernels_is_not_chosen_and_refused_where_it_is_named() -> None:
    newer = dataclasses.replace(LIKE, compute_capability=12.0)
    for text in ("auto", "gpu"):
        assert resolve_device(text, [OLD, newer, CPU]) == newer
    assert resolve_device("auto", [OLD, CPU]) == CPU
    for text in ("gpu", "gpu:3", "gpu:GPU-d"):
        with pytest.raises(InputError, match=r"no kernels for gpu:3 \(GTX 960M\).*5\.0"):
            resolve_device(text, [OLD, CPU])


def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert resolve_device("auto", [CPU]) == CPU


@pytest.mark.parametrize(
    ("text", "there", "words"),
    [
        ("gpu:2", ALL, "attached: gpu:0, gpu:1"),
        ("gpu:GPU-", ALL, "there is no"),
        ("gpu:0", [CPU], "no GPU is attached"),
        ("cuda:0", ALL, "unknown device 'cuda:0'"),
        ("auto:1", ALL, "unknown device"),
    ],
)
def test_no_such_device(text: str, there: list[Device], words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve_device(text, there)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [FULL, FREE]),
        ("1", [FREE]),
        ("1,0", [FREE, FULL]),
        ("GPU-bbbb", [FREE]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [FULL]),
    ],
)
def test_hidden_gpus_stay_hidden(visible: str | None, expected: list[Device]) -> None:
    assert visible_gpus([FULL, FREE], visible) == expected


def test_default_budgets_leave_room() -> None:
    assert default_budget_bytes(FREE) == 23 * GIB_BYTES - GPU_CONTEXT_RESERVE_BYTES
    odd = Device("cpu", 0, "x", None, GIB_BYTES, 1001 * MIB_BYTES + 7)
    assert default_budget_bytes(odd) == 750 * MIB_BYTES
    crowded = Device("gpu", 0, "x", "GPU-1", GIB_BYTES, 100 * MIB_BYTES, ((9, "game", 5),))
    with pytest.raises(InputError, match=r"100 MiB of 1,024 MiB free; process 9 \(game\)"):
        default_budget_bytes(crowded)


def test_a_budget_is_whole_mebibytes_within_the_device() -> None:
    assert make_budget(CPU, 1_500_000_000).budget_bytes == 1430 * MIB_BYTES
    assert make_budget(CPU).budget_bytes == 6 * GIB_BYTES
    assert make_budget(FULL, 24 * GIB_BYTES).budget_bytes == FULL.total_bytes
    with pytest.raises(InputError, match=r"24\.0 GiB of gpu:0"):
        make_budget(FULL, 25 * GIB_BYTES)


def test_a_budget_that_others_hold_is_refused_with_their_names() -> None:
    check_free(make_budget(FREE, 12 * GIB_BYTES))
    with pytest.raises(InputError, match=r"process 41 \(game\) holds 23\.0 GiB"):
        check_free(make_budget(FULL, 12 * GIB_BYTES))


def test_equal_keys_mean_comparable_trials() -> None:
    budget = make_budget(FREE, GIB_BYTES)
    sibling = Device(**{**FREE.__dict__, "index": 3, "uuid": "GPU-c", "free_bytes": GIB_BYTES})
    assert make_budget(sibling, GIB_BYTES).key() == budget.key()
    updated = Device(**{**FREE.__dict__, "driver": "6"})
    assert make_budget(updated, GIB_BYTES).key() != budget.key()
    assert make_budget(FREE, 2 * GIB_BYTES).key() != budget.key()
    assert json.loads(make_budget(CPU, GIB_BYTES).key())["name"] == "Some CPU (2 cores)"


def test_a_budget_survives_json() -> None:
    budget = make_budget(FULL, GIB_BYTES)
    assert budget_from_json(json.loads(json.dumps(budget.to_json()))) == budget


def test_child_environments() -> None:
    cpu = child_environment(Budget(CPU, 512 * MIB_BYTES))
    assert cpu["TF_CPU_ALLOCATOR_USE_BFC"] == "true"
    assert cpu["TF_CPU_BFC_MEM_LIMIT_IN_MB"] == "512"
    assert cpu["CUDA_VISIBLE_DEVICES"] == "-1"
    gpu = child_environment(Budget(FREE, GIB_BYTES))
    assert gpu["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb-2"
    assert gpu["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "TF_CPU_ALLOCATOR_USE_BFC" not in gpu


def test_a_budget_without_its_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(CPU, 512 * MIB_BYTES)
    for name, value in child_environment(budget).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TF_CPU_BFC_MEM_LIMIT_IN_MB", "1024")
    with pytest.raises(RuntimeError, match="TF_CPU_BFC_MEM_LIMIT_IN_MB='1024' instead of '512'"):
        apply_budget(budget)


APPLY = """
import sys
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES
from bertbench.memory.allocator.budget import empty_memory, apply_budget
from bertbench.hardware.discover import list_devices
from bertbench.hardware.device import make_budget
assert "tensorflow" not in sys.modules, "listing devices needs no TensorFlow"
budget = make_budget(list_devices()[-1], 64 << 20)
if {early}:
    import os, tensorflow as tf
    names = ("TF_CPU_ALLOCATOR_USE_BFC", "TF_CPU_BFC_MEM_LIMIT_IN_MB")
    values = [os.environ.pop(name) for name in names]
    tf.ones([1])
    os.environ.update(zip(names, values))
print(apply_budget(budget))
import tensorflow as tf
print(tf.config.experimental.get_memory_info("CPU:0")["current"])
"""


@pytest.mark.parametrize("early", [False, True])
def test_apply_budget_notices_an_allocator_without_limit(early: bool) -> None:
    budget = Budget(CPU, 64 * MIB_BYTES)
    result = subprocess.run(
        [sys.executable, "-c", APPLY.format(early=early)],
        env={**os.environ, **child_environment(budget)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if early:
        assert "before the budget's environment was set" in result.stderr
    else:
        # What is set aside for scalars, and nothing else, is in use.
        pieces = empty_memory(budget).small_pieces
        assert result.stdout == f"CPU:0\n{(pieces + 1) // 2 * MIN_ALLOCATION_BYTES}\n", (
            result.stderr
        )
        assert pieces * MIN_ALLOCATION_BYTES < 0.02 * budget.budget_bytes


def test_this_machine_has_a_cpu() -> None:
    cpu = list_devices()[-1]
    assert cpu.kind == "cpu"
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert "core" in cpu.name


def test_gpus_come_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory_info(handle: int) -> SimpleNamespace:
        if handle == 1:
            raise pynvml.NVMLError_NotSupported(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=100, free=60)

    def graphics(handle: int) -> list[SimpleNamespace]:
        raise pynvml.NVMLError_NoPermission(pynvml.NVML_ERROR_NO_PERMISSION)

    def capability(handle: int) -> list[int]:
        if handle == 1:
            raise pynvml.NVMLError_NotSupported(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [12, 0]

    fakes = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "550.1",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: b"Card",
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetMemoryInfo": memory_info,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=40),
            SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None),
        ],
        "nvmlDeviceGetGraphicsRunningProcesses": graphics,
        "nvmlDeviceGetCudaComputeCapability": capability,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(pynvml, name, fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second, cpu = list_devices()
    assert (first.label, first.name, first.uuid, first.driver) == (
        "gpu:0",
        "Card",
        "GPU-0",
        "550.1",
    )
    assert (first.total_bytes, first.free_bytes) == (100, 60)
    assert (first.compute_capability, second.compute_capability) == (12.0, None)
    assert [(pid, size) for pid, _, size in first.held_by] == [(os.getpid(), 40), (2**22 + 1, 0)]
    assert first.held_by[0][1] != "unknown"
    assert first.held_by[1][1] == "unknown"
    assert second.total_bytes == cpu.total_bytes  # a board with one memory for both
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [device.label for device in list_devices()] == ["gpu:1", "cpu"]


def make_cgroups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "self").write_text(own)
    return folder / "cgroup", folder / "self"


def test_cgroup_v2_limits_of_all_ancestors_bind(tmp_path: Path) -> None:
    root, own = make_cgroups(
        tmp_path,
        "0::/a/b\n",
        {
            "a/b/memory.max": "max\n",
            "a/b/memory.current": "10\n",
            "a/b/memory.events": "low 0\noom 3\noom_kill 2\n",
            "a/memory.max": "1000\n",
            "a/memory.current": "600\n",
            "a/memory.stat": "anon 1\ninactive_file 100\n",
        },
    )
    folders = memory_cgroups(root, own)
    assert folders == [root / "a/b", root / "a"]
    assert cgroup_limits(folders) == [(1000, 500)]
    (tmp_path / "vmstat").write_text("pgfault 1\noom_kill 5\n")
    counts = oom_kill_counts(folders, tmp_path / "vmstat")
    assert list(counts.values()) == [2, 5]


def test_cgroup_v1_in_a_container_whose_path_is_not_mounted(tmp_path: Path) -> None:
    root, own = make_cgroups(
        tmp_path,
        "5:cpu:/docker/x\n4:memory:/docker/x\n0::/docker/x\n",
        {
            "memory/memory.limit_in_bytes": "2048\n",
            "memory/memory.usage_in_bytes": "1024\n",
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 24\n",
            "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
        },
    )
    folders = memory_cgroups(root, own)
    assert cgroup_limits(folders) == [(2048, 1000)]
    assert list(oom_kill_counts(folders, tmp_path / "none").values()) == [4]
    (root / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_limits(folders) == []


def test_a_limit_of_a_control_group_is_the_cpu_s_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cgroup_limits", lambda _: [(1 << 28, 1 << 27)])
    cpu = list_devices()[-1]
    assert (cpu.total_bytes, cpu.free_bytes) == (1 << 28, 1 << 27)
