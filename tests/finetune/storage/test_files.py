"""Tests of finetune.storage.files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from finetune.storage.files import remove_temporaries, write_atomically


def test_writes_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "é\r\none\n")
    assert path.read_bytes() == "é\r\none\n".encode()
    write_atomically(str(path), "")
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, path = tmp_path / "link", tmp_path / "folder" / "a.txt"
    link.symlink_to(path)
    for content in ("first", "second"):
        write_atomically(link, content)
        assert link.is_symlink()
        assert path.read_text() == content
    assert os.listdir(path.parent) == ["a.txt"]


def test_what_is_no_regular_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_flushed_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    calls = []
    flush, replace = os.fsync, os.replace

    def record_flush(descriptor: int) -> None:
        calls.append(("flush", os.fstat(descriptor).st_size, path.read_text()))
        flush(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append(("replace", source.parent == target.parent, path.read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(path, "new!")
    assert calls == [("flush", 4, "old"), ("replace", True, "old")]
    assert path.read_text() == "new!"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "a.txt", "x")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_mode_is_that_of_new_files(tmp_path: Path, umask: int, mode: int) -> None:
    previous = os.umask(umask)
    try:
        write_atomically(tmp_path / "a.txt", "x")
    finally:
        os.umask(previous)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == mode


def test_what_lies_under_the_hidden_name_is_never_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who could guess the name would lay a link there, to another file of the user."""
    other = tmp_path / "other"
    other.write_text("of somebody else")
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr("secrets.token_hex", lambda size: next(tokens))
    (tmp_path / f".a.txt.{'0' * 16}.tmp").symlink_to(other)
    (tmp_path / f".a.txt.{os.getpid()}.tmp").symlink_to(other)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a.txt", "new")
    write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert other.read_text() == "of somebody else"
    assert len([path for path in tmp_path.iterdir() if path.is_symlink()]) == 2


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        write_atomically(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name


def test_remains_of_killed_processes_go_and_nothing_else(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    gone = [".a.txt.4711.tmp", f".a.txt.{token}.tmp", f".checkpoint.{token}.tmp"]
    kept = [
        "a.txt", ".a.txt.swp.tmp", ".a.txt.tmp", f".b.txt.{token}.tmp", f"a.txt.{token}.tmp",
        ".a.txt.47x.tmp",
    ]  # fmt: skip
    for name in gone + kept:
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path, ["a.txt", "checkpoint"])
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    remove_temporaries(tmp_path / "nowhere", ["a.txt"])
