"""Standard input, output and error as a command finds them: closed, full, gone, or plain ASCII."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def prepare_standard_streams() -> None:
    """Make the three streams safe to use, whatever the process was started with.

    - A closed one leads to nowhere. Else the next file that is opened, a ledger for instance, would
      take its number, and TensorFlow would write its log there.
    - What the encoding does not have is written as an escape, and is no error.
    - What cannot be written to standard error is lost: messages about the work must not end it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Lossy(2, "w", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def give_up_stdout() -> None:
    """Let what is not yet written go nowhere, where an earlier write has failed."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


class _Lossy(io.FileIO):
    """A file whose writes never fail."""

    def write(self, data: Any) -> int:
        """Write, or take it as written where it cannot be."""
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)
