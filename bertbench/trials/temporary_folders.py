"""Temporary folders that do not stay when their process is killed: a later one removes them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "bertbench-work-"
"""How the name of such a folder begins, and nothing else's: abandoned ones are deleted."""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder in the place for temporary files; it is removed with the block.

    The folder is locked as long as its process lives, so a folder that is not locked was left
    behind. A process number would not tell that: containers that share the place number their
    processes independently.

    Raises:
        OSError: there is no place for temporary files, or no room in it.
    """
    remove_abandoned(tempfile.gettempdir())
    path, descriptor = _make()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


@functools.cache  # once for a process: what others leave meanwhile is for the next one
def remove_abandoned(parent: str) -> None:
    """Remove this user's temporary folders whose processes have ended."""
    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(PREFIX)]
    except OSError:
        return
    for name in names:
        path = os.path.join(parent, name)
        # An error means: it is in use, another user's, no folder, or the file system has no locks.
        with contextlib.suppress(OSError):
            descriptor = _open(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _make() -> tuple[Path, int]:
    """Make a folder and lock it; return it with the descriptor that holds the lock."""
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX)
        # Another process that tidies up may take it for abandoned until it is locked.
        with contextlib.suppress(FileNotFoundError):
            descriptor = _open(path)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.exists(path):
                return Path(path), descriptor
            os.close(descriptor)


def _open(path: str) -> int:
    """Open a folder of this user, and nothing that a link leads to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(f"{path} belongs to another user")
    return descriptor
