"""A folder that is held while it is written to, so that no other is taken for it."""

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
        path: where it was found.
        descriptor: of the open folder.
    """

    path: Path
    descriptor: int

    def check(self) -> None:
        """See that the path still leads to the folder.

        Raises:
            FolderLostError: it does not, so what is written to the path would be lost, or would
                make another folder.
            OSError: that cannot be told, as when a disk has failed.
        """
        if not leads_to(self.path, self.descriptor):
            what = "was replaced by another" if os.path.lexists(self.path) else "is gone"
            raise FolderLostError(f"the folder {self.path} {what}{self._moved_to()}")

    def _moved_to(self) -> str:
        """Where the folder is, for the message, if the system tells."""
        try:
            name = os.readlink(f"/proc/self/fd/{self.descriptor}")
        except OSError:
            return ""
        return "" if name.endswith(" (deleted)") else f"; it was renamed to {name}"


@contextlib.contextmanager
def held_folder(path: Path) -> Iterator[HeldFolder]:
    """Hold a folder in the block.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield HeldFolder(path, descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; False if another process has locked it.

    On a file system without locks, as some of a network are, it is as if nobody else were there.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether a path leads to an open file or folder.

    Raises:
        OSError: that cannot be told, as when a disk has failed.
    """
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError as error:
        if error.errno not in _LOST:
            raise
        return False
