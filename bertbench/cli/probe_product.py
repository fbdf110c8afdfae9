"""`bertbench probe --gpu`: the largest batch of a product by its compiler, without having it."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bertbench.cli.options.common import write_json
from bertbench.cli.views.compiled_view import show_compiled, show_compiled_checks
from bertbench.cli.views.probe_view import describe_workload
from bertbench.compiling.compilation import Compile, CompileSettings, compile_step
from bertbench.compiling.target import compile_target
from bertbench.core.errors import WorkError
from bertbench.core.progress import describe_duration
from bertbench.core.terminal import say
from bertbench.core.units import GIB_BYTES, format_bytes
from bertbench.core.workload import Levers, Setup, check_layers, published_workload
from bertbench.hardware.accelerators import Accelerator, check_levers
from bertbench.hardware.host import host_memory
from bertbench.hardware.threads import usable_cores
from bertbench.ledger.compilations import CompiledQuestion, compiled_question
from bertbench.ledger.database import open_ledger
from bertbench.probing.compiled.cell import CompiledCell, probe_compiled
from bertbench.probing.compiled.claims import (
    KEY,
    CompiledCheck,
    check_compiled,
    read_compiled_claims,
)
from bertbench.probing.workers import share_out
from finetune.errors import InputError

_JOB_BYTES = 4 * GIB_BYTES
"""Host memory for a compilation. That of BERT-Base for an H100 took 1.8 GB, beside 0.6 GB of the
process that waits for it."""


def step_compiler(settings: CompileSettings) -> Compile:
    """Compile steps with some settings, see `bertbench.compiling.compilation.compile_step`."""
    return functools.partial(compile_step, settings=settings)


@dataclasses.dataclass(frozen=True)
class ProductProbe:
    """How a product is probed, and where the answers go.

    Attributes:
        ledger_path: gets the compilations.
        max_batch: largest micro-batch of interest.
        ignore_ledger: compile again what the ledger knows.
        json_file: gets the result; None for none.
        jobs: compilations at once; None for as many as the machine has cores and memory for.
        compiler: makes what compiles, with some settings.
    """

    ledger_path: Path
    max_batch: int
    ignore_ledger: bool
    json_file: Path | None
    jobs: int | None = None
    compiler: Callable[[CompileSettings], Compile] = step_compiler


def probe_product(
    accelerator: Accelerator,
    memory: int | None,
    sizes: Sequence[tuple[str, int]],
    head: str,
    levers: Levers,
    probe: ProductProbe,
) -> None:
    """Find the limits of a product of the catalogue by its compiler, and show them.

    Args:
        accelerator: the product.
        memory: bytes that a program may use of a GPU; None takes all usable ones.
        sizes: models and sequence lengths.
        head: task head.
        levers: of all cells.
        probe: how, and where the answers go.

    Raises:
        InputError: the product does not support the levers, or its compiler is not installed.
        WorkError: a compilation failed for another reason than memory.
        KeyboardInterrupt: it was interrupted; what was finished has been shown.
    """
    replicas = accelerator.replicas
    check_levers(accelerator.kind, accelerator.name, levers, replicas)
    if memory is not None and accelerator.kind == "tpu":
        raise InputError(
            f"--memory does not go with {accelerator.name}: a program has all memory of a device",
            hint="leave --memory out",
        )
    budget_bytes = accelerator.usable_bytes if memory is None else memory
    if budget_bytes > accelerator.memory_bytes:
        raise InputError(
            f"--memory {format_bytes(budget_bytes)} is more than the "
            f"{format_bytes(accelerator.memory_bytes)} of {accelerator.name}"
        )
    setups = [Setup(published_workload(model, length, head), levers) for model, length in sizes]
    for setup in setups:
        check_layers(setup.workload, levers.checkpointing)
    questions = [compiled_question(compile_target(accelerator, replicas), one) for one in setups]
    cells, interrupted = _probe_all(questions, budget_bytes, probe)
    if probe.json_file is not None:
        values = {
            KEY: questions[0].target.to_json(),
            "budget_bytes": budget_bytes,
            "versions": json.loads(questions[0].versions),
            "cells": [cell.to_json() for cell in cells],
        }
        write_json(probe.json_file, values)
    if str(probe.json_file) != "-":
        show_compiled(accelerator, budget_bytes, levers, cells)
    if interrupted:
        raise KeyboardInterrupt
    failed = [cell for cell in cells if cell.max_batch is None]
    if failed:
        raise WorkError(
            f"{len(failed)} of {len(cells)} cells failed, the first one with: {failed[0].message}"
        )


def _probe_all(
    questions: Sequence[CompiledQuestion], budget_bytes: int, probe: ProductProbe
) -> tuple[list[CompiledCell], bool]:
    """Probe the cells and say how far they are; tell whether that was interrupted."""
    cells: dict[int, CompiledCell] = {}
    began = time.monotonic()

    def work(_: int, index: int, poll: Callable[[], None]) -> None:
        question = questions[index]
        title = f"[{index + 1}/{len(questions)}] {describe_workload(question.setup.workload)}"

        def on_attempt(batch: int) -> None:
            left = ""
            if cells:
                each_seconds = (time.monotonic() - began) / len(cells)
                left_seconds = each_seconds * (len(questions) - len(cells))
                left = f"; {describe_duration(left_seconds)} left"
            say(f"{title}: compiling batch {batch}{left}")

        with open_ledger(probe.ledger_path) as ledger:
            cells[index] = probe_compiled(
                ledger,
                question,
                budget_bytes,
                probe.compiler(CompileSettings(poll=poll)),
                max_batch=probe.max_batch,
                ignore_ledger=probe.ignore_ledger,
                on_attempt=on_attempt,
            )

    interrupted = False
    jobs = min(probe.jobs or default_jobs(), len(questions))
    try:
        share_out(len(questions), range(jobs), work)
    except KeyboardInterrupt:
        interrupted = True
    return [cell for _, cell in sorted(cells.items())], interrupted


def default_jobs(machine: Callable[[], tuple[int, int]] = host_memory) -> int:
    """How many compilations this machine does at once: one a core, as far as memory allows.

    Args:
        machine: tells the host's total and free bytes.
    """
    _, free_bytes = machine()
    return max(1, min(usable_cores(), free_bytes // _JOB_BYTES))


def check_product(path: Path, json_file: Path | None, compile_: Compile = compile_step) -> None:
    """Compile both sides of every limit in a file again, and say which limits hold.

    Args:
        path: file of `bertbench probe --gpu --json`.
        json_file: gets the result; None for none.
        compile_: compiles.

    Raises:
        InputError: it is no such file, or has no limit.
        WorkError: a limit does not hold, or could not be checked.
        KeyboardInterrupt: it was interrupted; what was finished has been shown.
    """
    target, budget_bytes, claims = read_compiled_claims(path)
    if not claims:
        raise InputError("no cell has a limit", path=path)
    checks: list[CompiledCheck] = []
    interrupted = False
    for number, claim in enumerate(claims, 1):
        title = f"[{number}/{len(claims)}] {describe_workload(claim.setup.workload)}"
        say(f"{title}: compiling batch {claim.max_batch} and one more")
        try:
            checks.append(check_compiled(claim, target, budget_bytes, compile_))
        except KeyboardInterrupt:
            interrupted = True
            break
    if json_file is not None:
        found = [check.to_json() for check in checks]
        write_json(json_file, {KEY: target.to_json(), "budget_bytes": budget_bytes, "cells": found})
    if str(json_file) != "-":
        show_compiled_checks(target.name, checks)
    if interrupted:
        raise KeyboardInterrupt
    for confirmed, words in ((False, "do not hold"), (None, "could not be checked")):
        wrong = [check for check in checks if check.confirmed is confirmed]
        if wrong:
            what = describe_workload(wrong[0].claim.setup.workload)
            raise WorkError(
                f"{len(wrong)} of {len(checks)} limits {words}, the first one of {what}"
            )
