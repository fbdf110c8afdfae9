"""A folder that is held open while it is written to, so that no other folder is mistaken for it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_LOST = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class FolderLostError(OSError):
    """A folder was deleted, renamed or replaced while it was written to."""


@dataclasses.dataclass(frozen=True)
class HeldFolder:
    """A folder that is kept open.

    Attributes:
        path: path by which the folder was opened.
        descriptor: file descriptor of the open folder.
    """

    path: Path
    descriptor: int

    def check(self) -> None:
        """Check that the path still leads to the folder.

        Raises:
            FolderLostError: the path does not, so files written to it would be lost, or would
                create another folder.
            OSError: the path cannot be looked up, for example because the disk has failed.
        """
        if not leads_to(self.path, self.descriptor):
            what = "was replaced by another" if os.path.lexists(self.path) else "is gone"
            raise FolderLostError(f"the folder {self.path} {what}{self._moved_to()}")

    def _moved_to(self) -> str:
        """Return where the folder is now, for the message, if the system tells."""
        try:
            name = os.readlink(f"/proc/self/fd/{self.descriptor}")
        except OSError:
            return ""
        return "" if name.endswith(" (deleted)") else f"; it was renamed to {name}"


@contextlib.contextmanager
def held_folder(path: Path) -> Iterator[HeldFolder]:
    """Hold a folder open during a `with` statement.

    Raises:
        OSError: the folder cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield HeldFolder(path, descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; return False if another process holds it.

    A file system without locks, such as some network file systems, behaves as if nobody else had
    locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def leads_to(path: Path, descriptor: int) -> bool:
    """Return whether a path leads to an open file or folder.

    Raises:
        OSError: the path cannot be looked up, for example because the disk has failed.
    """
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError as error:
        if error.errno not in _LOST:
            raise
        return False
