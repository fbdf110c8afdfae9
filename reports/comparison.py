"""Two sets of measurements side by side: two devices, two versions, before and after a change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bertbench.core.terminal import terminal
from bertbench.devices.device import Budget
from bertbench.ledger.database import read_ledger
from bertbench.ledger.question import QuestionKey
from bertbench.ledger.records import LedgerRow, read_rows
from bertbench.probe.probe_file import ProbeFile, read_probe_file
from finetune.errors import InputError
from finetune.storage.json_files import json_text
from reports.environments import name_environments
from reports.measured_cells import MeasuredCell, collect_cells, levers_order, model_order
from reports.tables import count_cells, limit_text, system_name

_SQLITE = b"SQLite format 3\x00"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same cell in both.

    Attributes:
        before: of the first.
        after: of the second.
    """

    before: MeasuredCell
    after: MeasuredCell

    @property
    def limit_ratio(self) -> float | None:
        """Largest batch of the second, in those of the first.

        None where one is 0 or no limit: what is known of it is that this many fit, at least.
        """
        before, after = self.before.bounded_max_batch, self.after.bounded_max_batch
        return after / before if before and after else None

    @property
    def budgets_differ(self) -> bool:
        """Whether one had more memory."""
        return self.before.newest.budget_bytes != self.after.newest.budget_bytes

    @property
    def peak_ratio(self) -> float | None:
        """Geometric mean of the ratios of peaks at the batches that both have."""
        peaks = [
            {row.trial.batch: row.trial.peak_bytes for row in cell.rows if row.trial.peak_bytes}
            for cell in (self.before, self.after)
        ]
        return _mean_ratio(*peaks)

    @property
    def speed_ratio(self) -> float | None:
        """The same of examples a second."""
        return _mean_ratio(self.before.rates, self.after.rates)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        row = self.before.newest
        return {
            "model": self.before.model,
            "head": row.head,
            "seq_len": row.seq_len,
            "levers": row.levers,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "max_batch_ratio": self.limit_ratio,
            "peak_ratio": self.peak_ratio,
            "examples_per_second_ratio": self.speed_ratio,
        }


@dataclasses.dataclass(frozen=True)
class Spread:
    """Ratios of many cells.

    Attributes:
        count: of them.
        mean: their geometric mean.
        least: of them.
        most: of them.
    """

    count: int
    mean: float
    least: float
    most: float

    def __str__(self) -> str:
        """Write it for people."""
        return f"{self.mean:.3f} ({self.least:.3f} to {self.most:.3f}, {count_cells(self.count)})"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sets of cells.

    Attributes:
        pairs: cells of both.
        only_before: number of cells of the first that are in no pair.
        only_after: number of cells of the second that are in no pair.
    """

    pairs: tuple[Pair, ...]
    only_before: int
    only_after: int

    @property
    def spreads(self) -> dict[str, Spread | None]:
        """Ratios of all pairs by what they are of."""
        return {
            "max_batch": _spread([pair.limit_ratio for pair in self.pairs]),
            "peak_bytes": _spread([pair.peak_ratio for pair in self.pairs]),
            "examples_per_second": _spread([pair.speed_ratio for pair in self.pairs]),
        }

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        spreads = {
            name: None if spread is None else dataclasses.asdict(spread)
            for name, spread in self.spreads.items()
        }
        return {
            "ratios": spreads,
            "pairs": [pair.to_json() for pair in self.pairs],
            "only_before": self.only_before,
            "only_after": self.only_after,
        }


def compare_cells(before: Sequence[MeasuredCell], after: Sequence[MeasuredCell]) -> Comparison:
    """Pair cells of the same model, task, length and levers.

    On the same device under the same budget, or else under the same budget, or else, if there is no
    such pair, the newest of each. No cell is in two pairs; of several the newest come first.
    """
    groups: tuple[dict[tuple[Any, ...], list[MeasuredCell]], ...] = ({}, {})
    for cells, group in zip((before, after), groups, strict=True):
        for cell in sorted(cells, key=lambda cell: -cell.newest.id):
            group.setdefault(_key(cell), []).append(cell)
    pairs: list[Pair] = []
    for key in [key for key in groups[0] if key in groups[1]]:
        first, second = list(groups[0][key]), list(groups[1][key])
        found = _matched(
            first, second, lambda cell: (cell.environment.device, cell.environment.budget_bytes)
        )
        found += _matched(first, second, lambda cell: cell.environment.budget_bytes)
        pairs += found or [Pair(first[0], second[0])]
    pairs.sort(key=lambda pair: _order(pair.before))
    return Comparison(tuple(pairs), len(before) - len(pairs), len(after) - len(pairs))


def _matched(
    first: list[MeasuredCell], second: list[MeasuredCell], by: Callable[[MeasuredCell], Any]
) -> list[Pair]:
    """Take pairs with the same of something out of two lists."""
    pairs = []
    for cell in list(first):
        other = next((other for other in second if by(other) == by(cell)), None)
        if other is not None:
            pairs.append(Pair(cell, other))
            first.remove(cell)
            second.remove(other)
    return pairs


def _key(cell: MeasuredCell) -> tuple[Any, ...]:
    """What cells have in common that are compared: names only where this version knows no more."""
    row = cell.newest
    levers = json_text(row.levers, sort_keys=True) if cell.levers is None else cell.levers.key()
    if cell.workload is None:
        return row.model, row.head, row.seq_len, levers
    return cell.workload.key(), levers


def _order(cell: MeasuredCell) -> tuple[Any, ...]:
    length = cell.newest.seq_len
    return cell.task, cell.environment, model_order(cell.model), length, levers_order(cell.levers)


def _mean_ratio(before: Mapping[int, float], after: Mapping[int, float]) -> float | None:
    ratios = [after[batch] / before[batch] for batch in before if batch in after]
    return _geometric_mean(ratios) if ratios else None


def _geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _spread(ratios: Sequence[float | None]) -> Spread | None:
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return None
    return Spread(len(known), _geometric_mean(known), min(known), max(known))


def read_either(path: Path) -> list[MeasuredCell]:
    """Read the cells of a ledger, or of a file of `bertbench probe --json`.

    Raises:
        InputError: it is neither.
    """
    try:
        with path.open("rb") as file:
            is_ledger = file.read(len(_SQLITE)) == _SQLITE
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    if is_ledger:
        with read_ledger(path) as ledger:
            return collect_cells(read_rows(ledger))
    try:
        return collect_cells(_rows_of(read_probe_file(path)))
    except InputError as error:
        raise InputError(f"neither a ledger nor a probe's result: {error}") from error


def _rows_of(probed: ProbeFile) -> list[LedgerRow]:
    """Trials of a probe's file, as a ledger has them."""
    budget = Budget(probed.device, probed.budget_bytes)
    versions = json_text(probed.versions, sort_keys=True)
    rows: list[LedgerRow] = []
    for cell in probed.cells:
        workload, levers = cell.workload, cell.levers
        for trial in cell.trials:
            rows.append(
                LedgerRow(
                    id=len(rows) + 1,
                    time_utc="",
                    device=budget.device.name,
                    budget_bytes=budget.budget_bytes,
                    model=workload.model,
                    head=workload.head,
                    seq_len=workload.seq_len,
                    levers=levers.to_json(),
                    versions=dict(probed.versions),
                    trial=trial,
                    question=QuestionKey(budget.key(), versions, workload.key(), levers.key()),
                )
            )
    return rows


def show_comparison(before: str, after: str, comparison: Comparison) -> None:
    """Show the pairs, a line for each, and what they come to."""
    console = terminal()
    names = name_environments(
        cell.environment for pair in comparison.pairs for cell in (pair.before, pair.after)
    )
    for letter, path, cells in (
        ("A", before, [pair.before for pair in comparison.pairs]),
        ("B", after, [pair.after for pair in comparison.pairs]),
    ):
        environments = sorted({names[cell.environment] for cell in cells})
        where = f": {'; '.join(environments)}" if len(environments) in (1, 2) else ""
        console.print(f"{letter}: {path}{where}", soft_wrap=True)
    groups: dict[str, list[Pair]] = {}
    for pair in comparison.pairs:
        where, other = names[pair.before.environment], names[pair.after.environment]
        where = where if where == other else f"{where} in A and {other} in B"
        groups.setdefault(f"{pair.before.task}, {where}", []).append(pair)
    for what, pairs in groups.items():
        console.print(f"\n{what}", style="bold", soft_wrap=True)
        console.print(_table(pairs))
    for name, spread in comparison.spreads.items():
        if spread is not None:
            console.print(f"{name.replace('_', ' ')} B/A: {spread}", soft_wrap=True)
    differ = sum(pair.budgets_differ for pair in comparison.pairs)
    if differ:
        console.print(f"{count_cells(differ)} had another budget in B than in A")
    for count, of in ((comparison.only_before, "A"), (comparison.only_after, "B")):
        if count:
            console.print(f"{count_cells(count)} only in {of}")
    if not comparison.pairs:
        console.print("no cell is in both")


def _table(pairs: Sequence[Pair]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("model", "seq", "levers", "A", "B", "B/A", "peak", "speed"):
        left = title in ("model", "levers")
        table.add_column(title, justify="left" if left else "right", no_wrap=title != "levers")
    for pair in pairs:
        table.add_row(
            system_name(pair.before.model),
            str(pair.before.newest.seq_len),
            pair.before.levers_text,
            limit_text(pair.before),
            limit_text(pair.after),
            *(_ratio(ratio) for ratio in (pair.limit_ratio, pair.peak_ratio, pair.speed_ratio)),
        )
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
