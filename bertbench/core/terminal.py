"""Output to the terminal, with control characters written as escapes.

Names, labels and messages come from files and from the command line. An escape sequence in them
could set the terminal's title or its clipboard. A character that reverses the direction of text
could make a name look like another one.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import click
from rich.console import Console
from rich.text import Text

_CONTROL_CODES = [
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    0x2028, 0x2029,  # ends of lines and paragraphs
    *range(0x202A, 0x202F), *range(0x2066, 0x206A),  # direction of text
    *range(0xD800, 0xE000),  # surrogates, as in a file name that is not UTF-8
    0xFEFF,
]  # fmt: skip
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROL_CODES}


def clean_text(text: str) -> str:
    r"""Replace control characters by Python's escapes such as `\x1b`; line ends and tabs stay."""
    return text.translate(_ESCAPES)


def echo(text: str, *, nl: bool = True) -> None:
    """Write a result to standard output."""
    click.echo(clean_text(text), nl=nl)


def say(text: str) -> None:
    """Write a message as a line to standard error."""
    print(clean_text(text), file=sys.stderr, flush=True)


class PlainConsole(Console):
    """A console that prints text without markup, as names may have brackets and colons in them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Clean every string that is printed, also those in tables."""
        return super().render_str(clean_text(text), **options)


def terminal() -> Console:
    """Return a console for results: as wide as the terminal, or 80 columns in a pipe."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=80)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return clean_text(super().format(record))


def clean_warnings() -> None:
    """Escape control characters in warnings of libraries, where no logging is configured."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PlainFormatter())
