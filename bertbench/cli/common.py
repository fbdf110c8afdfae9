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
from finetune.errors import InputError
from finetune.files import write_atomically
from finetune.optimizers import EXACT_OPTIMIZER, OPTIMIZERS

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


def optimizer_options(command: _Command) -> _Command:
    """Add `--optimizer` and `--allow`; `choose_optimizers` reads them."""
    command = click.option(
        "--allow",
        help="Levers that change the update and that a plan may use where they make it faster or "
        f"make it fit: {', '.join(INEXACT)}.",
    )(command)
    return click.option(
        "--optimizer", type=click.Choice(OPTIMIZERS), help="Insist on an optimizer."
    )(command)


INEXACT = tuple(name for name in OPTIMIZERS if name != EXACT_OPTIMIZER)
"""Levers that `--allow` takes."""


def choose_optimizers(optimizer: str | None, allow: str | None) -> tuple[str, ...]:
    """Optimizers that a plan may choose from, by `--optimizer` and `--allow`.

    Raises:
        InputError: `--allow` names something else, or both are given.
    """
    allowed = [item.strip().lower() for item in (allow or "").split(",") if item.strip()]
    for item in allowed:
        if item not in INEXACT:
            raise InputError(
                f"--allow {item}: no such lever", hint=f"it takes {', '.join(INEXACT)}"
            )
    if optimizer is None:
        return (EXACT_OPTIMIZER, *allowed)
    if allowed:
        raise InputError("--optimizer and --allow do not go together", hint="give one of them")
    return (optimizer,)


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
