"""Errors of work that failed although the input was right: one line, exit code 1."""

from __future__ import annotations

import errno
from pathlib import Path


class WorkError(RuntimeError):
    """Work failed. The message says in one line what failed and what to do."""


class StoppedEarlyError(WorkError):
    """The user interrupted, and what was done is saved. Exit code 130, as in shells."""


class NotFiniteError(WorkError, FloatingPointError):
    """The loss or a gradient is NaN or infinite; training does not save such a model."""


class OutOfMemoryError(WorkError):
    """A training step ran out of memory.

    Attributes:
        step: number of optimizer steps in the newest checkpoint, from which training can continue.
        of_device: the device's own allocator had no memory left. Otherwise the host's memory ran
            out, which says nothing about what fits on the device.
    """

    def __init__(self, message: str, step: int, *, of_device: bool = True) -> None:
        """Keep the message, the number of saved steps, and whose memory it was."""
        super().__init__(message)
        self.step = step
        self.of_device = of_device


class SteppedDownError(WorkError):
    """A run ran out of memory, and has saved a smaller plan for a fresh process to continue with.

    Attributes:
        output_dir: the run's output folder on this machine.
    """

    def __init__(self, message: str, output_dir: Path) -> None:
        """Keep the message and the run's output folder."""
        super().__init__(message)
        self.output_dir = output_dir


_ALLOW_FILES = "allow more open files (`ulimit -n`)"
_HINTS = {
    errno.EMFILE: _ALLOW_FILES,
    errno.ENFILE: _ALLOW_FILES,
    errno.EAGAIN: "allow more processes (`ulimit -u`, or pids.max of the control group)",
    errno.ENOMEM: "free memory of this machine",
}


def describe_system_error(error: Exception) -> str:
    """Describe in one line what the operating system refused, and what to do."""
    if isinstance(error, MemoryError):
        return f"out of host memory ({error}); {_HINTS[errno.ENOMEM]}"
    if not isinstance(error, OSError):  # a thread could not be started
        return f"{error}; {_HINTS[errno.EAGAIN]}"
    where = "" if error.filename is None else f"{error.filename}: "
    hint = _HINTS.get(error.errno or 0, "choose another folder, or free space in this one")
    if "temporary directory" in str(error.strerror):  # `tempfile` hides why none can be written
        hint = f"set TMPDIR to a folder with free space, or {_ALLOW_FILES}"
    elif error.errno == errno.ENOENT and error.filename is None:
        hint = "change to a folder that exists"
    return f"{where}{error.strerror or error}; {hint}"
