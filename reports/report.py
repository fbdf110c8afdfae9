"""All that a report is made of, read once and drawn in several ways."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

from bertbench.core.published import PAPER_MODELS
from bertbench.ledger.limit import CERTIFIED, FAILED
from bertbench.ledger.records import LedgerRow
from bertbench.plan.planner import Plan
from reports.cells import Cell, read_cells
from reports.pictures.figures import Picture
from reports.pictures.plan_plots import footprint_picture, front_picture, timeline_picture
from reports.pictures.plots import limits_picture, predictions_picture, throughput_picture
from reports.pictures.run_plots import precision_recall_picture, training_picture
from reports.places import Place, name_places
from reports.planning import Planned, plan_places
from reports.predictions import Prediction, predict_trials
from reports.runs import Run
from reports.tables import Table, count_cells, published_tables

_MOST_LIMITS, _MOST_STEPS = 4, 3


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known.

    Attributes:
        ledger: the file.
        rows: all trials, in the order of recording.
        runs: in the order in which they were named.
        target_batch: that plans are made for.
        made: when.
    """

    ledger: Path
    rows: Sequence[LedgerRow]
    runs: Sequence[Run]
    target_batch: int
    made: datetime

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """Trials by the question that they answer."""
        return read_cells(self.rows)

    @functools.cached_property
    def planned(self) -> list[Planned]:
        """A plan for every workload, if they are not too many."""
        return plan_places(self.cells, self.target_batch)

    @property
    def unplanned(self) -> int:
        """Number of workloads that there is no plan of."""
        known = {(c.place, c.workload.key()) for c in self.cells if c.workload is not None}
        return len(known) - len(self.planned)

    @functools.cached_property
    def predictions(self) -> list[Prediction]:
        """What is predicted of measured peaks."""
        return predict_trials(self.cells)

    @functools.cached_property
    def tables(self) -> list[Table]:
        """Limits beside the published ones."""
        return published_tables(self.cells)

    @functools.cached_property
    def names(self) -> dict[Place, str]:
        """Names of the places, of which no two are the same."""
        return name_places(cell.place for cell in self.cells)

    @property
    def places(self) -> list[Place]:
        """Where trials were run, the newest first."""
        newest = {cell.place: 0 for cell in self.cells}
        for cell in self.cells:
            newest[cell.place] = max(newest[cell.place], cell.newest.id)
        return sorted(newest, key=lambda place: -newest[place])

    def count(self, evidence: str, place: Place) -> int:
        """Number of cells of a place with some evidence."""
        return sum(cell.evidence == evidence for cell in self.cells if cell.place == place)

    @property
    def failed(self) -> list[Cell]:
        """Cells without an answer."""
        return [cell for cell in self.cells if cell.evidence == FAILED]

    @property
    def headline(self) -> str:
        """The report in a sentence."""
        if not self.rows:
            return f"No trials in {self.ledger.name} yet: `bertbench probe` makes some."
        certified = sum(cell.evidence == CERTIFIED for cell in self.cells)
        trials = f"{len(self.rows):,} trial" + "s" * (len(self.rows) != 1)
        text = f"{trials} of {count_cells(len(self.cells))}; {certified:,} certified"
        if self.failed:
            text += f", {len(self.failed):,} without an answer because all trials failed"
        return f"{text}."

    @functools.cached_property
    def pictures(self) -> list[Picture]:
        """All pictures that there is something to draw for."""
        groups = [
            (f"{task}, {self.names[place]}", [c for c in self.cells if c.place == place
                                              and c.task == task])
            for place in self.places
            for task in sorted({c.task for c in self.cells if c.place == place})
        ]  # fmt: skip
        # The paper's systems first, as in the tables.
        groups.sort(key=lambda group: not any(cell.model in PAPER_MODELS for cell in group[1]))
        limits = [limits_picture(cells, where) for where, cells in groups]
        plans = [one for one in self.planned if isinstance(one.plan, Plan)]
        # The largest ones have most to decide.
        largest = sorted(
            plans, key=lambda p: (p.workload.config.hidden_size, p.workload.seq_len), reverse=True
        )[:_MOST_STEPS]
        found = [
            *[one for one in limits if one is not None][:_MOST_LIMITS],
            throughput_picture(self.cells, self.names),
            footprint_picture(self.planned, self.names),
            *(front_picture(one, self.names[one.place]) for one in largest),
            *(timeline_picture(one, self.names[one.place]) for one in largest),
            predictions_picture(self.predictions),
            training_picture(self.runs),
            *map(precision_recall_picture, self.runs),
        ]
        return name_apart([picture for picture in found if picture is not None])


def name_apart(pictures: Iterable[Picture]) -> list[Picture]:
    """Give pictures of one name a number each, so that their files and ids differ."""
    found: dict[str, Picture] = {}
    for picture in pictures:
        numbered = (f"{picture.name}-{number}" for number in itertools.count(2))
        name = next(n for n in itertools.chain([picture.name], numbered) if n not in found)
        found[name] = dataclasses.replace(picture, name=name)
    return list(found.values())


def version() -> str:
    """Version of bertbench."""
    return metadata.version("bertbench")
