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
"""Default of the largest file that is read as a whole."""

_BLOCK_BYTES = 1 << 20

_TEMPORARY = re.compile(r"\.(.+)\.(?:[0-9]+|[0-9a-f]{16})\.tmp")
"""Names of the hidden files; earlier versions put the number of a process into them."""


def read_bytes(path: str | os.PathLike[str], *, limit_bytes: int = DATA_LIMIT_BYTES) -> bytes:
    """Read a file, or a pipe, that may be of any size.

    Args:
        path: the file.
        limit_bytes: most bytes that are read, also of an endless file such as `/dev/zero`.

    Raises:
        InputError: the file is larger.
        OSError: the file cannot be read.
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
    """Decode the content of a file.

    Args:
        data: the content.
        path: the file, for the message.
        hint: what the user should do if the content is not UTF-8.

    Raises:
        InputError: the content is not UTF-8; the message names the line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"not UTF-8 text ({error.reason})", path=path, line=line, hint=hint
        ) from error


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that readers see the old content or the new, also after a power cut.

    The content is written to a hidden file in the same folder and flushed to the disk. Then the
    hidden file gets the file's name. Nobody can know the hidden file's name in advance, and no link
    is followed to it. A new file gets the mode that the user's umask gives to new files. A file
    that is replaced keeps its mode.

    Args:
        path: the file; an existing one is replaced. A symbolic link is kept, and leads to the new
            content. If the path is a pipe or a device, the content is written into it.
        content: text is written as UTF-8, with its line ends unchanged. Half a surrogate pair, as
            in a file name that is not UTF-8, is written as an escape.

    Raises:
        OSError: the folder is missing or cannot be written to, or the disk is full. The old file
            is then unchanged, and no hidden file is left.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    target = Path(path)
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            stream.write(data)
        return
    if target.is_symlink():
        target = target.resolve()
    # Only a part of the name, because file systems limit the length of names.
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
            # The user does not know the hidden file.
            error.filename = str(target)
        raise


def _create(temporary: Path, target: Path) -> int:
    """Create a file, with the mode of the one that it is to replace; refuse an existing one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if not target.exists():
        return os.open(temporary, flags, 0o666)
    mode = stat.S_IMODE(target.stat().st_mode) & 0o777
    descriptor = os.open(temporary, flags, mode)
    # The umask may have removed bits of the mode. Some file systems have no modes.
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, mode)
    return descriptor


def remove_temporaries(folder: Path, patterns: Collection[str]) -> None:
    """Remove the hidden files that killed processes have left while they wrote some files.

    Args:
        folder: the folder, which need not exist. Nobody else may write to it now.
        patterns: patterns of the names of the files that were to be written.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and any(fnmatchcase(match[1], pattern) for pattern in patterns):
            path.unlink(missing_ok=True)
