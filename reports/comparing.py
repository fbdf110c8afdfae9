"""Two sets of measurements side by side: two devices, two versions, before and after a change."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bertbench.cli.common import terminal
from bertbench.devices import budget_from_json
from bertbench.ledger import LedgerRow, read_rows
from bertbench.ledger_file import open_ledger
from bertbench.trial import trial_from_json
from bertbench.workload import levers_from_json, published_workload
from finetune.errors import InputError
from reports.cells import Cell, model_order, read_cells, setting_order, trial_rate
from reports.tables import limit_text, system_name

_SQLITE = b"SQLite format 3\x00"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same cell in both.

    Attributes:
        before: of the first.
        after: of the second.
    """

    before: Cell
    after: Cell

    @property
    def limit_ratio(self) -> float | None:
        """Largest batch of the second, in those of the first; None where one is 0 or not known."""
        before, after = self.before.max_batch, self.after.max_batch
        return after / before if before and after else None

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
        rates = [
            {
                row.trial.batch: rate
                for row in cell.rows
                if (rate := trial_rate(row, row.trial)) is not None
            }
            for cell in (self.before, self.after)
        ]
        return _mean_ratio(*rates)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        row = self.before.newest
        return {
            "model": row.model,
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
        return f"{self.mean:.3f} ({self.least:.3f} to {self.most:.3f}, {self.count} cells)"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sets of cells.

    Attributes:
        pairs: cells of both.
        only_before: number of cells that the second does not have.
        only_after: number of cells that the first does not have.
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


def compare_cells(before: Sequence[Cell], after: Sequence[Cell]) -> Comparison:
    """Pair cells of the same model, task, length and levers.

    Under the same budget where there is one; otherwise the newest cell of each.
    """
    groups: tuple[dict[tuple[Any, ...], list[Cell]], ...] = ({}, {})
    for cells, group in zip((before, after), groups, strict=True):
        for cell in sorted(cells, key=lambda cell: cell.newest.id):
            group.setdefault(_key(cell), []).append(cell)
    pairs, paired = [], 0
    for key in sorted(groups[0].keys() & groups[1].keys(), key=str):
        first, second = groups[0][key], groups[1][key]
        found = [
            Pair(one, other)
            for one in _newest_by_budget(first).values()
            if (other := _newest_by_budget(second).get(one.newest.budget_bytes)) is not None
        ]
        pairs += found or [Pair(first[-1], second[-1])]
        paired += 1
    pairs.sort(key=lambda pair: _order(pair.before))
    return Comparison(tuple(pairs), len(groups[0]) - paired, len(groups[1]) - paired)


def _key(cell: Cell) -> tuple[Any, ...]:
    row = cell.newest
    return row.model, row.head, row.seq_len, json.dumps(row.levers, sort_keys=True)


def _newest_by_budget(cells: Sequence[Cell]) -> dict[int, Cell]:
    return {cell.newest.budget_bytes: cell for cell in cells}


def _order(cell: Cell) -> tuple[Any, ...]:
    row = cell.newest
    return model_order(row.model), row.head, row.seq_len, setting_order(cell.levers)


def _mean_ratio(before: Mapping[int, float], after: Mapping[int, float]) -> float | None:
    ratios = [after[batch] / before[batch] for batch in before.keys() & after.keys()]
    return _geometric_mean(ratios) if ratios else None


def _geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _spread(ratios: Sequence[float | None]) -> Spread | None:
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return None
    return Spread(len(known), _geometric_mean(known), min(known), max(known))


def read_either(path: Path) -> list[Cell]:
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
        with open_ledger(path) as ledger:
            return read_cells(read_rows(ledger))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return read_cells(_rows_of(values))
    except InputError:  # a model or lever that this version does not know
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "neither a ledger nor a probe's result",
            path=path,
            hint="give a ledger, or a file of `bertbench probe --json`",
        ) from error


def _rows_of(values: Mapping[str, Any]) -> list[LedgerRow]:
    """Trials of a probe's file, as a ledger has them."""
    named = dict(values["device"])
    budget = budget_from_json({"budget_bytes": named.pop("budget_bytes"), "device": named})
    versions = json.dumps(values["versions"], sort_keys=True)
    rows: list[LedgerRow] = []
    for cell in values["cells"]:
        workload = published_workload(cell["model"], cell["seq_len"], cell["head"])
        levers = levers_from_json(cell["levers"])
        for trial in cell["trials"]:
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
                    versions=values["versions"],
                    trial=trial_from_json(trial),
                    question=(budget.key(), versions, workload.key(), levers.key()),
                )
            )
    return rows


def show_comparison(before: str, after: str, comparison: Comparison) -> None:
    """Show the pairs, a line for each, and what they come to."""
    console = terminal()
    console.print(f"A: {before}", soft_wrap=True)
    console.print(f"B: {after}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for title in ("model", "seq", "levers", "A", "B", "B/A", "peak", "speed"):
        left = title in ("model", "levers")
        table.add_column(title, justify="left" if left else "right", no_wrap=title != "levers")
    for pair in comparison.pairs:
        table.add_row(
            system_name(pair.before.newest.model),
            str(pair.before.newest.seq_len),
            pair.before.setting,
            limit_text(pair.before),
            limit_text(pair.after),
            *(_ratio(r) for r in (pair.limit_ratio, pair.peak_ratio, pair.speed_ratio)),
        )
    if comparison.pairs:
        console.print(table)
    for name, spread in comparison.spreads.items():
        if spread is not None:
            console.print(f"{name.replace('_', ' ')} B/A: {spread}", soft_wrap=True)
    for count, of in ((comparison.only_before, "A"), (comparison.only_after, "B")):
        if count:
            console.print(f"{count} cells only in {of}")
    if not comparison.pairs:
        console.print("no cell is in both")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
