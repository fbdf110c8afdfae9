"""Folders that only this user can enter."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def user_temporary_folder() -> Path:
    """The user's folder for what all of the user's processes on this machine share.

    Neither `TMPDIR` nor `XDG_RUNTIME_DIR` names it, which depend on how a shell was started. It
    may be missing, and another user may have made one of this name: see `is_private`.
    """
    return Path(f"/tmp/bertbench-{os.geteuid()}")


def is_private(folder: Path) -> bool:
    """Make a folder if it is not there; whether it is this user's alone and can be used."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
