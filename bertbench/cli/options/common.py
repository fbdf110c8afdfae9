"""Options and output that several verbs share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from bertbench.core.terminal import echo
from bertbench.core.units import parse_bytes
from bertbench.core.workload import MOST_BATCH, Levers
from bertbench.devices.device import Budget, make_budget
from bertbench.devices.discover import resolve_devices
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

GO_ON_VARIABLE = "BERTBENCH_GO_ON_IN"
"""Set for a process that goes on with an interrupted run; names the run's output folder."""

MOST_COUNT = 2**31 - 1
"""Largest number of steps, tokens or examples that a flag may name."""

MOST_SECONDS = 1e7
"""Longest time that a flag may name: four months."""

MOST_SEED = 2**63 - 1

_Command = TypeVar("_Command", bound=Callable[..., Any])


class MemorySize(click.ParamType):
    """A memory size such as 12GiB, as bytes."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Parse text; the error names the flag through `InputError`."""
        return value if isinstance(value, int) else parse_bytes(str(value))


class Whole(click.IntRange):
    """An integer within bounds; help shows only the lower one, as no work comes near the other."""

    def __init__(self, least: int, most: int = MOST_COUNT) -> None:
        super().__init__(least)
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse and check."""
        number: int = super().convert(value, param, ctx)
        if number > self._most:
            self.fail(f"{str(number)[:40]} is more than {self._most:,}.", param, ctx)
        return number


class Number(click.types.FloatParamType):
    """A number without bounds.

    NaN, which compares with nothing, is refused, and unless `infinite` says so what is not finite.
    """

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
    """A number in a range, neither infinite nor not a number."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse and check."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


BATCH = Whole(1, MOST_BATCH)
"""Examples of an effective batch, or of what is computed at once."""

REPLICAS = Whole(1, 4096)
"""Devices that share an effective batch; a pod of TPU v3 has 2,048 cores."""


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
        help="auto, gpu:N, gpu:UUID or cpu; several GPUs, as in gpu:0,gpu:1, share the batch.",
    )(command)


def json_option(command: _Command) -> _Command:
    """Add `--json FILE`."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the result here too (- for standard output instead).",
    )(command)


def ledger_option(command: _Command) -> _Command:
    """Add `--ledger FILE`."""
    return click.option(
        "--ledger",
        "ledger_file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Record of all trials. Default: the user's.",
    )(command)


def lever_options(command: _Command) -> _Command:
    """Add `--precision`, `--optimizer`, `--placement` and `--allow`; see `allowed_levers`."""
    options = [
        click.option("--precision", type=click.Choice(PRECISIONS), help="Insist on a precision."),
        click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="Insist on an optimizer."),
        click.option(
            "--placement",
            type=click.Choice(PLACEMENTS),
            help="Insist on where the optimizer's state is. Default: the device, and the host's "
            "memory for a GPU that nothing else fits on.",
        ),
        click.option(
            "--allow",
            help="Levers that change the update and that a plan may use where it gains by them: "
            f"{', '.join(_INEXACT)}.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


# Of both, the first is the published recipe's.
_INEXACT = (*PRECISIONS[1:], *OPTIMIZERS[1:])


def allowed_levers(
    precision: str | None, optimizer: str | None, placement: str | None, allow: str | None
) -> tuple[Levers, ...]:
    """Combinations of precision and optimizer that a plan may choose from, exact ones first.

    Raises:
        InputError: `--allow` names something else, or what is insisted on.
    """
    names = [item.strip().lower() for item in (allow or "").split(",") if item.strip()]

    def choices(flag: str, known: tuple[str, ...], insisted: str | None) -> list[str]:
        allowed = [name for name in names if name in known[1:]]
        if insisted is not None and allowed:
            raise InputError(
                f"{flag} and --allow {allowed[0]} do not go together", hint="give one of them"
            )
        return [insisted or known[0], *allowed]

    precisions = choices("--precision", PRECISIONS, precision)
    optimizers = choices("--optimizer", OPTIMIZERS, optimizer)
    for name in names:
        if name not in _INEXACT:
            raise InputError(
                f"--allow {name}: no such lever", hint=f"it takes {', '.join(_INEXACT)}"
            )
    return tuple(
        Levers(precision=p, optimizer=o, placement=placement or PLACEMENTS[0])
        for p in precisions
        for o in optimizers
    )


def given_flags(context: click.Context, but: Collection[str]) -> Iterator[str]:
    """Flags on the command line, but for those of some parameters."""
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in but:
            yield parameter.opts[0].replace("_", "-")


def resolve_budget(device: str, memory: int | None) -> Budget:
    """Device, or GPUs that share a batch, and bytes of each that the options name.

    Raises:
        InputError: no such device, or more than it has; or a TPU, which is named otherwise.
    """
    resolved = resolve_devices(device)
    if resolved.tpu is not None:
        raise InputError(
            f"--device {device} is for `bertbench probe`",
            hint="`bertbench run` takes --use_tpu and --tpu_name",
        )
    return make_budget(resolved, memory)


def write_json(path: Path, values: Any) -> None:
    """Write a result file, or standard output for `-`."""
    text = json_text(values, indent=1) + "\n"
    if str(path) == "-":
        echo(text, nl=False)
    else:
        write_atomically(path, text)
