"""Work that was asked for rightly and failed: one line on the terminal and exit code 1."""

from __future__ import annotations

import errno
from pathlib import Path


class WorkError(RuntimeError):
    """What failed and what to do, as one line."""


class StoppedEarlyError(WorkError):
    """The user interrupted; what was done is saved. Exit code 130, as shells have it."""


class NotFiniteError(WorkError, FloatingPointError):
    """A model that gives no numbers; as with `FloatingPointError`, training does not save it."""


class OutOfMemoryError(WorkError):
    """A training step ran out of the device's memory.

    Attributes:
        step: optimizer steps that are saved, and with which the training can go on.
    """

    def __init__(self, message: str, step: int) -> None:
        """Say what happened, and how far the training is."""
        super().__init__(message)
        self.step = step


class SteppedDownError(WorkError):
    """A run has noted that it goes on with a smaller plan, in a process whose memory is whole.

    Attributes:
        output_dir: of the run, on this machine.
    """

    def __init__(self, message: str, output_dir: Path) -> None:
        """Say what is tried next, and where the run is."""
        super().__init__(message)
        self.output_dir = output_dir


_MORE_FILES = "allow more open files (`ulimit -n`)"
_HINTS = {
    errno.EMFILE: _MORE_FILES,
    errno.ENFILE: _MORE_FILES,
    errno.EAGAIN: "allow more processes (`ulimit -u`, or pids.max of the control group)",
    errno.ENOMEM: "free memory of this machine",
}


def describe_system_error(error: Exception) -> str:
    """Say in one line what the system has refused, and what to do."""
    if isinstance(error, MemoryError):
        return f"out of host memory ({error}); {_HINTS[errno.ENOMEM]}"
    if not isinstance(error, OSError):  # a thread
        return f"{error}; {_HINTS[errno.EAGAIN]}"
    where = "" if error.filename is None else f"{error.filename}: "
    hint = _HINTS.get(error.errno or 0, "choose another place, or make room there")
    if "temporary directory" in str(error.strerror):  # `tempfile` hides why none can be written
        hint = f"name a folder with room with TMPDIR, or {_MORE_FILES}"
    elif error.errno == errno.ENOENT and error.filename is None:
        hint = "change to a folder that is there"
    return f"{where}{error.strerror or error}; {hint}"
