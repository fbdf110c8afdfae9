"""What a probe shows: the table that fills in, the trial that runs, and how long it may take."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bertbench.bytes import format_bytes
from bertbench.checking import Check
from bertbench.devices import Budget
from bertbench.paper import PUBLISHED_MAX_BATCH, published_ratio
from bertbench.probing import Cell
from bertbench.progress import describe_duration, say
from bertbench.trial import Trial
from bertbench.workload import Levers, Workload

_REFRESH_PER_SECOND = 4


@dataclasses.dataclass
class View:
    """State of what is shown; `shown` makes one.

    Attributes:
        budget: of the probe.
        levers: of all cells.
        workloads: of the cells, in their order.
        estimates: seconds that each of them was thought to take.
        live: the region of the terminal that is drawn again and again; None for lines.
        cells: finished ones.
        trials: of the cell that runs.
        running: batches that are being tried.
        began: when the cell that runs did, on the monotonic clock.
    """

    budget: Budget
    levers: Levers
    workloads: Sequence[Workload]
    estimates: Sequence[float]
    live: Live | None = None
    cells: list[Cell] = dataclasses.field(default_factory=list)
    trials: list[Trial] = dataclasses.field(default_factory=list)
    running: tuple[int, ...] = ()
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def title(self) -> str:
        """Number and name of the cell that runs."""
        workload = self.workloads[len(self.cells)]
        number = f"[{len(self.cells) + 1}/{len(self.workloads)}]"
        return f"{number} {workload.model} {workload.seq_len}"

    def attempt(self, batches: Sequence[int]) -> None:
        """Trials of these batches begin."""
        self.running = tuple(batches)

    def trial(self, trial: Trial) -> None:
        """A trial has ended."""
        self.trials.append(trial)
        self.running = tuple(batch for batch in self.running if batch != trial.batch)
        if self.live is None:
            left = self.left_seconds()
            more = f"; {describe_duration(left)} left" if left is not None else ""
            say(f"{self.title}: {describe(trial)}{more}")

    def cell(self, cell: Cell) -> None:
        """A cell has its answer."""
        if self.live is None and not cell.result.measured:
            say(f"{self.title}: known from the ledger")
        self.cells.append(cell)
        self.trials, self.running, self.began = [], (), time.monotonic()

    def left_seconds(self) -> float | None:
        """Time that is probably left, if the cells to come are off as the finished ones were."""
        measured = [
            (cell.seconds, estimate)
            for cell, estimate in zip(self.cells, self.estimates, strict=False)
            if cell.result.measured
        ]
        factor = 1.0
        if measured:
            factor = sum(s for s, _ in measured) / max(sum(e for _, e in measured), 1.0)
        this, *others = self.estimates[len(self.cells) :] or [0.0]
        elapsed = time.monotonic() - self.began
        return max(factor * this - elapsed, 0.1 * factor * this) + factor * sum(others)

    def __rich__(self) -> Group:
        """Draw the table and the line below it."""
        table = build_table(self.cells, self.workloads, self.levers)
        if len(self.cells) == len(self.workloads):
            return Group(table)
        line = f"{self.title}: "
        if self.running:
            line += f"trying batch {self.running[0]}"
        elif self.trials:
            line += describe(self.trials[-1])
        else:
            line += "looking into the ledger"
        left = self.left_seconds()
        elapsed = describe_duration(time.monotonic() - self.began)
        line += f", {elapsed}; about {describe_duration(left or 0.0)} left"
        found = "  ".join(_short(trial) for trial in self.trials)
        return Group(table, Text(line, style="dim"), Text(found, style="dim"))


@contextlib.contextmanager
def shown(
    budget: Budget, levers: Levers, workloads: Sequence[Workload], estimates: Sequence[float]
) -> Iterator[View]:
    """Show a probe while it runs: live on a terminal, a line for every trial elsewhere."""
    view = View(budget, levers, workloads, estimates)
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield view
        return
    # It is drawn on standard error and goes away in the end, when the result is printed.
    with Live(
        view, console=console, refresh_per_second=_REFRESH_PER_SECOND, transient=True
    ) as view.live:
        yield view


def describe(trial: Trial) -> str:
    """Write a trial as one line."""
    if trial.outcome == "fits":
        peak = f", peak {format_bytes(trial.peak_bytes)}" if trial.peak_bytes else ""
        return f"batch {trial.batch} fits{peak}"
    if trial.outcome == "oom":
        return f"batch {trial.batch} runs out of memory"
    return f"batch {trial.batch} failed ({trial.message})"


def _short(trial: Trial) -> str:
    return f"{trial.batch} {'✓' if trial.outcome == 'fits' else '✗'}"


def headline(budget: Budget, levers: Levers) -> str:
    """Say what was measured where."""
    return (
        f"largest batch, {format_bytes(budget.budget_bytes)} on {budget.device.name}, "
        f"checkpointing {levers.describe()}"
    )


def build_table(cells: Sequence[Cell], workloads: Sequence[Workload], levers: Levers) -> Table:
    """Make the table of results; cells that are not finished have empty rows."""
    published = any((w.model, w.seq_len) in PUBLISHED_MAX_BATCH for w in workloads)
    # With the published numbers beside them, eighty columns leave one space between two.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if published else (0, 1))
    titles = ["model", "seq", "max batch", "peak", "examples/s", "trials", "evidence"]
    if published:
        titles += ["Titan X", "ratio"]
    for title in titles:
        left = title in ("model", "evidence")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for index, workload in enumerate(workloads):
        row = [workload.model, str(workload.seq_len)]
        if index < len(cells):
            row += _results(cells[index], levers)
            if published:
                known = PUBLISHED_MAX_BATCH.get((workload.model, workload.seq_len))
                row.append("-" if known is None else str(known))
                row.append(published_ratio(workload, cells[index].result.max_batch))
        table.add_row(*row)
    return table


def _results(cell: Cell, levers: Levers) -> list[str]:
    result = cell.result
    best = result.certificate.fits if result.certificate else None
    best = best or next(
        (t for t in result.trials if t.batch == result.max_batch and t.outcome == "fits"), None
    )
    rate = "-"
    if best and best.step_seconds:
        rate = f"{best.batch * levers.accumulation_steps / best.step_seconds:.1f}"
    return [
        f"{'≥ ' if result.stopped_by == 'max_batch' else ''}{result.max_batch}",
        format_bytes(best.peak_bytes) if best and best.peak_bytes else "-",
        rate,
        str(result.measured),
        _evidence(cell),
    ]


def _evidence(cell: Cell) -> str:
    result = cell.result
    if result.stopped_by == "failed":
        return "failed"
    if result.stopped_by == "max_batch":
        return "not the limit"
    if result.contradictions:
        return "contradictory"
    return "certified" if result.certificate else "not certified"


def build_check_table(checks: Sequence[Check]) -> Table:
    """Make the table of certificates that were checked."""
    table = Table(box=None, pad_edge=False)
    for title in ("model", "seq", "checkpointing", "fits", "out of memory", "certificate"):
        left = title in ("model", "checkpointing", "certificate")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for check in checks:
        claim = check.claim
        wrong = {trial.batch for trial in check.wrong}
        table.add_row(
            claim.workload.model,
            str(claim.workload.seq_len),
            claim.levers.describe(),
            "-" if not claim.fits else f"{claim.fits}{' no' if claim.fits in wrong else ''}",
            f"{claim.oom}{' no' if claim.oom in wrong else ''}",
            "does not hold" if wrong else "holds",
        )
    return table
