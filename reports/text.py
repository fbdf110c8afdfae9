"""The report in the terminal: tables, and bars of text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from bertbench.core.terminal import terminal
from bertbench.core.units import format_bytes
from bertbench.planning.planner import Plan
from reports.compiled_tables import COMPILED_NOTE
from reports.measured_cells import MeasuredCell
from reports.peak_predictions import describe_errors
from reports.recommendations import Recommendation
from reports.report import Report
from reports.runs import Run
from reports.tables import NOTE, PUBLISHED, SYSTEM, Table, limit_text, system_name

_BAR_COLUMNS = 18
_MAX_LINES = 40


def show_report(report: Report) -> None:
    """Print the report, in 80 columns."""
    console = terminal()
    console.print(report.headline, soft_wrap=True)
    for table in report.tables:
        _show_limits(console, table)
    if report.tables:
        console.print(NOTE)
    for table in report.compiled_tables:
        _show_limits(console, table)
    if report.compiled_tables:
        console.print(COMPILED_NOTE)
    _show_bars(console, report)
    _show_plans(console, report)
    errors = describe_errors(report.predictions)
    if errors:
        console.print(f"\n{errors}")
    for cell in report.failed[:_MAX_LINES]:
        trial = cell.newest.trial
        console.print(
            f"failed: {system_name(cell.model)} {cell.newest.seq_len} {cell.levers_text}, "
            f"{cell.task}, {report.names[cell.environment]}, batch {trial.batch}: {trial.message}",
            soft_wrap=True,
        )
    _print_more(console, len(report.failed) - _MAX_LINES, "failed cells")
    _show_runs(console, report.runs)


def _print_title(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", soft_wrap=True)


def _print_more(console: Console, count: int, of: str) -> None:
    if count > 0:
        console.print(f"and {count:,} more {of}: --out report.html has them", soft_wrap=True)


def _show_limits(console: Console, table: Table) -> None:
    _print_title(console, table.title)
    shown = RichTable(box=None, pad_edge=False)
    frame = table.frame
    # The names of columns must not be cut short. If there are too many, each becomes a line.
    widths = [max(len(name), *map(len, frame[name])) for name in frame.columns]
    if sum(widths) + 2 * (len(widths) - 1) > console.width:
        frame = _in_lines(table)
    for name in frame.columns:
        left = name in ("System", "levers")
        shown.add_column(name, justify="left" if left else "right", no_wrap=name != "levers")
    for line in frame.itertuples(index=False):
        shown.add_row(*line)
    console.print(shown)


def _in_lines(table: Table) -> pd.DataFrame:
    """Return the table with a line for each limit, instead of a column for each set of levers."""
    settings = [name for name in table.frame.columns if name not in (*SYSTEM, PUBLISHED)]
    kept = [name for name in table.frame.columns if name not in settings]
    long = table.frame.melt(id_vars=kept, var_name="levers", value_name="Max Batch Size")
    order = long.index.to_series().mod(len(table.frame)).sort_values(kind="stable").index
    long = long.loc[order]
    long = long[long["Max Batch Size"] != ""]
    short = {"Seq Length": "seq", PUBLISHED: "Titan X", "Max Batch Size": "max batch"}
    return long[[*SYSTEM, "levers", *kept[len(SYSTEM) :], "Max Batch Size"]].rename(columns=short)


def _show_bars(console: Console, report: Report) -> None:
    """Print examples a second at the limit, a table for each task and environment."""
    timed = [(cell, rate) for cell in report.cells if (rate := cell.examples_per_second)]
    newest = sorted(timed, key=lambda pair: -pair[0].newest.id)[:_MAX_LINES]
    shown_ids = {id(cell) for cell, _ in newest}
    groups: dict[str, list[tuple[MeasuredCell, float]]] = {}
    for cell, rate in timed:
        if id(cell) in shown_ids:
            where = f"{cell.task}, {report.names[cell.environment]}"
            groups.setdefault(where, []).append((cell, rate))
    for where, group in groups.items():
        _print_title(console, f"Speed at the largest batch, {where}")
        console.print(_bars(group))
    _print_more(console, len(timed) - len(newest), "cells with a speed")


def _bars(timed: Sequence[tuple[MeasuredCell, float]]) -> RichTable:
    shown = RichTable(box=None, pad_edge=False)
    for name in ("model", "seq", "levers", "batch", "examples/s", ""):
        left = name in ("model", "levers", "")
        shown.add_column(name, justify="left" if left else "right", no_wrap=name != "levers")
    # A bar is relative to the fastest levers of the same model and length.
    most: dict[tuple[str, int], float] = {}
    for cell, rate in timed:
        key = cell.model, cell.newest.seq_len
        most[key] = max(most.get(key, 0.0), rate)
    for cell, rate in timed:
        part = rate / most[cell.model, cell.newest.seq_len]
        shown.add_row(
            system_name(cell.model), str(cell.newest.seq_len), cell.levers_text, limit_text(cell),
            f"{rate:,.1f}", "█" * max(1, round(_BAR_COLUMNS * part)),
        )  # fmt: skip
    return shown


def _show_plans(console: Console, report: Report) -> None:
    groups: dict[str, list[Recommendation]] = {}
    for one in report.recommendations:
        groups.setdefault(f"{one.task}, {report.names[one.environment]}", []).append(one)
    for where, group in groups.items():
        _print_title(console, f"Plans for an effective batch of {report.target_batch:,}, {where}")
        console.print(_plans(group))
    if report.workloads_without_plan:
        console.print(
            f"and {report.workloads_without_plan} more workloads with older trials: "
            "`bertbench plan` plans them",
            soft_wrap=True,
        )


def _plans(recommendations: Sequence[Recommendation]) -> RichTable:
    shown = RichTable(box=None, pad_edge=False)
    for name in ("model", "seq", "micro-batch", "count", "checkpointing", "peak", "time/batch"):
        left = name in ("model", "checkpointing")
        shown.add_column(name, justify="left" if left else "right", no_wrap=name != "checkpointing")
    for one in recommendations:
        first = system_name(one.workload.model), str(one.workload.seq_len)
        if isinstance(one.plan, Plan):
            chosen = one.plan.chosen
            shown.add_row(
                *first,
                str(chosen.step.micro_batch),
                str(chosen.step.levers.accumulation_steps),
                chosen.step.levers.describe(),
                format_bytes(chosen.footprint.peak_bytes),
                f"{chosen.predicted_step_seconds:.3g} s",
            )
        else:
            shown.add_row(*first, "-", "-", "does not fit", "-", "-")
    return shown


def _show_runs(console: Console, runs: Sequence[Run]) -> None:
    for run in runs:
        summary = run.summary()
        told = {name: "-" if value is None else value for name, value in summary.items()}
        scores = ", ".join(f"{name} {value:.4g}" for name, value in summary["scores"].items())
        _print_title(console, summary["run"])
        console.print(
            f"{told['task']}, step {told['steps']} of {told['of_steps']}, {told['micro_batch']} at "
            f"a time with {told['checkpointing']}; {scores or 'no scores yet'}",
            soft_wrap=True,
        )
