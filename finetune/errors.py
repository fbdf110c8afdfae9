"""Errors that a user can correct: one line on the terminal and exit code 2."""

from __future__ import annotations

import os


class InputError(ValueError):
    """Wrong input from the user: a flag, a file or a value.

    The message is one line that says what is wrong, where (file, and line where there is one),
    and what to do about it. Command-line entry points print it and exit with code 2.
    """

    def __init__(
        self,
        what: str,
        *,
        path: str | os.PathLike[str] | None = None,
        line: int | None = None,
        hint: str = "",
    ) -> None:
        """Compose the message `path:line: what; hint` from the parts that are known.

        Args:
            what: what is wrong, without a trailing full stop.
            path: the file that is wrong.
            line: its line, counted from 1.
            hint: what to do.
        """
        where = "" if path is None else f"{os.fspath(path)}:{'' if line is None else f'{line}:'} "
        super().__init__(f"{where}{what}{f'; {hint}' if hint else ''}".replace("\n", " "))


class DamagedFileError(InputError):
    """A file exists but cannot be read; an older file may be used instead of it."""
