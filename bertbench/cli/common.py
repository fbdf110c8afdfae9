"""Options and output that several verbs share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from bertbench.bytes import parse_bytes
from bertbench.devices import Budget, make_budget, resolve_device
from finetune.files import write_atomically

CONTEXT = {
    # The original's flags have underscores; both spellings are one flag.
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 80,
}

_Command = TypeVar("_Command", bound=Callable[..., Any])


class MemorySize(click.ParamType):
    """A memory size such as 12GiB, as bytes."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Parse text; the error names the flag through `InputError`."""
        return value if isinstance(value, int) else parse_bytes(str(value))


def device_options(command: _Command) -> _Command:
    """Add `--device` and `--memory`."""
    command = click.option(
        "--memory",
        type=MemorySize(),
        help="Bytes the allocator may use, as in 12GiB. Default: what is free.",
    )(command)
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto, gpu:N, gpu:UUID or cpu.",
    )(command)


def json_option(command: _Command) -> _Command:
    """Add `--json FILE`."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the result here too (- for standard output instead).",
    )(command)


def resolve_budget(device: str, memory: int | None) -> Budget:
    """Device and bytes that the options name.

    Raises:
        InputError: no such device, or more than it has.
    """
    return make_budget(resolve_device(device), memory)


def write_json(path: Path, values: Any) -> None:
    """Write a result file, or standard output for `-`."""
    text = json.dumps(values, indent=1) + "\n"
    if str(path) == "-":
        click.echo(text, nl=False)
    else:
        write_atomically(path, text)


def terminal() -> Console:
    """Console for results: the terminal's width there, 80 plain columns in a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=80)
