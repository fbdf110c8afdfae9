"""The report as one page of HTML that needs nothing but itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import jinja2

from bertbench.bytes import format_bytes
from bertbench.ledger import LedgerRow
from bertbench.planner import Plan, describe_setting
from bertbench.progress import Advance
from reports.cells import AT_LEAST, BELOW, CERTIFIED, FAILED, MEASURED, Cell, Place, trial_rate
from reports.planning import Planned
from reports.predictions import describe_errors
from reports.report import Report, version
from reports.runs import Run
from reports.tables import NOTE, limit_text, system_name

_MOST_PLACES, _MOST_TABLES, _MOST_CELLS, _MOST_TRIALS = 8, 12, 800, 1200


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table that sorts.

    Attributes:
        title: of it.
        css: class of its cells.
    """

    title: str
    css: str = ""

    @property
    def left(self) -> bool:
        """Whether it is of text."""
        return bool(self.css)


@dataclasses.dataclass(frozen=True)
class Value:
    """A cell of such a table.

    Attributes:
        text: what is seen.
        sort: number to sort by; None sorts by the text.
        css: class.
    """

    text: str
    sort: float | None = None
    css: str = ""


_MISSING = Value("-", -1.0)
_CSS = {CERTIFIED: "good", FAILED: "bad", "fits": "good", "failed": "bad"}


def build_page(report: Report, advance: Advance = lambda done, note: None) -> str:
    """Write the page.

    Args:
        report: what is in it.
        advance: called after each picture.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["zip"] = zip
    text = resources.files("reports").joinpath("templates/page.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(_values(report, advance))


def _values(report: Report, advance: Advance) -> dict[str, Any]:
    pictures = []
    for number, p in enumerate(report.pictures):
        pictures.append(
            {
                "name": p.name,
                "title": p.title,
                "caption": p.caption,
                "wide": p.wide,
                "svg": p.inline_svg(),
            }
        )
        advance(number + 1, p.name)
    cells = sorted(report.cells, key=lambda cell: -cell.newest.id)[:_MOST_CELLS]
    shown = {id(cell) for cell in cells}
    sections = {
        "summary": ("What fits", report.places),
        "plans": ("What to run", report.planned),
        "limits": ("Largest micro-batch", report.tables),
        "pictures": ("Pictures", pictures),
        "runs": ("Runs", report.runs),
        "cells": ("All cells", cells),
        "trials": ("Every trial", report.rows),
        "how": ("How it was measured", True),
    }
    return {
        "headline": report.headline,
        "made": report.made.strftime("%-d %B %Y, %H:%M %Z"),
        "version": version(),
        "ledger": report.ledger.name,
        "contents": [(name, title) for name, (title, there) in sections.items() if there],
        "places": [_place(report, place) for place in report.places[:_MOST_PLACES]],
        "more_places": max(len(report.places) - _MOST_PLACES, 0),
        "target_batch": report.target_batch,
        "plans": [_commands(planned) for planned in report.planned],
        "unplanned": report.unplanned,
        "plan_columns": _PLAN_COLUMNS,
        "plan_rows": [_plan_row(planned) for planned in report.planned],
        "tables": [
            {
                "title": table.title,
                "columns": list(table.frame.columns),
                "rows": list(table.frame.itertuples(index=False)),
            }
            for table in report.tables[:_MOST_TABLES]
        ],
        "more_tables": max(len(report.tables) - _MOST_TABLES, 0),
        "note": NOTE,
        "pictures": pictures,
        "errors": describe_errors(report.predictions),
        "run_columns": _RUN_COLUMNS,
        "run_rows": [_run_row(run) for run in report.runs],
        "cell_columns": _CELL_COLUMNS,
        # In the order of the report, which is that of the places and models.
        "cell_rows": [_cell_row(cell) for cell in report.cells if id(cell) in shown],
        "more_cells": len(report.cells) if len(report.cells) > _MOST_CELLS else 0,
        "trial_columns": _TRIAL_COLUMNS,
        "trial_rows": [_trial_row(row, names) for row, names in _newest(report)],
        "more_trials": len(report.rows) if len(report.rows) > _MOST_TRIALS else 0,
    }


def _place(report: Report, place: Place) -> dict[str, Any]:
    cells = [cell for cell in report.cells if cell.place == place]
    versions: dict[str, str] = json.loads(place.versions)
    counts = [
        f"{count} {word}"
        for word in (CERTIFIED, MEASURED, AT_LEAST, BELOW, FAILED)
        if (count := report.count(word, place))
    ]
    facts = [
        ("cells", ", ".join(counts)),
        *(("fits", text) for text in _largest(cells)),
        *([("driver", place.driver)] if place.driver else []),
        *((name, text) for name, text in versions.items()),
        ("last trial", max(cell.newest.time_utc for cell in cells)[:16].replace("T", " ")),
    ]
    return {"budget": format_bytes(place.budget_bytes), "device": place.device, "facts": facts}


def _largest(cells: Sequence[Cell]) -> list[str]:
    """For the largest models: how many examples fit, without and with checkpointing."""
    newest = sorted({cell.newest.model for cell in cells}, key=_by_size(cells))[-2:]
    lines = []
    for model in reversed(newest):
        seq_len = max(cell.newest.seq_len for cell in cells if cell.newest.model == model)
        some = [
            f"{limit_text(cell).rstrip('*')} with {cell.setting}"
            for cell in cells
            if (cell.newest.model, cell.newest.seq_len) == (model, seq_len)
            and cell.max_batch is not None
        ]
        if some:
            lines.append(f"{system_name(model)}, {seq_len} tokens: {', '.join(some[:4])}")
    return lines


def _by_size(cells: Sequence[Cell]) -> Any:
    sizes = {
        cell.newest.model: (
            0 if cell.workload is None else cell.workload.config.hidden_size,
            0 if cell.workload is None else cell.workload.config.num_hidden_layers,
        )
        for cell in cells
    }
    return lambda model: (sizes[model], model)


_PLAN_COLUMNS = [
    Column("model", "left"), Column("tokens"), Column("task", "left"), Column("budget"),
    Column("micro-batch"), Column("steps"), Column("checkpointing", "left"), Column("peak"),
    Column("seconds a batch"), Column("tried", "left"),
]  # fmt: skip


def _plan_row(planned: Planned) -> list[Value]:
    workload, plan = planned.workload, planned.plan
    first = [
        Value(system_name(workload.model)),
        _number(workload.seq_len),
        Value(workload.head),
        _bytes(planned.place.budget_bytes),
    ]
    if not isinstance(plan, Plan):
        return [*first, _MISSING, _MISSING, Value(str(plan), css="bad"), _MISSING, _MISSING,
                Value("")]  # fmt: skip
    chosen, trial = plan.chosen, planned.trial
    tried = "predicted"
    if trial is not None and trial.peak_bytes:
        tried = f"fits, {format_bytes(trial.peak_bytes)}"
    return [
        *first,
        _number(chosen.micro_batch),
        _number(chosen.levers.accumulation_steps),
        Value(chosen.levers.describe()),
        _bytes(chosen.footprint.peak_bytes),
        _decimal(chosen.predicted_step_seconds),
        Value(tried, css="good" if trial else ""),
    ]


def _commands(planned: Planned) -> dict[str, str]:
    workload = planned.workload
    title = f"{system_name(workload.model)}, {workload.seq_len} tokens, {workload.head}, "
    title += format_bytes(planned.place.budget_bytes)
    if isinstance(planned.plan, Plan):
        chosen = planned.plan.chosen
        title += f": {describe_setting(chosen.micro_batch, chosen.levers)}"
        return {"title": title, "commands": "\n".join(planned.commands)}
    return {"title": f"{title}: does not fit", "commands": str(planned.plan)}


_RUN_COLUMNS = [
    Column("run", "left"), Column("task", "left"), Column("batch"), Column("micro-batch"),
    Column("checkpointing", "left"), Column("steps"), Column("of"), Column("hours"),
    Column("stepped down"), Column("scores", "message"),
]  # fmt: skip


def _run_row(run: Run) -> list[Value]:
    summary = run.summary()
    scores = ", ".join(f"{name} {value:.4g}" for name, value in summary["scores"].items())
    return [
        Value(summary["run"]),
        Value(str(summary["task"])),
        _number(summary["batch"]),
        _number(summary["micro_batch"]),
        Value(str(summary["checkpointing"] or "-")),
        _number(summary["steps"]),
        _number(summary["of_steps"]),
        _decimal(summary["seconds"] / 3600),
        _number(summary["steps_down"]),
        Value(scores or "-"),
    ]


_CELL_COLUMNS = [
    Column("model", "left"), Column("tokens"), Column("task", "left"), Column("levers", "left"),
    Column("budget"), Column("largest"), Column("evidence", "left"), Column("published"),
    Column("ratio"), Column("peak"), Column("examples/s"), Column("trials"),
    Column("next batch", "message"), Column("device", "left"),
]  # fmt: skip


def _cell_row(cell: Cell) -> list[Value]:
    row, fits, oom = cell.newest, cell.fits, cell.oom
    ratio = None
    if cell.published and cell.max_batch is not None:
        ratio = cell.max_batch / cell.published
    beyond = "" if oom is None else f"{oom.batch}: {oom.message}"
    if cell.evidence == FAILED:
        beyond = row.trial.message
    return [
        Value(system_name(row.model)),
        _number(row.seq_len),
        Value(row.head),
        Value(cell.setting),
        _bytes(row.budget_bytes),
        Value(limit_text(cell), -1 if cell.max_batch is None else cell.max_batch),
        Value(cell.evidence, css=_CSS.get(cell.evidence, "")),
        _number(cell.published),
        _decimal(ratio),
        _bytes(None if fits is None else fits.peak_bytes),
        _decimal(cell.examples_per_second),
        _number(len(cell.rows)),
        Value(beyond),
        Value(row.device),
    ]


_TRIAL_COLUMNS = [
    Column("time (UTC)", "left"), Column("model", "left"), Column("tokens"),
    Column("levers", "left"), Column("budget"), Column("batch"), Column("outcome", "left"),
    Column("peak"), Column("process peak"), Column("seconds a step"), Column("examples/s"),
    Column("fresh", "left"), Column("message", "message"),
]  # fmt: skip


def _newest(report: Report) -> Iterable[tuple[LedgerRow, str]]:
    settings = {cell.newest.question: cell.setting for cell in report.cells}
    for row in reversed(report.rows[-_MOST_TRIALS:]):
        yield row, settings[row.question]


def _trial_row(row: LedgerRow, setting: str) -> list[Value]:
    trial = row.trial
    return [
        Value(row.time_utc[:19].replace("T", " ")),
        Value(system_name(row.model)),
        _number(row.seq_len),
        Value(setting),
        _bytes(row.budget_bytes),
        _number(trial.batch),
        Value(trial.outcome, css=_CSS.get(trial.outcome, "")),
        _bytes(trial.peak_bytes),
        _bytes(trial.process_peak_bytes),
        _decimal(trial.step_seconds),
        _decimal(trial_rate(row, trial)),
        Value("fresh" if trial.fresh else ""),
        Value(trial.message),
    ]


def _number(value: int | None) -> Value:
    return _MISSING if value is None else Value(f"{value:,}", value)


def _decimal(value: float | None) -> Value:
    return _MISSING if value is None else Value(f"{value:,.3g}", value)


def _bytes(value: int | None) -> Value:
    return _MISSING if value is None else Value(format_bytes(value), value)
