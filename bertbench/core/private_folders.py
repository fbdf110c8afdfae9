"""Folders of one user: for state, and for locks, which nobody else may enter."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path


def user_temporary_folder() -> Path:
    """Return the folder that all processes of this user on this machine share.

    It does not depend on `TMPDIR` or `XDG_RUNTIME_DIR`, whose values differ between shells. It may
    be missing, and another user may have made a folder of this name: see `is_private`.
    """
    return Path(f"/tmp/bertbench-{os.geteuid()}")


def is_private(folder: Path) -> bool:
    """Make a folder if it is missing; return whether it is usable and this user's alone."""
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


def state_folder() -> Path | None:
    """Return the folder for state: `bertbench` inside the user's state folder.

    A user without a home folder, as in some containers, gets `user_temporary_folder()`.

    Returns:
        The folder, which may be missing; None if there is neither a home folder nor a private
        temporary folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification says to ignore relative paths.
    if sys.platform != "darwin" and os.path.isabs(state):
        return Path(state) / "bertbench"
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        folder = user_temporary_folder()
        return folder if is_private(folder) else None
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "bertbench"
    return home / ".local" / "state" / "bertbench"
