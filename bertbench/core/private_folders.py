"""Where bertbench keeps what is the user's: folders that nobody else can enter."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
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


def state_folder() -> Path | None:
    """`bertbench` in the user's folder for such state.

    Who has no home, as in some containers, has `user_temporary_folder()`; None without that.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification has relative paths ignored.
    if sys.platform != "darwin" and os.path.isabs(state):
        return Path(state) / "bertbench"
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry for the user
        folder = user_temporary_folder()
        return folder if is_private(folder) else None
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "bertbench"
    return home / ".local" / "state" / "bertbench"
