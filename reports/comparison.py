"""Comparison of two sets of measurements: two devices, two versions, before and after a change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bertbench.hardware.device import Budget
from bertbench.ledger.database import read_ledger
from bertbench.ledger.question import QuestionKey
from bertbench.ledger.records import LedgerRow, read_rows
from bertbench.probing.probe_file import ProbeFile, read_probe_file
from finetune.errors import InputError
from finetune.storage.json_files import json_text
from reports.measured_cells import MeasuredCell, collect_cells, levers_order, model_order
from reports.tables import count_cells

_SQLITE = b"SQLite format 3\x00"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two cells that are compared, with the same workload and levers.

    Attributes:
        before: the cell of the first set.
        after: the cell of the second set.
    """

    before: MeasuredCell
    after: MeasuredCell

    @property
    def limit_ratio(self) -> float | None:
        """Largest batch of the second cell, divided by that of the first.

        None where one of them is 0, or is only known to be at least so large.
        """
        before, after = self.before.bounded_max_batch, self.after.bounded_max_batch
        return after / before if before and after else None

    @property
    def budgets_differ(self) -> bool:
        """Whether the two were measured under different budgets."""
        return self.before.newest.budget_bytes != self.after.newest.budget_bytes

    @property
    def peak_ratio(self) -> float | None:
        """Geometric mean of the ratios of the peaks, at the batches that both cells have."""
        peaks = [
            {row.trial.batch: row.trial.peak_bytes for row in cell.rows if row.trial.peak_bytes}
            for cell in (self.before, self.after)
        ]
        return _mean_ratio(*peaks)

    @property
    def speed_ratio(self) -> float | None:
        """Geometric mean of the ratios of examples a second, at the batches that both have."""
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
    """Summary of the ratios of many pairs.

    Attributes:
        count: number of ratios.
        mean: their geometric mean.
        least: the smallest ratio.
        most: the largest ratio.
    """

    count: int
    mean: float
    least: float
    most: float

    def __str__(self) -> str:
        """Write the spread for people."""
        return f"{self.mean:.3f} ({self.least:.3f} to {self.most:.3f}, {count_cells(self.count)})"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The pairs of two sets of cells.

    Attributes:
        pairs: cells that are in both sets.
        only_before: number of cells of the first that are in no pair.
        only_after: number of cells of the second that are in no pair.
    """

    pairs: tuple[Pair, ...]
    only_before: int
    only_after: int

    @property
    def spreads(self) -> dict[str, Spread | None]:
        """Summaries of the ratios of all pairs, by the name of the quantity."""
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

    Cells on the same device under the same budget are paired first, then cells under the same
    budget. If there are none, the newest cells are paired. No cell is in two pairs.
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
    """Pair cells for which a function returns the same, and remove them from both lists."""
    pairs = []
    for cell in list(first):
        other = next((other for other in second if by(other) == by(cell)), None)
        if other is not None:
            pairs.append(Pair(cell, other))
            first.remove(cell)
            second.remove(other)
    return pairs


def _key(cell: MeasuredCell) -> tuple[Any, ...]:
    """What compared cells have in common: the workload and the levers.

    A workload of another version cannot be read; then only names are compared.
    """
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
        InputError: the file is neither.
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
    """Return the trials of a probe's file as rows of a ledger."""
    budget = Budget(probed.device, probed.budget_bytes)
    versions = json_text(probed.versions, sort_keys=True)
    rows: list[LedgerRow] = []
    for cell in probed.cells:
        workload, levers = cell.setup.workload, cell.setup.levers
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
