"""`bertbench ledger`: list, export or prune the record of all trials."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from bertbench.cli.options.common import CONTEXT, PathName, json_option, ledger_option, write_json
from bertbench.core.terminal import echo, terminal
from bertbench.core.units import format_bytes
from bertbench.core.workload import levers_from_json
from bertbench.ledger.compiled_limits import CompiledLimit, read_compiled_limits
from bertbench.ledger.database import (
    default_ledger_path,
    ledger_exists,
    open_ledger,
    read_ledger,
)
from bertbench.ledger.limit import find_limit
from bertbench.ledger.question import QuestionKey, versions_key
from bertbench.ledger.records import (
    LedgerRow,
    Prunable,
    count_prunable,
    damaged_ids,
    prune,
    read_rows,
)
from finetune.errors import InputError


@click.group(context_settings=CONTEXT)
def command() -> None:
    """The record of all trials: list it, export it, delete trials from it.

    \b
    Example:
      bertbench ledger list
      bertbench ledger export trials.csv
      bertbench ledger prune --older-than 90
    """


@command.command("list", context_settings=CONTEXT)
@ledger_option
@click.option("--trials", "each", is_flag=True, help="List every trial instead of the limits.")
@json_option
def list_(ledger_file: Path | None, each: bool, json_file: Path | None) -> None:
    """List the limit found so far for each model, length, levers and budget.

    \b
    Example:
      bertbench ledger list --trials
    """
    path, rows = _read(ledger_file)
    with read_ledger(path) as ledger:
        compiled = read_compiled_limits(ledger)
    limits = _limits(rows)
    if json_file is not None:
        trials = [row.to_json() for row in rows]
        products = [limit.to_json() for limit in compiled]
        values = {"ledger": str(path), "cells": limits, "trials": trials, "compiled": products}
        write_json(json_file, values)
    if str(json_file) == "-":
        return
    console = terminal()
    console.print(f"{path}: {len(rows)} trials of {len(limits)} cells", soft_wrap=True)
    with_head = len({row.head for row in rows}) > 1
    console.print(_trials_table(rows, with_head) if each else _limits_table(limits, with_head))
    if compiled:
        count = f"{len(compiled):,} limit{'s' * (len(compiled) != 1)}"
        console.print(f"\n{count} by compilers, of devices where nothing was run")
        console.print(_compiled_table(compiled))


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        left = title in ("model", "levers", "outcome", "evidence", "time (UTC)")
        table.add_column(title, justify="left" if left else "right", no_wrap=title != "levers")
    return table


def _trials_table(rows: Sequence[LedgerRow], with_head: bool) -> Table:
    table = _table("time (UTC)", "model", "seq", "levers", "batch", "outcome", "peak")
    for row in rows:
        trial = row.trial
        table.add_row(
            row.time_utc[:16].replace("T", " "),
            _model(row.model, row.head, with_head),
            str(row.seq_len),
            _levers(row.levers),
            str(trial.batch),
            trial.outcome,
            format_bytes(trial.peak_bytes) if trial.peak_bytes else "-",
        )
    return table


def _limits_table(limits: Sequence[dict[str, Any]], with_head: bool) -> Table:
    table = _table("model", "seq", "levers", "budget", "fits", "no more", "evidence", "trials")
    for limit in limits:
        table.add_row(
            _model(limit["model"], limit["head"], with_head),
            str(limit["seq_len"]),
            _levers(limit["levers"]),
            format_bytes(limit["budget_bytes"]),
            _number(limit["max_batch"]),
            _number(limit["smallest_out_of_memory"]),
            limit["evidence"],
            str(limit["trials"]),
        )
    return table


def _compiled_table(limits: Sequence[CompiledLimit]) -> Table:
    with_head = len({limit.workload.head for limit in limits}) > 1
    table = _table("model", "seq", "levers", "product", "budget", "max batch", "compiled")
    for limit in limits:
        table.add_row(
            _model(limit.workload.model, limit.workload.head, with_head),
            str(limit.workload.seq_len),
            limit.levers.describe_fully(),
            limit.target.name,
            format_bytes(limit.budget_bytes),
            limit.text,
            str(limit.compilations),
        )
    return table


@command.command("export", context_settings=CONTEXT)
@click.argument("file", type=PathName(dir_okay=False))
@ledger_option
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def export_(file: Path, ledger_file: Path | None, force: bool) -> None:
    """Write all trials to FILE (.csv, .parquet or .json), one row each.

    In CSV, a text that a spreadsheet would read as a formula gets an apostrophe in front.

    \b
    Example:
      bertbench ledger export trials.csv
    """
    from bertbench.ledger.trial_table import export

    _, rows = _read(ledger_file)
    export(rows, file, overwrite=force)
    echo(f"{file}: {len(rows)} trials")


@command.command("prune", context_settings=CONTEXT)
@ledger_option
@click.option(
    "--older-than", type=click.IntRange(0, 36_500), metavar="DAYS", help="Trials older than this."
)
@click.option("--failed", is_flag=True, help="Trials that failed for another reason than memory.")
@click.option(
    "--other-versions",
    is_flag=True,
    help="Trials of other versions of TensorFlow, Python or bertbench than the installed ones.",
)
@click.option("--damaged", is_flag=True, help="Trials that cannot be read.")
@click.option("--all", "everything", is_flag=True, help="All trials.")
@click.option(
    "--yes", is_flag=True, help="Delete them. Without this flag only their number is shown."
)
def prune_(
    ledger_file: Path | None,
    older_than: int | None,
    failed: bool,
    other_versions: bool,
    damaged: bool,
    everything: bool,
    yes: bool,
) -> None:
    """Delete trials: those that match all the given flags.

    \b
    Example:
      bertbench ledger prune --older-than 90 --yes
    """
    if not (older_than is not None or failed or other_versions or damaged or everything):
        raise InputError(
            "no flag says which trials to delete",
            hint="give --older-than DAYS, --failed, --other-versions, --damaged or --all",
        )
    path = ledger_file or default_ledger_path()
    _exists(path)
    with open_ledger(path) as ledger:
        which = Prunable(
            before=None
            if older_than is None
            else datetime.now(timezone.utc) - timedelta(days=older_than),
            failed=failed,
            other_than=versions_key() if other_versions else None,
            ids=damaged_ids(ledger) if damaged else None,
        )
        if not yes:
            count = count_prunable(ledger, which)
            echo(f"{path}: {count} trials match; add --yes to delete them")
            return
        count = prune(ledger, which)
    echo(f"{path}: deleted {count} trials")


def _read(ledger_file: Path | None) -> tuple[Path, list[LedgerRow]]:
    path = ledger_file or default_ledger_path()
    _exists(path)
    with read_ledger(path) as ledger:
        return path, read_rows(ledger)


def _exists(path: Path) -> None:
    if not ledger_exists(path):
        raise InputError("no such ledger", path=path, hint="`bertbench probe` makes one")


def _limits(rows: list[LedgerRow]) -> list[dict[str, Any]]:
    """Return the limit of each question, as values for JSON."""
    by_question: dict[QuestionKey, list[LedgerRow]] = {}
    for row in rows:
        if not row.trial.of_run:
            by_question.setdefault(row.question, []).append(row)
    cells = []
    for of_question in by_question.values():
        row = of_question[0]
        limit = find_limit(row.trial for row in of_question)
        cells.append(
            {
                "model": row.model,
                "head": row.head,
                "seq_len": row.seq_len,
                "levers": row.levers,
                "budget_bytes": row.budget_bytes,
                "device": row.device,
                "versions": row.versions,
                "max_batch": limit.max_batch,
                "smallest_out_of_memory": None if limit.oom is None else limit.oom.batch,
                "fits_again": [trial.batch for trial in limit.fits_again],
                "evidence": limit.evidence,
                "trials": len(of_question),
            }
        )
    return cells


def _model(model: str, head: str, with_head: bool) -> str:
    return f"{model} {head}" if with_head else model


def _levers(values: dict[str, Any]) -> str:
    try:
        return levers_from_json(values).describe_fully()
    except InputError:  # of another version, with other levers
        return ", ".join(map(str, values.values()))


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
