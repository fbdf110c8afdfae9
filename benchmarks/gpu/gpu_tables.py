"""Rows and Markdown tables of what `measure.py` has measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_parts import Timing, peak_on_capped_cpu, plan_timing, settled

from bertbench.core.units import MIB_BYTES, format_bytes
from bertbench.core.workload import Levers, Setup, Workload
from bertbench.hardware.device import Budget
from bertbench.ledger.database import Ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import find, read_rows
from bertbench.planning.planner import Plan, describe_planned_step, describe_setting

Row = dict[str, Any]


def cell_row(
    budget: Budget,
    workload: Workload,
    levers: Levers,
    capped_cpu_max_batch: int | None,
    ledger: Ledger,
) -> Row:
    """A cell: its limit, and the peak of every batch that fits beside that of a capped CPU."""
    trials = find(ledger, Question(budget, Setup(workload, levers)))
    result = settled(trials, budget)
    peaks = [
        {
            "batch": trial.batch,
            "peak_bytes": trial.peak_bytes,
            "capped_cpu_peak_bytes": peak_on_capped_cpu(budget, workload, levers, trial.batch),
            "process_peak_bytes": trial.process_peak_bytes,
        }
        for trial in trials
        if trial.outcome == "fits" and trial.fresh
    ]
    certificate = result.certificate if result else None
    return {
        "model": workload.model,
        "seq_len": workload.seq_len,
        "checkpointing": str(levers.checkpointing),
        "max_batch": result.max_batch if result else None,
        "capped_cpu_max_batch": capped_cpu_max_batch,
        "certificate": certificate.to_json() if certificate else None,
        "contradictions": len(result.contradictions) if result else None,
        "trials": len(trials),
        "peaks": peaks,
    }


def failures(ledger: Ledger) -> list[Row]:
    """Trials that failed for another reason than memory, and to no better end since."""
    failed: dict[tuple[Any, ...], Row] = {}
    for row in read_rows(ledger):
        name = (row.question, row.trial.batch)
        if row.trial.outcome == "failed":
            failed[name] = row.to_json()
        else:
            failed.pop(name, None)
    return list(failed.values())


def speed_rows(timing: Timing, ledger: Ledger) -> list[Row]:
    """A row for every micro-batch that was tried."""
    answers = timing.answers(ledger)
    steps = timing.setup.levers.accumulation_steps
    return [
        {
            "model": timing.setup.workload.model,
            "seq_len": timing.setup.workload.seq_len,
            "levers": timing.setup.levers.to_json(),
            "setting": describe_setting(timing.setup.step(batch)),
            "batch": batch,
            "outcome": trial.outcome,
            "step_seconds": trial.step_seconds,
            "examples_per_second": (
                batch * steps / trial.step_seconds if trial.step_seconds else None
            ),
            "peak_bytes": trial.peak_bytes,
        }
        for batch, trial in sorted(answers.items())
    ]


def plan_row(target: int, budget: Budget, plan: Plan | None, ledger: Ledger) -> Row:
    """A plan and the trial of it."""
    row: Row = {"target_batch": target, "budget_bytes": budget.budget_bytes, "plan": None}
    if plan is None:
        return row
    chosen = plan.chosen
    trial = plan_timing(plan, budget).answers(ledger).get(chosen.step.micro_batch)
    return {
        **row,
        "plan": describe_planned_step(chosen),
        "predicted_peak_bytes": chosen.footprint.peak_bytes,
        "predicted_step_seconds": chosen.predicted_step_seconds,
        "outcome": trial.outcome if trial else None,
        "peak_bytes": trial.peak_bytes if trial else None,
        "step_seconds": trial.step_seconds if trial else None,
    }


def choice_row(workload: Workload, timings: Sequence[Timing], ledger: Ledger) -> Row:
    """Seconds of a plan, which comes first, and of its rivals; its regret beside those timed."""
    seconds: dict[str, float | None] = {}
    for timing in timings:
        (batch,) = timing.batches
        trial = timing.answers(ledger).get(batch)
        seconds[describe_setting(timing.setup.step(batch))] = trial.step_seconds if trial else None
    plan = next(iter(seconds), None)
    timed = [value for value in seconds.values() if value is not None]
    regret = None
    if plan is not None and (of_plan := seconds[plan]) is not None and len(timed) > 1:
        regret = of_plan / min(timed)
    return {
        "model": workload.model,
        "seq_len": workload.seq_len,
        "plan": plan,
        "seconds": seconds,
        "regret": regret,
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """Write all rows as tables."""
    device, budget_bytes = results["budget"]["device"], results["budget"]["budget_bytes"]
    driver = f", driver {device['driver']}" if device["driver"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(
        [
            f"# {device['name']}, {format_bytes(budget_bytes)}",
            "",
            f"{versions}{driver}",
            *_limits(results["cells"]),
            *_peaks(results["cells"], budget_bytes),
            *_speed(results["speed"]),
            *_plans(results["plans"]),
            *_choice(results["choice"]),
            *_placement(results["placement"]),
            *_peer(results["peer"]),
            *_failures(results["failures"]),
            "",
        ]
    )


def _limits(cells: Sequence[Row]) -> list[str]:
    policies = list(dict.fromkeys(cell["checkpointing"] for cell in cells))
    shapes = list(dict.fromkeys((cell["model"], cell["seq_len"]) for cell in cells))
    by_name = {(c["model"], c["seq_len"], c["checkpointing"]): c for c in cells}

    def text(cell: Row) -> str:
        found = "?" if cell["max_batch"] is None else str(cell["max_batch"])
        if cell["max_batch"] is not None and cell["certificate"] is None:
            found = f"at least {found}"
        capped = cell["capped_cpu_max_batch"]
        return found if capped is None else f"{found} ({capped})"

    rows = [
        [model, seq_len, *(text(by_name[model, seq_len, policy]) for policy in policies)]
        for model, seq_len in shapes
    ]
    return [
        *_heading("Largest micro-batch, certified (in brackets: of a capped CPU, predicted)"),
        *_table(["model", "seq", *policies], rows),
    ]


def _peaks(cells: Sequence[Row], budget_bytes: int) -> list[str]:
    rows = []
    for policy in dict.fromkeys(cell["checkpointing"] for cell in cells):
        peaks = [p for cell in cells if cell["checkpointing"] == policy for p in cell["peaks"]]
        errors = [
            p["peak_bytes"] / p["capped_cpu_peak_bytes"] - 1
            for p in peaks
            if p["peak_bytes"] and p["capped_cpu_peak_bytes"]
        ]
        outside = [p["process_peak_bytes"] - budget_bytes for p in peaks if p["process_peak_bytes"]]
        if errors:
            rows.append(
                [
                    policy,
                    len(errors),
                    f"{statistics.median(errors):+.2%}",
                    f"{min(errors):+.2%} to {max(errors):+.2%}",
                    f"{max(outside) / MIB_BYTES:,.0f} MiB" if outside else "-",
                ]
            )
    if not rows:
        return []
    head = ["checkpointing", "trials", "median", "range", "process beyond the budget, at most"]
    return [*_heading("Peaks, beside those of a capped CPU"), *_table(head, rows)]


def _speed(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    batches = sorted({row["batch"] for row in rows})
    lines: dict[tuple[str, int, str, str], dict[int, str]] = {}
    for row in rows:
        levers = row["levers"]
        name = levers["precision"] + ", XLA" * levers["xla"]
        key = (row["model"], row["seq_len"], name, levers["checkpointing"])
        rate = row["examples_per_second"]
        lines.setdefault(key, {})[row["batch"]] = f"{rate:,.1f}" if rate else row["outcome"]
    table = [[*key, *(line.get(batch, "") for batch in batches)] for key, line in lines.items()]
    head = ["model", "seq", "precision", "checkpointing", *map(str, batches)]
    return [*_heading("Examples a second by micro-batch"), *_table(head, table)]


def _plans(rows: Sequence[Row]) -> list[str]:
    head = ["target", "budget", "plan", "peak (predicted)", "seconds (predicted)"]
    return [
        *_heading("Plans"),
        *_table(head, [_plan(row) for row in rows]),
    ]


def _plan(row: Row) -> list[Any]:
    start = [row["target_batch"], format_bytes(row["budget_bytes"])]
    if row["plan"] is None:
        return [*start, "nothing fits", "", ""]
    peak = format_bytes(row["peak_bytes"]) if row["peak_bytes"] else row["outcome"] or "?"
    seconds = f"{row['step_seconds']:.3f}" if row["step_seconds"] else "?"
    return [
        *start,
        row["plan"],
        f"{peak} ({format_bytes(row['predicted_peak_bytes'])})",
        f"{seconds} ({row['predicted_step_seconds']:.3f})",
    ]


def _choice(rows: Sequence[Row]) -> list[str]:
    table = []
    for row in rows:
        for setting, seconds in row["seconds"].items():
            is_plan = setting == row["plan"]
            table.append(
                [
                    row["model"],
                    row["seq_len"],
                    f"{setting}{' (plan)' if is_plan else ''}",
                    f"{seconds:.3f}" if seconds else "?",
                    f"{row['regret']:.3f}" if is_plan and row["regret"] else "",
                ]
            )
    if not table:
        return []
    head = ["model", "seq", "setting", "seconds", "regret"]
    return [*_heading("The plan beside the settings found fastest"), *_table(head, table)]


def _placement(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    table = [
        [
            row["setting"],
            format_bytes(row["peak_bytes"]) if row["peak_bytes"] else row["outcome"],
            f"{row['step_seconds']:.3f}" if row["step_seconds"] else "",
        ]
        for row in rows
    ]
    return [
        *_heading("The optimizer's state on the host"),
        *_table(["setting", "peak", "seconds"], table),
    ]


def _peer(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    batches = sorted({int(batch) for row in rows for batch in row["examples_per_second"]})
    table = [
        [
            row["model"],
            row["seq_len"],
            row["attention"],
            row["checkpointing"],
            "-" if row["max_batch"] is None else row["max_batch"],
            *(
                f"{rate:,.1f}" if (rate := row["examples_per_second"].get(str(batch))) else ""
                for batch in batches
            ),
        ]
        for row in rows
    ]
    head = ["model", "seq", "attention", "checkpointing", "largest", *map(str, batches)]
    packages = f"PyTorch {rows[0]['torch']}, transformers {rows[0]['transformers']}"
    return [
        *_heading(f"{packages}: largest batch, examples a second by batch"),
        *_table(head, table),
    ]


def _failures(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    causes: dict[str, list[str]] = {}
    for row in rows:
        levers = row["levers"]
        setting = f"{levers['checkpointing']} {levers['precision']}"
        causes.setdefault(row["message"], []).append(
            f"{row['model']} {row['seq_len']} batch {row['batch']} {setting}"
        )
    lines = [
        f"- {len(trials)} times, first {trials[0]}: {cause}" for cause, trials in causes.items()
    ]
    return [*_heading("Trials that failed"), *lines]


def _heading(text: str) -> list[str]:
    return ["", f"## {text}", ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]
