"""Options and output that several verbs share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from bertbench.core.terminal import echo
from bertbench.core.units import parse_bytes
from bertbench.core.workload import MAX_BATCH, Levers
from bertbench.hardware.device import Budget, make_budget
from bertbench.hardware.discover import resolve_devices
from finetune.errors import InputError
from finetune.spec.optimizers import OPTIMIZERS, PLACEMENTS
from finetune.spec.precisions import PRECISIONS
from finetune.storage.files import write_atomically
from finetune.storage.json_files import json_text

CONTEXT = {
    # The original's flags have underscores; both spellings are one flag.
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 80,
}

CONTINUE_VARIABLE = "BERTBENCH_CONTINUE_IN"
"""Environment variable for a process that continues a run: the run's output folder."""

MAX_COUNT = 2**31 - 1
"""Largest number of steps, tokens or examples that a flag accepts."""

MAX_SECONDS = 1e7
"""Longest time that a flag accepts: four months."""

MAX_SEED = 2**63 - 1
"""Largest seed that a flag accepts."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


class MemorySize(click.ParamType):
    """A memory size such as 12GiB; its value is in bytes."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Parse the text."""
        return value if isinstance(value, int) else parse_bytes(str(value))


class PathName(click.Path):
    """A file or folder by its name; an empty one, which Python takes for `.`, is refused."""

    def __init__(self, *, exists: bool = False, file_okay: bool = True, dir_okay: bool = True):
        super().__init__(exists=exists, file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the name."""
        if value == "":
            self.fail("an empty name is no file and no folder.", param, ctx)
        return super().convert(value, param, ctx)


class Whole(click.IntRange):
    """An integer within bounds; help shows only the lower one, because the upper one is huge."""

    def __init__(self, least: int, most: int = MAX_COUNT) -> None:
        super().__init__(least)
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse and check."""
        number: int = super().convert(value, param, ctx)
        if number > self._most:
            self.fail(f"{str(number)[:40]} is more than {self._most:,}.", param, ctx)
        return number


class Number(click.types.FloatParamType):
    """A number without bounds; not NaN, and finite unless `infinite` is set."""

    def __init__(self, *, infinite: bool = False) -> None:
        self.infinite = infinite

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse and check."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value} is not a {'' if self.infinite else 'finite '}number.", param, ctx)
        return number


class FiniteFloat(click.FloatRange):
    """A finite number in a range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse and check."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


BATCH = Whole(1, MAX_BATCH)
"""Type of flags for a number of examples."""

REPLICAS = Whole(1, 4096)
"""Type of flags for a number of devices that share a batch; a TPU v3 pod has 2,048 cores."""


def device_options(command: _Command) -> _Command:
    """Add `--device` and `--memory`."""
    command = click.option(
        "--memory",
        type=MemorySize(),
        help="Memory that the allocator may use, as in 12GiB. Default: what is free.",
    )(command)
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto, gpu:N, gpu:UUID or cpu; several GPUs, as in gpu:0,gpu:1, share the batch.",
    )(command)


def json_option(command: _Command) -> _Command:
    """Add `--json FILE`."""
    return click.option(
        "--json",
        "json_file",
        type=PathName(dir_okay=False),
        help="Also write the result as JSON to this file; - prints only the JSON.",
    )(command)


def ledger_option(command: _Command) -> _Command:
    """Add `--ledger FILE`."""
    return click.option(
        "--ledger",
        "ledger_file",
        type=PathName(dir_okay=False),
        help="File with the record of all trials. Default: the user's ledger.",
    )(command)


def lever_options(command: _Command) -> _Command:
    """Add `--precision`, `--optimizer`, `--placement`, `--xla` and `--allow`.

    See `allowed_levers`.
    """
    options = [
        click.option("--precision", type=click.Choice(PRECISIONS), help="Use this precision only."),
        click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="Use this optimizer only."),
        click.option(
            "--placement",
            type=click.Choice(PLACEMENTS),
            help="Keep the optimizer's state here only. Default: on the device, and in the host's "
            "memory for a GPU on which nothing else fits.",
        ),
        click.option(
            "--xla", is_flag=True, help="Compile the step with XLA, as a TPU always does."
        ),
        click.option(
            "--allow",
            help="Levers that change the update, and that a plan may use where they are faster: "
            f"{', '.join(_INEXACT)}.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


# The first precision and the first optimizer are those of the published recipe.
_INEXACT = (*PRECISIONS[1:], *OPTIMIZERS[1:])


def allowed_levers(
    precision: str | None,
    optimizer: str | None,
    placement: str | None,
    allow: str | None,
    *,
    xla: bool = False,
) -> tuple[Levers, ...]:
    """Return the levers that a plan may choose from, exact ones first.

    Args:
        precision: value of `--precision`.
        optimizer: value of `--optimizer`.
        placement: value of `--placement`.
        allow: value of `--allow`: names of inexact precisions and optimizers, with commas.
        xla: whether `--xla` is given.

    Raises:
        InputError: `--allow` names no such lever, or does not go with another flag.
    """
    names = [item.strip().lower() for item in (allow or "").split(",") if item.strip()]

    def choices(flag: str, known: tuple[str, ...], only: str | None) -> list[str]:
        allowed = [name for name in names if name in known[1:]]
        if only is not None and allowed:
            raise InputError(
                f"{flag} and --allow {allowed[0]} do not go together", hint="give one of them"
            )
        return [only or known[0], *allowed]

    precisions = choices("--precision", PRECISIONS, precision)
    optimizers = choices("--optimizer", OPTIMIZERS, optimizer)
    for name in names:
        if name not in _INEXACT:
            raise InputError(f"--allow {name}: no such lever", hint=f"use {', '.join(_INEXACT)}")
    return tuple(
        Levers(precision=p, optimizer=o, xla=xla, placement=placement or PLACEMENTS[0])
        for p in precisions
        for o in optimizers
    )


def given_flags(context: click.Context, but: Collection[str]) -> Iterator[str]:
    """Yield the flags that were given on the command line, without those of some parameters."""
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in but:
            yield parameter.opts[0].replace("_", "-")


def resolve_budget(device: str, memory: int | None) -> Budget:
    """Return the budget that `--device` and `--memory` name; several GPUs share a batch.

    Raises:
        InputError: there is no such device, it has less memory, or it is a TPU, which other flags
            name.
    """
    resolved = resolve_devices(device)
    if resolved.tpu is not None:
        raise InputError(
            f"--device {device} is for `bertbench probe`",
            hint="`bertbench run` takes --use_tpu and --tpu_name",
        )
    return make_budget(resolved, memory)


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON to a file, or to standard output for `-`."""
    text = json_text(values, indent=1) + "\n"
    if str(path) == "-":
        echo(text, nl=False)
    else:
        write_atomically(path, text)
