"""The report in a terminal: the tables, and small bars."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from bertbench.bytes import format_bytes
from bertbench.cli.common import terminal
from bertbench.planner import Plan
from reports.cells import Cell
from reports.predictions import describe_errors
from reports.report import Report
from reports.runs import Run
from reports.tables import NOTE, Table, limit_text, system_name

_BAR_COLUMNS = 18
_MOST_LINES = 40


def show_report(report: Report) -> None:
    """Show what is known, in 80 columns."""
    console = terminal()
    console.print(report.headline, soft_wrap=True)
    for table in report.tables:
        _show_limits(console, table)
    if report.tables:
        console.print(NOTE)
    _show_bars(console, report.cells)
    _show_plans(console, report)
    errors = describe_errors(report.predictions)
    if errors:
        console.print(f"\n{errors}")
    for cell in report.failed[:_MOST_LINES]:
        row = cell.newest
        console.print(
            f"failed: {system_name(row.model)} {row.seq_len} {cell.setting}, batch "
            f"{row.trial.batch}: {row.trial.message}",
            soft_wrap=True,
        )
    _show_runs(console, report.runs)


def _show_limits(console: Console, table: Table) -> None:
    console.print(f"\n[bold]{table.title}[/bold]", soft_wrap=True)
    shown = RichTable(box=None, pad_edge=False)
    for number, name in enumerate(table.frame.columns):
        shown.add_column(name, justify="right" if number else "left")
    for line in table.frame.itertuples(index=False):
        shown.add_row(*line)
    console.print(shown)


def _show_bars(console: Console, cells: Sequence[Cell]) -> None:
    """Examples a second at the largest batch."""
    timed = [(cell, rate) for cell in cells if (rate := cell.examples_per_second) is not None]
    timed = timed[-_MOST_LINES:]
    if not timed:
        return
    console.print("\n[bold]Speed at the largest batch[/bold]")
    shown = RichTable(box=None, pad_edge=False)
    for name in ("model", "seq", "levers", "budget", "batch", "examples/s", ""):
        left = name in ("model", "levers", "")
        shown.add_column(name, justify="left" if left else "right", no_wrap=name != "levers")
    # Bars compare settings of the same model and length, whose speeds are of one size.
    most: dict[tuple[str, int], float] = {}
    for cell, rate in timed:
        key = cell.newest.model, cell.newest.seq_len
        most[key] = max(most.get(key, 0.0), rate)
    for cell, rate in timed:
        row = cell.newest
        bar = "█" * max(1, round(_BAR_COLUMNS * rate / most[row.model, row.seq_len]))
        shown.add_row(
            system_name(row.model), str(row.seq_len), cell.setting, format_bytes(row.budget_bytes),
            limit_text(cell), f"{rate:,.1f}", bar,
        )  # fmt: skip
    console.print(shown)


def _show_plans(console: Console, report: Report) -> None:
    if not report.planned:
        return
    console.print(f"\n[bold]Plans for an effective batch of {report.target_batch}[/bold]")
    shown = RichTable(box=None, pad_edge=False)
    for name in ("model", "seq", "budget", "steps x batch", "checkpointing", "peak", "time"):
        left = name in ("model", "checkpointing")
        shown.add_column(name, justify="left" if left else "right", no_wrap=name != "checkpointing")
    for one in report.planned:
        first = (
            system_name(one.workload.model),
            str(one.workload.seq_len),
            format_bytes(one.place.budget_bytes),
        )
        if isinstance(one.plan, Plan):
            chosen = one.plan.chosen
            shown.add_row(
                *first,
                f"{chosen.levers.accumulation_steps} x {chosen.micro_batch}",
                chosen.levers.describe(),
                format_bytes(chosen.footprint.peak_bytes),
                f"{chosen.predicted_step_seconds:.3g} s",
            )
        else:
            shown.add_row(*first, "-", "does not fit", "-", "-")
    console.print(shown)
    if report.unplanned:
        console.print(
            f"and {report.unplanned} more workloads with older trials: `bertbench plan` plans them",
            soft_wrap=True,
        )


def _show_runs(console: Console, runs: Sequence[Run]) -> None:
    for run in runs:
        summary = run.summary()
        scores = ", ".join(f"{name} {value:.4g}" for name, value in summary["scores"].items())
        console.print(
            f"\n[bold]{summary['run']}[/bold]: {summary['task']}, step {summary['steps']} of "
            f"{summary['of_steps']}, {summary['micro_batch']} at a time with "
            f"{summary['checkpointing']}; {scores or 'no scores yet'}",
            soft_wrap=True,
        )
