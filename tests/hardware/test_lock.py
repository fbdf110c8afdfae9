"""The lock of a device: met by all probes of a user, and by nobody else."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from bertbench.hardware import lock
from bertbench.hardware.device import Device
from bertbench.hardware.lock import LOCKS_VARIABLE, devices_held, locked
from finetune.errors import InputError

GPU = Device("gpu", 0, "A", "GPU-1/2", 1 << 34, 1 << 34)
CPU = Device("cpu", 0, "B", None, 1 << 34, 1 << 34)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "locks"
    monkeypatch.setenv(LOCKS_VARIABLE, str(path))
    return path


def is_locked(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_nobody_else_can_open_a_lock(folder: Path) -> None:
    """Whoever can open a file can lock it, and so keep a probe waiting."""
    folder.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        with devices_held([CPU]):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE((folder / "cpu.lock").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_lock_belongs_to_the_device(folder: Path) -> None:
    with devices_held([GPU, CPU]):
        assert (folder / "cpu.lock").read_text() == f"{os.getpid()}\n"
        assert is_locked(folder / "cpu.lock")
        assert is_locked(folder / "GPU-1_2.lock")
    assert not is_locked(folder / "cpu.lock")


def test_the_folder_does_not_depend_on_how_a_shell_was_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(LOCKS_VARIABLE)
    before = lock._lock_folder()
    for name in ("TMPDIR", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "HOME", "BERTBENCH_LEDGER"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert lock._lock_folder() == before


def test_a_folder_that_another_has_prepared_is_not_used(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    assert lock._lock_folder() is None
    folder.unlink()
    if os.geteuid() == 0:
        folder.mkdir()
        os.chown(folder, 12345, 12345)
        assert lock._lock_folder() is None


def test_a_link_in_the_place_of_a_lock_is_not_followed(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    folder.mkdir()
    (folder / "cpu.lock").symlink_to(target)
    with pytest.raises(InputError, match="cannot lock the device"), devices_held([CPU]):
        pass
    assert target.read_text() == "kept"


def test_without_a_folder_for_locks_there_is_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write_text("a file")
    with devices_held([CPU]):
        pass
    said = capsys.readouterr().err
    assert said.startswith("warning: no folder for locks can be used; ")
    assert said.count("\n") == 1


def test_a_lock_that_was_tidied_up_is_made_again(folder: Path) -> None:
    """Two probes must not hold two files of one name."""
    path = folder / "cpu.lock"
    waits, holds = threading.Event(), threading.Event()

    def second() -> None:
        with locked(path, waits.set):
            assert is_locked(path)
            holds.set()

    thread = threading.Thread(target=second)
    with locked(path, lambda: None):
        thread.start()
        assert waits.wait(60)
        path.unlink()
        path.touch()
    thread.join(60)
    assert holds.is_set()
