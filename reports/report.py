"""All that a report is made of, read once and drawn in several ways."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

from bertbench.ledger import LedgerRow
from bertbench.planner import Plan
from reports.cells import CERTIFIED, FAILED, Cell, Place, read_cells
from reports.figures import Picture
from reports.planning import Planned, plan_places
from reports.plots import (
    footprint_picture,
    front_picture,
    limits_picture,
    predictions_picture,
    throughput_picture,
    timeline_picture,
)
from reports.predictions import Prediction, predict_trials
from reports.run_plots import precision_recall_picture, training_picture
from reports.runs import Run
from reports.tables import Table, published_tables
from reports.timeline import Timeline, step_timeline

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
            return "The ledger has no trials yet: `bertbench probe` makes some."
        certified = sum(cell.evidence == CERTIFIED for cell in self.cells)
        text = f"{len(self.rows):,} trials of {len(self.cells):,} cells; {certified:,} certified"
        if self.failed:
            text += f", {len(self.failed):,} without an answer because all trials failed"
        return f"{text}."

    @functools.cached_property
    def pictures(self) -> list[Picture]:
        """All pictures that there is something to draw for."""
        limits = [
            limits_picture(self.cells, place, head)
            for place in self.places
            for head in sorted({c.newest.head for c in self.cells if c.place == place})
        ]
        plans = [one.plan for one in self.planned if isinstance(one.plan, Plan)]
        # The largest ones have most to decide.
        largest = sorted(
            plans, key=lambda p: (p.workload.config.hidden_size, p.workload.seq_len), reverse=True
        )[:_MOST_STEPS]
        timelines = [
            timeline_picture(plan, timeline)
            for plan in largest
            if (timeline := _timeline(plan)) is not None
        ]
        found = [
            *[one for one in limits if one is not None][:_MOST_LIMITS],
            throughput_picture(self.cells),
            footprint_picture(self.planned),
            *map(front_picture, largest),
            *timelines,
            predictions_picture(self.predictions),
            training_picture(self.runs),
            *map(precision_recall_picture, self.runs),
        ]
        pictures: list[Picture] = []
        for picture in found:
            if picture is not None:
                same = sum(one.name.startswith(picture.name) for one in pictures)
                pictures.append(
                    dataclasses.replace(picture, name=f"{picture.name}-{same + 1}")
                    if same
                    else picture
                )
        return pictures


def _timeline(plan: Plan) -> Timeline | None:
    return step_timeline(plan.workload, plan.chosen.levers, plan.chosen.micro_batch)


def version() -> str:
    """Version of bertbench."""
    return metadata.version("bertbench")
