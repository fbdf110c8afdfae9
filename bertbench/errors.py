"""Work that was asked for rightly and failed: one line on the terminal and exit code 1."""

from __future__ import annotations

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
