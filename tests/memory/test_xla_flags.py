"""XLA saves no memory by itself; what else a user has told it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertbench.core.units import GIB_BYTES
from bertbench.hardware.device import Budget, Device
from bertbench.memory.allocator.budget import child_environment
from bertbench.memory.allocator.xla_flags import without_rematerialization
from finetune.errors import InputError

OFF = "--xla_disable_hlo_passes=rematerialization"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", OFF),
        ("--xla_gpu_cuda_data_dir='/a  b' --x=1", f"--xla_gpu_cuda_data_dir='/a  b' --x=1 {OFF}"),
        ("--xla_disable_hlo_passes=fusion", "--xla_disable_hlo_passes=fusion,rematerialization"),
        # XLA takes the last one.
        (f"{OFF} --xla_disable_hlo_passes=cse", "--xla_disable_hlo_passes=cse,rematerialization"),
        (f"{OFF} --x=1", f"{OFF} --x=1"),
        # Another pass, with a longer name.
        (f"{OFF}-x", f"{OFF}-x,rematerialization"),
    ],
)
def test_rematerialization_is_off_and_other_flags_stay(flags: str, expected: str) -> None:
    assert without_rematerialization(flags) == expected
    assert without_rematerialization(expected) == expected


def test_flags_in_a_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "flags.txt"
    path.write_text("--x=1\n--y=2\n")
    assert without_rematerialization(f" {path} ") == f"--x=1\n--y=2 {OFF}"
    with pytest.raises(InputError, match="XLA_FLAGS names a file"):
        without_rematerialization(str(tmp_path / "none"))


def test_a_process_on_a_gpu_has_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--x=1")
    gpu = Device("gpu", 0, "a GPU", "GPU-1", 8 * GIB_BYTES, 8 * GIB_BYTES)
    environment = child_environment(Budget(gpu, GIB_BYTES))
    assert environment["XLA_FLAGS"] == f"--x=1 {OFF}"
    # The process itself checks that its environment is that of its budget.
    monkeypatch.setenv("XLA_FLAGS", environment["XLA_FLAGS"])
    assert child_environment(Budget(gpu, GIB_BYTES)) == environment
