"""What `bertbench probe` shows: a table of results, the running trials, and the time left."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bertbench.core.progress import describe_duration
from bertbench.core.published import PUBLISHED_MAX_BATCH, published_ratio
from bertbench.core.terminal import PlainConsole, clean_text, say, terminal
from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers, Workload
from bertbench.hardware.device import Budget
from bertbench.ledger.limit import find_limit
from bertbench.probing.cell import ProbedCell
from bertbench.probing.recheck import Check
from bertbench.trials.trial import Trial

_REFRESH_PER_SECOND = 4
_SHOWN = 6

_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclasses.dataclass
class _Running:
    """A cell that is being probed.

    Attributes:
        device: label of the device that it is probed on, such as `gpu:0`.
        began: reading of `time.monotonic` at the start.
        trials: trials that have ended.
        batches: batches whose trials are running or next.
    """

    device: str
    began: float
    trials: list[Trial] = dataclasses.field(default_factory=list)
    batches: tuple[int, ...] = ()


def _exclusively(method: _Method) -> _Method:
    """Make a method of `View` hold the view's lock, so that one thread at a time changes it."""

    @functools.wraps(method)
    def alone(view: View, *arguments: Any) -> Any:
        with view.lock:
            return method(view, *arguments)

    return cast(_Method, alone)


@dataclasses.dataclass
class View:
    """The state of a probe as it is shown; `shown` makes one. Several threads may report to it.

    A cell is named by its index, the place of its workload in `workloads`.

    Attributes:
        workloads: the workload of each cell.
        estimates: seconds that each cell was predicted to take.
        workers: number of cells that are probed at the same time.
        live: the region of the terminal that is drawn again and again; None prints a line for
            each trial instead.
        cells: the finished cells, by index.
        running: the cells that are being probed, by index.
        lock: held while `cells` or `running` is read or changed.
    """

    workloads: Sequence[Workload]
    estimates: Sequence[float]
    workers: int = 1
    live: Live | None = None
    cells: dict[int, ProbedCell] = dataclasses.field(default_factory=dict)
    running: dict[int, _Running] = dataclasses.field(default_factory=dict)
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    @_exclusively
    def title(self, index: int) -> str:
        """Return a cell's number, its device if there are several, and its workload.

        For example `[1/6] bert-base 64`, or `[1/6] gpu:0 bert-base 64`.
        """
        workload = self.workloads[index]
        device = f" {self.running[index].device}" if self.workers > 1 else ""
        return f"[{index + 1}/{len(self.workloads)}]{device} {describe_workload(workload)}"

    @_exclusively
    def begin(self, index: int, device: str) -> None:
        """Note that a cell is being probed now, on the device with this label."""
        self.running[index] = _Running(device, time.monotonic())

    @_exclusively
    def attempt(self, index: int, batches: Sequence[int]) -> None:
        """Note that trials of these batches of a cell begin."""
        self.running[index].batches = tuple(batches)

    @_exclusively
    def trial(self, index: int, trial: Trial) -> None:
        """Note that a trial of a cell has ended, and print a line unless the view is live."""
        running = self.running[index]
        running.trials.append(trial)
        running.batches = tuple(batch for batch in running.batches if batch != trial.batch)
        if self.live is None:
            left = describe_duration(self.left_seconds())
            say(f"{self.title(index)}: {describe_trial(trial)}; {left} left")

    @_exclusively
    def cell(self, index: int, cell: ProbedCell) -> None:
        """Note that a cell is finished."""
        if self.live is None and not cell.result.measured:
            say(f"{self.title(index)}: known from the ledger")
        self.cells[index] = cell
        del self.running[index]

    def finished(self) -> list[ProbedCell]:
        """Return the finished cells, in the order of their indices."""
        return [cell for _, cell in sorted(self.cells.items())]

    @_exclusively
    def left_seconds(self) -> float:
        """Predict the seconds that are left.

        The estimates of the cells to come are corrected by one factor: measured seconds of the
        finished cells, divided by their estimates.
        """
        measured = [
            (cell.seconds, self.estimates[index])
            for index, cell in tuple(self.cells.items())
            if cell.result.measured
        ]
        factor = 1.0
        if measured:
            factor = sum(s for s, _ in measured) / max(sum(e for _, e in measured), 1.0)
        left = 0.0
        for index, estimate in enumerate(self.estimates):
            if index in self.cells:
                continue
            began = self.running[index].began if index in self.running else time.monotonic()
            elapsed = time.monotonic() - began
            left += max(factor * estimate - elapsed, 0.1 * factor * estimate)
        return left / self.workers

    @_exclusively
    def __rich__(self) -> Group:
        """Return the table, and below it a line for each cell that is being probed."""
        table = build_table(self.cells, self.workloads)
        lines = []
        for index, running in tuple(self.running.items()):
            what = "looking into the ledger"
            if running.batches:
                what = f"trying batch {running.batches[0]}"
            elif running.trials:
                what = describe_trial(running.trials[-1])
            elapsed = describe_duration(time.monotonic() - running.began)
            tried = "".join(
                f"  {t.batch} {'✓' if t.outcome == 'fits' else '✗'}" for t in running.trials
            )
            line = clean_text(f"{self.title(index)}: {what}, {elapsed}{tried}")
            lines.append(Text(line, style="dim"))
        if lines:
            left = describe_duration(self.left_seconds())
            lines.append(Text(f"about {left} left", style="dim"))
        return Group(table, *lines)


@contextlib.contextmanager
def shown(
    workloads: Sequence[Workload], estimates: Sequence[float], workers: int = 1
) -> Iterator[View]:
    """Show a probe inside the block: a live table on a terminal, elsewhere a line for each trial.

    Example:
        >>> with shown([workload], [60.0]) as view:
        ...     view.begin(0, "cpu")
        ...     view.trial(0, Trial(8, "fits"))
    """
    view = View(workloads, estimates, workers)
    console = PlainConsole(stderr=True)
    if not console.is_terminal:
        yield view
        return
    # The live table is drawn on standard error. It is erased at the end, before the results are
    # printed on standard output.
    with Live(
        view, console=console, refresh_per_second=_REFRESH_PER_SECOND, transient=True
    ) as view.live:
        yield view


def describe_workload(workload: Workload) -> str:
    """Name a workload for people: `bert-base 128`."""
    return f"{workload.model} {workload.seq_len}"


def describe_trial(trial: Trial) -> str:
    """Write a trial as one line: `batch 8 fits, peak 1,200 MiB`."""
    if trial.outcome == "fits":
        peak = f", peak {format_bytes(trial.peak_bytes)}" if trial.peak_bytes else ""
        return f"batch {trial.batch} fits{peak}"
    if trial.outcome == "oom":
        return f"batch {trial.batch} runs out of memory"
    return f"batch {trial.batch} failed ({trial.message})"


def show_results(view: View, budget: Budget, levers: Levers) -> None:
    """Show the finished cells, and for cells that were interrupted the largest batch that fits."""
    console = terminal()
    console.print(headline(budget, levers), soft_wrap=True)
    cells = view.finished()
    finished = [workload for index, workload in enumerate(view.workloads) if index in view.cells]
    console.print(build_table(dict(enumerate(cells)), finished))
    for cell in cells:
        for line in describe_holes(cell):
            console.print(line, soft_wrap=True)
    for index, running in view.running.items():
        fitting = find_limit(running.trials).max_batch or 0
        console.print(
            f"interrupted at {view.title(index)}: batch {fitting} fits; the same command goes on "
            "from there",
            soft_wrap=True,
        )


def show_checks(checks: Sequence[Check], others: int) -> None:
    """Show the certificates that were checked, and the number of cells without one."""
    console = terminal()
    console.print(build_check_table(checks))
    if others:
        console.print(f"{others} more without a certificate, not checked", soft_wrap=True)


def headline(budget: Budget, levers: Levers) -> str:
    """Return the line above the results: budget, device and checkpointing."""
    size = format_bytes(budget.budget_bytes)
    if budget.device.kind == "tpu":
        size = "all memory of a core"  # a TPU does not tell how many bytes that is
    return f"largest batch, {size} on {budget.device.name}, checkpointing {levers.describe()}"


def build_table(cells: Mapping[int, ProbedCell], workloads: Sequence[Workload]) -> Table:
    """Make the table of results.

    Args:
        cells: finished cells, by index; the rows of other cells have no results yet.
        workloads: the workload of each row.
    """
    table, published = results_table(workloads, ("peak", "examples/s", "trials"))
    for index, workload in enumerate(workloads):
        row = [workload.model, str(workload.seq_len)]
        if index in cells:
            row += _results(cells[index])
            if published:
                row += published_columns(workload, cells[index].result.max_batch)
        table.add_row(*row)
    return table


def results_table(workloads: Sequence[Workload], measures: Sequence[str]) -> tuple[Table, bool]:
    """Make an empty table of largest batches.

    Args:
        workloads: of its rows.
        measures: titles of the columns between the largest batch and the evidence.

    Returns:
        The table, and whether it ends with the columns of `published_columns`.
    """
    published = any((w.model, w.seq_len) in PUBLISHED_MAX_BATCH for w in workloads)
    # With the published numbers beside them, eighty columns leave one space between two.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if published else (0, 1))
    titles = ["model", "seq", "max batch", *measures, "evidence"]
    if published:
        titles += ["Titan X", "ratio"]
    for title in titles:
        left = title in ("model", "evidence")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    return table, published


def published_columns(workload: Workload, max_batch: int) -> list[str]:
    """The published maximum batch, and a largest batch as a multiple of it."""
    known = PUBLISHED_MAX_BATCH.get((workload.model, workload.seq_len))
    return ["-" if known is None else str(known), published_ratio(workload, max_batch)]


def describe_holes(cell: ProbedCell) -> list[str]:
    """Return lines about batches near the limit that end otherwise than the limit says.

    These are batches above the limit that fit, and batches below it that do not. The first line is
    of trials. The others are predicted by the step's trace, for batches that were not tried.
    """
    title = describe_workload(cell.setup.workload)
    measured = sorted({(a.batch, b.batch) for a, b in cell.result.contradictions})
    pairs = "; ".join(
        f"batch {larger} fits although {smaller} ran out of memory"
        for smaller, larger in measured[:_SHOWN]
    )
    more = "; ..." if len(measured) > _SHOWN else ""
    found = [f"{title}: {pairs}{more}"] if measured else []
    return found + [
        f"{title}: {where} {cell.result.max_batch} these {what}, as memory is in other pieces "
        f"(predicted, not measured): {', '.join(map(str, batches[:_SHOWN]))}"
        + (", ..." if len(batches) > _SHOWN else "")
        for where, what, batches in (
            ("above", "fit again", cell.holes.fits_again),
            ("below", "do not fit", cell.holes.runs_out_below),
        )
        if batches
    ]


def _results(cell: ProbedCell) -> list[str]:
    result = cell.result
    best = result.certificate.fits if result.certificate else None
    best = best or next(
        (t for t in result.trials if t.batch == result.max_batch and t.outcome == "fits"), None
    )
    rate = cell.examples_per_second(best) if best else None
    return [
        f"{'≥ ' if result.stopped_by == 'max_batch' else ''}{result.max_batch}",
        format_bytes(best.peak_bytes) if best and best.peak_bytes else "-",
        "-" if rate is None else f"{rate:.1f}",
        str(result.measured),
        _evidence(cell),
    ]


def _evidence(cell: ProbedCell) -> str:
    result = cell.result
    if result.stopped_by == "failed":
        return "failed"
    if result.stopped_by == "max_batch":
        return "not the limit"
    return "certified" if result.certificate else "not certified"


def build_check_table(checks: Sequence[Check]) -> Table:
    """Make the table of certificates that were checked, with ` no` after each wrong batch."""
    table = Table(box=None, pad_edge=False)
    for title in ("model", "seq", "checkpointing", "fits", "out of memory", "certificate"):
        left = title in ("model", "checkpointing", "certificate")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for check in checks:
        claim = check.claim
        wrong = {trial.batch for trial in check.wrong}
        table.add_row(
            claim.setup.workload.model,
            str(claim.setup.workload.seq_len),
            claim.setup.levers.describe(),
            "-" if not claim.fits else f"{claim.fits}{' no' if claim.fits in wrong else ''}",
            f"{claim.oom}{' no' if claim.oom in wrong else ''}",
            "does not hold" if wrong else "not checked" if check.failed else "holds",
        )
    return table
