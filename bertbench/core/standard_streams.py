"""Standard input, output and error, which may be closed, full, or limited to ASCII."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def prepare_standard_streams() -> None:
    """Make the three streams safe to use, however the process was started.

    - A closed stream is connected to /dev/null. Otherwise the next file that is opened, such as the
      ledger, would get its number, and TensorFlow would write its log into that file.
    - A character that the encoding does not have is written as an escape instead of raising.
    - A failed write to standard error is ignored: a message about the work must not end the work.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The system assigns the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_NeverFailingFile(2, "w", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def give_up_stdout() -> None:
    """Connect standard output to /dev/null after a write to it has failed."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


class _NeverFailingFile(io.FileIO):
    """A file whose writes never fail."""

    def write(self, data: Any) -> int:
        """Write; if that fails, report the data as written."""
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)
