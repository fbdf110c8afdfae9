"""The report as one page of HTML without external files."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import jinja2

from bertbench.core.progress import Advance, describe_duration
from bertbench.core.terminal import clean_text
from bertbench.core.units import format_bytes
from bertbench.ledger.limit import AT_LEAST, BELOW, CERTIFIED, FAILED, MEASURED
from bertbench.planning.planner import Plan, describe_setting
from reports.compiled_tables import COMPILED_NOTE
from reports.environments import Environment
from reports.measured_cells import MeasuredCell, trial_rate
from reports.peak_predictions import describe_errors
from reports.recommendations import Recommendation
from reports.report import Report, version
from reports.runs import Run
from reports.tables import NOTE, Table, limit_text, system_name

_MAX_ENVIRONMENTS, _MAX_TABLES, _MAX_CELLS, _MAX_TRIALS = 8, 12, 800, 1200


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table that can be sorted.

    Attributes:
        title: its title.
        css: CSS class of the values in the column.
    """

    title: str
    css: str = ""

    @property
    def left(self) -> bool:
        """Whether it is aligned to the left, as text is."""
        return bool(self.css)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A value in such a table.

    Attributes:
        text: the text that is shown.
        sort: number to sort by; None sorts by the text.
        css: CSS class.
    """

    text: str
    sort: float | None = None
    css: str = ""


_MISSING = Entry("-", -1.0)
_CSS = {CERTIFIED: "good", FAILED: "bad", "fits": "good", "failed": "bad"}


def build_page(report: Report, advance: Advance = lambda done, note: None) -> str:
    """Return the HTML of the page.

    Args:
        report: what the page shows.
        advance: called after each picture.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["zip"] = zip
    text = resources.files("reports").joinpath("templates/page.html").read_text(encoding="utf-8")
    return clean_text(environment.from_string(text).render(_values(report, advance)))


def _values(report: Report, advance: Advance) -> dict[str, Any]:
    """All values of the template."""
    pictures = _drawn_pictures(report, advance)
    sections = {
        "summary": ("What fits", report.environments),
        "plans": ("What to run", report.recommendations),
        "limits": ("Largest micro-batch", report.tables),
        "compiled": ("By compilers", report.compiled_tables),
        "pictures": ("Pictures", pictures),
        "runs": ("Runs", report.runs),
        "cells": ("All cells", report.cells),
        "trials": ("Every trial", report.rows),
        "how": ("How it was measured", True),
    }
    return {
        "headline": report.headline,
        "made": f"{report.made.day} {report.made:%B %Y, %H:%M %Z}",
        "version": version(),
        "ledger": report.ledger.name,
        "contents": [(name, title) for name, (title, there) in sections.items() if there],
        "environments": [
            _environment(report, environment)
            for environment in report.environments[:_MAX_ENVIRONMENTS]
        ],
        "more_environments": max(len(report.environments) - _MAX_ENVIRONMENTS, 0),
        **_plan_values(report),
        **_limit_values(report),
        "pictures": pictures,
        "errors": describe_errors(report.predictions),
        "run_columns": _RUN_COLUMNS,
        "run_rows": [_run_row(run) for run in report.runs],
        **_cell_values(report),
        "trial_columns": _TRIAL_COLUMNS,
        "trial_rows": list(_trial_rows(report)),
        "more_trials": len(report.rows) if len(report.rows) > _MAX_TRIALS else 0,
    }


def _drawn_pictures(report: Report, advance: Advance) -> list[dict[str, Any]]:
    drawn = []
    for number, picture in enumerate(report.pictures):
        narrow = picture.draw_narrow
        drawn.append(
            {
                "name": picture.name,
                "title": picture.title,
                "caption": picture.caption,
                "wide": picture.wide,
                "svg": picture.inline_svg(),
                "narrow_svg": narrow and picture.inline_svg(narrow),
            }
        )
        advance(number + 1, picture.name)
    return drawn


def _plan_values(report: Report) -> dict[str, Any]:
    plans = [(one, report.names[one.environment]) for one in report.recommendations]
    return {
        "target_batch": report.target_batch,
        "plans": [_commands(one, where) for one, where in plans],
        "workloads_without_plan": report.workloads_without_plan,
        "plan_columns": _PLAN_COLUMNS,
        "plan_rows": [_plan_row(one, where) for one, where in plans],
    }


def _limit_values(report: Report) -> dict[str, Any]:
    return {
        "tables": [_limit_table(table) for table in report.tables[:_MAX_TABLES]],
        "compiled_tables": [_limit_table(t) for t in report.compiled_tables[:_MAX_TABLES]],
        "more_compiled_tables": max(len(report.compiled_tables) - _MAX_TABLES, 0),
        "compiled_note": COMPILED_NOTE,
        "more_tables": max(len(report.tables) - _MAX_TABLES, 0),
        "note": NOTE,
    }


def _limit_table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": list(table.frame.columns),
        "rows": list(table.frame.itertuples(index=False)),
    }


def _cell_values(report: Report) -> dict[str, Any]:
    newest = sorted(report.cells, key=lambda cell: -cell.newest.id)[:_MAX_CELLS]
    shown = {id(cell) for cell in newest}
    return {
        "cell_columns": _CELL_COLUMNS,
        # In the order of the report: by environment, then by model.
        "cell_rows": [
            _cell_row(cell, report.names[cell.environment])
            for cell in report.cells
            if id(cell) in shown
        ],
        "more_cells": len(report.cells) if len(report.cells) > _MAX_CELLS else 0,
    }


def _environment(report: Report, environment: Environment) -> dict[str, Any]:
    cells = [cell for cell in report.cells if cell.environment == environment]
    counts = [
        f"{count} {word}"
        for word in (CERTIFIED, MEASURED, AT_LEAST, BELOW, FAILED)
        if (count := report.count(word, environment))
    ]
    facts = [
        ("cells", ", ".join(counts)),
        *(("fits", text) for text in _largest(cells)),
        *((name, text) for name, text in environment.details.items() if text),
        ("last trial", max(cell.newest.time_utc for cell in cells)[:16].replace("T", " ")),
    ]
    return {"name": environment.name, "facts": facts}


def _largest(cells: Sequence[MeasuredCell]) -> list[str]:
    """Describe the limit at the greatest sequence length, for the two largest models."""
    known = [cell for cell in cells if cell.max_batch is not None and cell.is_of_search]
    models = sorted({cell.model for cell in known}, key=_by_size(known))[-2:]
    tasks = sorted({cell.task for cell in known})
    lines = []
    for model, task in itertools.product(reversed(models), tasks):
        of_model = [cell for cell in known if (cell.model, cell.task) == (model, task)]
        if not of_model:
            continue
        seq_len = max(cell.newest.seq_len for cell in of_model)
        some = [
            f"{limit_text(cell).rstrip('*')} with {cell.levers_text}"
            for cell in of_model
            if cell.newest.seq_len == seq_len
        ]
        lines.append(f"{system_name(model)}, {task}, {seq_len} tokens: {', '.join(some[:4])}")
    return lines


def _by_size(cells: Sequence[MeasuredCell]) -> Any:
    sizes = {
        cell.model: (cell.workload.config.hidden_size, cell.workload.config.num_hidden_layers)
        for cell in cells
        if cell.workload is not None
    }
    return lambda model: (sizes.get(model, (0, 0)), model)


_PLAN_COLUMNS = [
    Column("model", "left"), Column("tokens"), Column("task", "left"), Column("budget"),
    Column("micro-batch"), Column("count"), Column("checkpointing", "left"), Column("peak"),
    Column("seconds a batch"), Column("tried", "left"), Column("where", "left"),
]  # fmt: skip


def _plan_row(recommendation: Recommendation, where: str) -> list[Entry]:
    plan = recommendation.plan
    first = [
        Entry(system_name(recommendation.workload.model)),
        _number(recommendation.workload.seq_len),
        Entry(recommendation.task),
        _bytes(recommendation.environment.budget_bytes),
    ]
    if not isinstance(plan, Plan):
        return [*first, _MISSING, _MISSING, Entry(str(plan), css="bad"), _MISSING, _MISSING,
                Entry(""), Entry(where)]  # fmt: skip
    chosen, trial = plan.chosen, recommendation.trial
    tried = "predicted" if trial is None else "fits"
    if trial is not None and trial.peak_bytes:
        tried = f"fits, {format_bytes(trial.peak_bytes)}"
    return [
        *first,
        _number(chosen.step.micro_batch),
        _number(chosen.step.levers.accumulation_steps),
        Entry(chosen.step.levers.describe()),
        _bytes(chosen.footprint.peak_bytes),
        _decimal(chosen.predicted_step_seconds),
        Entry(tried, css="good" if trial else ""),
        Entry(where),
    ]


def _commands(recommendation: Recommendation, where: str) -> dict[str, str]:
    workload = recommendation.workload
    title = f"{system_name(workload.model)}, {workload.seq_len} tokens, {recommendation.task}, "
    if not isinstance(recommendation.plan, Plan):
        return {"title": f"{title}{where}: does not fit", "commands": str(recommendation.plan)}
    chosen = recommendation.plan.chosen
    setting = describe_setting(chosen.step)
    return {"title": f"{title}{where}: {setting}", "commands": "\n".join(recommendation.commands)}


_RUN_COLUMNS = [
    Column("run", "left"), Column("task", "left"), Column("effective batch"),
    Column("micro-batch"), Column("checkpointing", "left"), Column("steps done"),
    Column("steps planned"), Column("time"), Column("out of memory"), Column("scores", "message"),
]  # fmt: skip


def _run_row(run: Run) -> list[Entry]:
    summary = run.summary()
    scores = ", ".join(f"{name} {value:.4g}" for name, value in summary["scores"].items())
    seconds = summary["seconds"]
    return [
        Entry(summary["run"]),
        Entry(summary["task"]),
        _number(summary["batch"]),
        _number(summary["micro_batch"]),
        Entry(summary["checkpointing"]),
        _number(summary["steps"]),
        _number(summary["of_steps"]),
        Entry(describe_duration(seconds), seconds),
        _number(summary["steps_down"]),
        Entry(scores or "-"),
    ]


_CELL_COLUMNS = [
    Column("model", "left"), Column("tokens"), Column("task", "left"), Column("levers", "left"),
    Column("budget"), Column("largest"), Column("evidence", "left"), Column("published"),
    Column("ratio"), Column("peak"), Column("examples/s"), Column("trials"),
    Column("next batch", "message"), Column("where", "left"),
]  # fmt: skip


def _cell_row(cell: MeasuredCell, where: str) -> list[Entry]:
    row, fits, oom = cell.newest, cell.fits, cell.oom
    ratio = None
    if cell.published and cell.bounded_max_batch is not None:
        ratio = cell.bounded_max_batch / cell.published
    beyond = "" if oom is None else f"{oom.batch}: {oom.message}"
    if cell.limit.fits_again:
        batches = ", ".join(str(trial.batch) for trial in cell.limit.fits_again)
        beyond = f"{beyond}; above it fits again: {batches}"
    if cell.evidence == FAILED:
        beyond = row.trial.message
    return [
        Entry(system_name(cell.model)),
        _number(row.seq_len),
        Entry(cell.task),
        Entry(cell.levers_text),
        _bytes(row.budget_bytes),
        Entry(limit_text(cell), -1 if cell.max_batch is None else cell.max_batch),
        Entry(cell.evidence, css=_CSS.get(cell.evidence, "")),
        _number(cell.published),
        _decimal(ratio),
        _bytes(None if fits is None else fits.peak_bytes),
        _decimal(cell.examples_per_second),
        _number(len(cell.rows)),
        Entry(beyond),
        Entry(where),
    ]


_TRIAL_COLUMNS = [
    Column("time (UTC)", "left"), Column("model", "left"), Column("tokens"),
    Column("task", "left"), Column("levers", "left"), Column("budget"), Column("batch"),
    Column("outcome", "left"),
    Column("peak"), Column("process peak"), Column("seconds a step"), Column("examples/s"),
    Column("fresh", "left"), Column("message", "message"), Column("where", "left"),
]  # fmt: skip


def _trial_rows(report: Report) -> Iterable[list[Entry]]:
    cells = {cell.newest.question: cell for cell in report.cells}
    for row in reversed(report.rows[-_MAX_TRIALS:]):
        cell, trial = cells[row.question], row.trial
        yield [
            Entry(row.time_utc[:19].replace("T", " ")),
            Entry(system_name(cell.model)),
            _number(row.seq_len),
            Entry(cell.task),
            Entry(cell.levers_text),
            _bytes(row.budget_bytes),
            _number(trial.batch),
            Entry(trial.outcome, css=_CSS.get(trial.outcome, "")),
            _bytes(trial.peak_bytes),
            _bytes(trial.process_peak_bytes),
            _decimal(trial.step_seconds),
            _decimal(trial_rate(row, trial)),
            Entry("fresh" if trial.fresh else ""),
            Entry(trial.message),
            Entry(report.names[cell.environment]),
        ]


def _number(value: int | None) -> Entry:
    return _MISSING if value is None else Entry(f"{value:,}", value)


def _decimal(value: float | None) -> Entry:
    return _MISSING if value is None else Entry(f"{value:,.3g}", value)


def _bytes(value: int | None) -> Entry:
    return _MISSING if value is None else Entry(format_bytes(value), value)
