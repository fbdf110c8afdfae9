"""`bertbench probe`: the largest batch that really fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from bertbench.bytes import MIB_BYTES, format_bytes
from bertbench.catalogue import check_levers
from bertbench.cli.common import (
    CONTEXT,
    MemorySize,
    json_option,
    resolve_budget,
    terminal,
    write_json,
)
from bertbench.devices import Budget, check_free, make_budget, resolve_device
from bertbench.errors import WorkError
from bertbench.ledger import open_ledger
from bertbench.paper import PAPER_MODELS, PAPER_SEQ_LENS, PUBLISHED_MAX_BATCH
from bertbench.probing import Cell, probe_cell
from bertbench.progress import say
from bertbench.trial import Trial
from bertbench.workload import Levers, published_workload
from finetune.checkpointing import parse_checkpointing
from finetune.config import HEADS
from finetune.errors import InputError
from finetune.optimizers import EXACT_OPTIMIZER, OPTIMIZERS, PLACEMENTS
from finetune.precisions import EXACT_PRECISION, PRECISIONS

_CPU_DEFAULT_BYTES = 512 * MIB_BYTES
_CPU_MODELS, _CPU_SEQ_LENS = "bert-tiny,bert-mini", "64,128"
_PAPER_MODELS = ",".join(PAPER_MODELS)
_PAPER_SEQ_LENS = ",".join(map(str, PAPER_SEQ_LENS))


@click.command(context_settings=CONTEXT)
@click.option("--models", help="Published sizes, as in bert-base,bert-large.")
@click.option("--seq-lens", help="Tokens per example, as in 128,384.")
@click.option("--head", type=click.Choice(HEADS), default="squad", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, gpu:N, gpu:UUID or cpu.")
@click.option("--memory", type=MemorySize(), help="Bytes the allocator may use, as in 12GiB.")
@click.option(
    "--checkpointing",
    default="none",
    show_default=True,
    help="none, selective, full, nested, or full:N for N layers.",
)
@click.option(
    "--accumulation",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Micro-batches per step; above 1 there are accumulators.",
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default=EXACT_PRECISION, show_default=True
)
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default=EXACT_OPTIMIZER, show_default=True
)
@click.option(
    "--placement",
    type=click.Choice(PLACEMENTS),
    default=PLACEMENTS[0],
    show_default=True,
    help="Where the optimizer's state is.",
)
@click.option("--xla", is_flag=True, help="Compile the step with XLA.")
@click.option("--max-batch", type=click.IntRange(1), help="Look no further than this batch.")
@click.option("--no-certify", is_flag=True, help="Do not repeat the limit in fresh processes.")
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Take what the ledger knows, or measure again.",
)
@click.option(
    "--ledger",
    "ledger_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Record of all trials. Default: the user's.",
)
@json_option
def command(
    models: str | None,
    seq_lens: str | None,
    head: str,
    device: str,
    memory: int | None,
    checkpointing: str,
    accumulation: int,
    precision: str,
    optimizer: str,
    placement: str,
    xla: bool,
    max_batch: int | None,
    no_certify: bool,
    resume: bool,
    ledger_file: Path | None,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Largest batch that really fits, per model and sequence length, certified.

    A trial is a real training step in a process of its own: batch b fits, batch b + 1 runs out of
    memory. Without an accelerator the trials run on the CPU under a memory cap, and the default
    grid is a small one.

    \b
    Example:
      bertbench probe --models bert-base --seq-lens 128,384 --memory 12GiB
    """
    found = resolve_device(device)
    on_cpu = found.kind == "cpu"
    if memory is None and on_cpu:
        budget = make_budget(found, min(_CPU_DEFAULT_BYTES, found.total_bytes))
    else:
        budget = resolve_budget(device, memory)
    check_free(budget)
    if on_cpu and models is None and seq_lens is None:
        say(
            f"no accelerator: probing small models on the CPU under a cap of "
            f"{format_bytes(budget.budget_bytes)}; for the paper's grid give "
            f"--models {_PAPER_MODELS} --seq-lens {_PAPER_SEQ_LENS} --memory 12GiB"
        )
    names = _items(models or (_CPU_MODELS if on_cpu else _PAPER_MODELS))
    lengths = [
        _length(item) for item in _items(seq_lens or (_CPU_SEQ_LENS if on_cpu else _PAPER_SEQ_LENS))
    ]
    levers = Levers(
        parse_checkpointing(checkpointing), accumulation, precision, optimizer, xla, placement
    )
    check_levers(found.kind, found.name, levers)
    workloads = [published_workload(name, length, head) for name in names for length in lengths]

    cells: list[Cell] = []
    interrupted = False
    with open_ledger(ledger_file) as ledger:
        try:
            for workload in workloads:
                title = f"[{len(cells) + 1}/{len(workloads)}] {workload.model} {workload.seq_len}"

                def on_trial(trial: Trial, title: str = title) -> None:
                    say(f"{title}: {_describe(trial)}")

                cell = probe_cell(
                    ledger,
                    budget,
                    workload,
                    levers,
                    max_batch=max_batch,
                    certify=not no_certify,
                    fresh=not resume,
                    on_trial=on_trial,
                )
                if not cell.result.measured:
                    say(f"{title}: known from the ledger")
                cells.append(cell)
        except KeyboardInterrupt:
            interrupted = True
    if json_file is not None:
        write_json(json_file, _to_json(budget, cells))
    if str(json_file) != "-":
        _show(budget, levers, cells)
    if interrupted:
        raise KeyboardInterrupt
    failed = [cell for cell in cells if cell.result.stopped_by == "failed"]
    if failed:
        raise WorkError(
            f"{len(failed)} of {len(cells)} cells failed, the first one with: "
            f"{failed[0].result.message}"
        )


def _items(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise InputError(f"{text!r} names nothing", hint="separate names with commas")
    return items


def _length(item: str) -> int:
    if not item.isdigit() or not int(item):
        raise InputError(f"{item!r} is not a sequence length", hint="as in --seq-lens 128,384")
    return int(item)


def _describe(trial: Trial) -> str:
    if trial.outcome == "fits" and trial.peak_bytes is not None:
        return f"batch {trial.batch} fits, peak {format_bytes(trial.peak_bytes)}"
    if trial.outcome == "oom":
        return f"batch {trial.batch} runs out of memory"
    return f"batch {trial.batch} failed ({trial.message})"


def _to_json(budget: Budget, cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "device": {**budget.device.to_json(), "budget_bytes": budget.budget_bytes},
        "cells": [cell.to_json() for cell in cells],
    }


def _show(budget: Budget, levers: Levers, cells: Sequence[Cell]) -> None:
    console = terminal()
    console.print(
        f"largest batch, {format_bytes(budget.budget_bytes)} on {budget.device.name}, "
        f"checkpointing {levers.describe()}",
        soft_wrap=True,
    )
    published = any((c.workload.model, c.workload.seq_len) in PUBLISHED_MAX_BATCH for c in cells)
    table = Table(box=None, pad_edge=False)
    titles = ["model", "seq", "max batch", "peak", "examples/s", "trials", "evidence"]
    if published:
        titles.append("Titan X 12 GB")
    for title in titles:
        left = title in ("model", "evidence")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for cell in cells:
        result = cell.result
        best = result.certificate.fits if result.certificate else None
        best = best or next(
            (t for t in result.trials if t.batch == result.max_batch and t.outcome == "fits"), None
        )
        rate = (
            f"{best.batch * levers.accumulation_steps / best.step_seconds:.1f}"
            if best and best.step_seconds
            else "-"
        )
        row = [
            cell.workload.model,
            str(cell.workload.seq_len),
            f"{'≥ ' if result.stopped_by == 'max_batch' else ''}{result.max_batch}",
            format_bytes(best.peak_bytes) if best and best.peak_bytes else "-",
            rate,
            str(result.measured),
            _evidence(cell),
        ]
        if published:
            row.append(
                str(PUBLISHED_MAX_BATCH.get((cell.workload.model, cell.workload.seq_len), "-"))
            )
        table.add_row(*row)
    console.print(table)


def _evidence(cell: Cell) -> str:
    result = cell.result
    if result.stopped_by == "failed":
        return "failed"
    if result.stopped_by == "max_batch":
        return "not the limit"
    if result.contradictions:
        return "contradictory"
    return "certified" if result.certificate else "not certified"
