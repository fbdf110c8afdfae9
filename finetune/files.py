"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that a reader, or a power cut, meets the old content or the new.

    The content goes to a hidden file in the same folder, is flushed to the disk, and then takes the
    name. The file gets the mode that the user's umask gives to new files.

    Args:
        path: the file; one that is there is replaced. A symbolic link stays, and leads to the new
            content; into what is no regular file, a pipe or a device, the content is written.
        content: text is written as UTF-8, with line ends as they are.

    Raises:
        OSError: the folder is missing or cannot be written to, or the disk is full. Then the old
            file is as it was, and nothing else is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(path)
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            stream.write(data)
        return
    if target.is_symlink():
        target = target.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            # The hidden file would mean nothing to the user.
            error.filename = str(target)
        raise
