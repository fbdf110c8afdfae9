"""Tests of finetune.storage.folders."""

from __future__ import annotations

import errno
import fcntl
import shutil
from pathlib import Path

import pytest

from finetune.storage.folders import FolderLostError, held_folder, leads_to, try_lock


def test_a_folder_that_stays(tmp_path: Path) -> None:
    folder, link = tmp_path / "out", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for path in (folder, link):
        with held_folder(path) as held:
            (folder / "file").write_text("")
            held.check()
    with pytest.raises(OSError, match="nowhere"), held_folder(tmp_path / "nowhere"):
        pass
    with pytest.raises(OSError, match="file"), held_folder(folder / "file"):
        pass


def test_a_folder_that_is_lost(tmp_path: Path) -> None:
    folder, aside = tmp_path / "a" / "out", tmp_path / "a" / "aside"
    folder.mkdir(parents=True)
    with held_folder(folder) as held:
        folder.rename(aside)
        with pytest.raises(FolderLostError, match=rf"{folder} is gone; .* to {aside}$"):
            held.check()
        folder.mkdir()
        with pytest.raises(FolderLostError, match=rf"replaced by another; .* to {aside}$"):
            held.check()
        folder.rmdir()
        folder.write_text("a file")
        with pytest.raises(FolderLostError, match="replaced by another"):
            held.check()
        folder.unlink()
        aside.rename(folder)
        held.check()
        shutil.rmtree(folder.parent)
        with pytest.raises(FolderLostError, match=rf"{folder} is gone$"):
            held.check()
        folder.parent.write_text("a file above")
        with pytest.raises(FolderLostError, match="is gone"):
            held.check()


def test_a_link_that_leads_elsewhere(tmp_path: Path) -> None:
    one, other, link = tmp_path / "one", tmp_path / "other", tmp_path / "link"
    one.mkdir(), other.mkdir()
    link.symlink_to(one)
    with held_folder(link) as held:
        assert leads_to(one, held.descriptor)
        assert not leads_to(other, held.descriptor)
        link.unlink()
        link.symlink_to(other)
        with pytest.raises(FolderLostError, match="replaced by another"):
            held.check()


def test_a_lock_is_of_one_process_and_where_there_are_none_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_folder(tmp_path) as first:
        assert try_lock(first.descriptor)
        with held_folder(tmp_path) as second:
            assert not try_lock(second.descriptor)
    with held_folder(tmp_path) as again:
        assert try_lock(again.descriptor)

    def without_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with held_folder(tmp_path) as held:
        assert try_lock(held.descriptor)
