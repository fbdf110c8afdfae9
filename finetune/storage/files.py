"""Files that appear complete or not at all, and files that are read up to a bound."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from finetune.errors import InputError

GIB_BYTES = 1 << 30
DATA_LIMIT_BYTES = 4 * GIB_BYTES
"""No file that is read as a whole may be larger, unless it says so."""

_BLOCK_BYTES = 1 << 20

_TEMPORARY = re.compile(r"\.(.+)\.(?:[0-9]+|[0-9a-f]{16})\.tmp")
"""Names of the hidden files; those with a process's number are of earlier versions."""


def read_bytes(path: str | os.PathLike[str], *, limit_bytes: int = DATA_LIMIT_BYTES) -> bytes:
    """Read a file, or a pipe, that may be of any size.

    Args:
        path: the file.
        limit_bytes: largest size that is read; an endless file such as `/dev/zero` ends there too.

    Raises:
        InputError: it is larger.
        OSError: it cannot be read.
    """
    blocks, left = [], limit_bytes
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            blocks.append(block)
            left -= len(block)
            if left < 0:
                raise InputError(
                    f"larger than {limit_bytes:,} bytes, which is more than is read", path=path
                )
    return b"".join(blocks)


def decode_utf8(data: bytes, path: str | os.PathLike[str], *, hint: str) -> str:
    """Decode what was read of a file.

    Args:
        data: the content.
        path: the file, for the message.
        hint: what to do if it is not UTF-8.

    Raises:
        InputError: it is not; says in which line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"not UTF-8 text ({error.reason})", path=path, line=line, hint=hint
        ) from error


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that a reader, or a power cut, meets the old content or the new.

    The content goes to a hidden file in the same folder, is flushed to the disk, and then takes the
    name. Nobody can know the hidden file's name before, and no link is followed to it. A new file
    gets the mode that the user's umask gives to new files, one that is replaced keeps its own.

    Args:
        path: the file; one that is there is replaced. A symbolic link stays, and leads to the new
            content; into what is no regular file, a pipe or a device, the content is written.
        content: text is written as UTF-8, with line ends as they are, and half a surrogate pair, as
            in a file name that is not UTF-8, as an escape.

    Raises:
        OSError: the folder is missing or cannot be written to, or the disk is full. Then the old
            file is as it was, and nothing else is left behind.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    target = Path(path)
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            stream.write(data)
        return
    if target.is_symlink():
        target = target.resolve()
    # A part of the name will do: a file system has a longest one.
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")
    made = False
    try:
        descriptor = _create(temporary, target)
        made = True
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        if made:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            # The hidden file would mean nothing to the user.
            error.filename = str(target)
        raise


def _create(temporary: Path, target: Path) -> int:
    """Make a file that was not there, with the mode of the one that it is to replace."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if not target.exists():
        return os.open(temporary, flags, 0o666)
    mode = stat.S_IMODE(target.stat().st_mode) & 0o777
    descriptor = os.open(temporary, flags, mode)
    # Some file systems know no modes; elsewhere the umask may have taken something away.
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, mode)
    return descriptor


def remove_temporaries(folder: Path, patterns: Collection[str]) -> None:
    """Remove what killed processes have left of writing some files of a folder.

    Args:
        folder: it need not exist. The caller sees to it that nobody else writes to it now.
        patterns: of the files' names.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and any(fnmatchcase(match[1], pattern) for pattern in patterns):
            path.unlink(missing_ok=True)
