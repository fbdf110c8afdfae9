"""Files of `bertbench probe --gpu --json`, and whether what they say still holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bertbench.compiling.compilation import FAILED, Compilation, Compile
from bertbench.compiling.target import CompileTarget, compile_target
from bertbench.core.workload import (
    MAX_BATCH,
    Setup,
    check_layers,
    levers_from_json,
    published_workload,
)
from bertbench.hardware.accelerators import find_accelerator
from finetune.errors import InputError
from finetune.storage.json_files import MAX_WHOLE, get_value, get_whole, load_object

_HINT = "give a file of `bertbench probe --gpu --json`"
KEY = "compiled_for"
"""Key that tells such a file from one of trials."""

_MAX_REPLICAS = 1 << 12


@dataclasses.dataclass(frozen=True)
class CompiledClaim:
    """What a file says of one cell.

    Attributes:
        setup: workload and levers.
        max_batch: micro-batch that is said to fit, and one more not; 0 if not even 1 fits.
    """

    setup: Setup
    max_batch: int


@dataclasses.dataclass(frozen=True)
class CompiledCheck:
    """A claim, and the compilations that were made to check it.

    Attributes:
        claim: what was said.
        fits: whether each micro-batch of `compilations` fits; None where a compilation failed.
        compilations: of the micro-batch that should fit, if there is one, and of one more.
    """

    claim: CompiledClaim
    fits: tuple[bool | None, ...]
    compilations: tuple[Compilation, ...]

    @property
    def confirmed(self) -> bool | None:
        """Whether the claim holds; None if a compilation failed and none contradicts it."""
        expected = [one.micro_batch <= self.claim.max_batch for one in self.compilations]
        if any(found is (not wanted) for found, wanted in zip(self.fits, expected, strict=True)):
            return False
        return None if None in self.fits else True

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        workload = self.claim.setup.workload
        return {
            "model": workload.model,
            "head": workload.head,
            "seq_len": workload.seq_len,
            "levers": self.claim.setup.levers.to_json(),
            "max_batch": self.claim.max_batch,
            "confirmed": self.confirmed,
            "compilations": [one.to_json() for one in self.compilations],
        }


def read_compiled_claims(path: Path) -> tuple[CompileTarget, int, list[CompiledClaim]]:
    """Read a file of `bertbench probe --gpu --json`.

    Returns:
        What was compiled for, as the catalogue describes it now; the bytes that a program may use;
        and the cells whose limit was found.

    Raises:
        InputError: it is no such file.
    """
    values = load_object(path, what="a probe's result", hint=_HINT)
    described = get_value(values, KEY, dict, "the file", path, hint=_HINT)
    name = get_value(described, "name", str, KEY, path, hint=_HINT)
    cells = get_value(values, "cells", list, "the file", path, hint=_HINT)
    try:
        replicas = get_whole(described, "replicas", 1, _MAX_REPLICAS)
        target = compile_target(find_accelerator(name), replicas)
        budget_bytes = get_whole(values, "budget_bytes", 1, MAX_WHOLE)
        claims = [_claim(cell, path) for cell in cells if _is_limit(cell)]
    except InputError as error:
        raise InputError(f"not a probe's result ({error})", path=path, hint=_HINT) from error
    return target, budget_bytes, claims


def is_compiled(path: Path) -> bool:
    """Whether a file is one of compilations, and not of trials.

    Raises:
        InputError: it cannot be read, or is no JSON object.
    """
    return KEY in load_object(path, what="a probe's result", hint=_HINT)


def _is_limit(cell: object) -> bool:
    return isinstance(cell, dict) and cell.get("exceeds") is not None


def _claim(cell: dict[str, Any], path: Path) -> CompiledClaim:
    model, head = (
        get_value(cell, key, str, "a cell", path, hint=_HINT) for key in ("model", "head")
    )
    workload = published_workload(model, get_whole(cell, "seq_len", 1, MAX_WHOLE), head)
    levers = levers_from_json(get_value(cell, "levers", dict, "a cell", path, hint=_HINT))
    check_layers(workload, levers.checkpointing)
    max_batch = get_whole(cell, "max_batch", 0, MAX_BATCH - 1)
    exceeds = get_value(cell, "exceeds", dict, "a cell", path, hint=_HINT)
    if get_whole(exceeds, "micro_batch", 1, MAX_BATCH) != max_batch + 1:
        raise InputError("a limit is a micro-batch and the next one")
    return CompiledClaim(Setup(workload, levers), max_batch)


def check_compiled(
    claim: CompiledClaim, target: CompileTarget, budget_bytes: int, compile_: Compile
) -> CompiledCheck:
    """Compile both sides of a limit again.

    Args:
        claim: the limit.
        target: the device.
        budget_bytes: what a program may use of it.
        compile_: compiles, as `bertbench.compiling.compilation.compile_step` does.
    """
    sides = [claim.max_batch, claim.max_batch + 1] if claim.max_batch else [1]
    steps = [claim.setup.step(batch) for batch in sides]
    made = [compile_(step, target) for step in steps]
    fits = [
        None if one.outcome == FAILED else one.fits_in(step, target.kind, budget_bytes)
        for step, one in zip(steps, made, strict=True)
    ]
    return CompiledCheck(claim, tuple(fits), tuple(made))
