"""A report: the measurements, plans and pictures that the page and the terminal show."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

from bertbench.core.published import PAPER_MODELS
from bertbench.ledger.compiled_limits import CompiledLimit
from bertbench.ledger.limit import CERTIFIED, FAILED
from bertbench.ledger.records import LedgerRow
from bertbench.planning.planner import Plan
from reports.compiled_tables import compiled_tables
from reports.environments import Environment, name_environments
from reports.measured_cells import MeasuredCell, collect_cells
from reports.peak_predictions import PeakPrediction, predict_peaks
from reports.pictures.figures import Picture
from reports.pictures.plan_plots import footprint_picture, front_picture, timeline_picture
from reports.pictures.run_plots import precision_recall_picture, training_picture
from reports.pictures.trial_plots import limits_picture, predictions_picture, throughput_picture
from reports.recommendations import Recommendation, recommend_plans
from reports.runs import Run
from reports.tables import Table, count_cells, published_tables

_MAX_LIMITS, _MAX_STEPS = 4, 3


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report is made from; everything else is computed when it is first needed.

    Attributes:
        ledger: file of the ledger.
        rows: all trials, in the order of recording.
        runs: the runs, in the order in which they were named.
        target_batch: effective batch that plans are made for.
        made: time at which the report was made.
        compiled: limits of products by their compilers.
    """

    ledger: Path
    rows: Sequence[LedgerRow]
    runs: Sequence[Run]
    target_batch: int
    made: datetime
    compiled: Sequence[CompiledLimit] = ()

    @functools.cached_property
    def cells(self) -> list[MeasuredCell]:
        """Trials grouped by setup and budget."""
        return collect_cells(self.rows)

    @functools.cached_property
    def recommendations(self) -> list[Recommendation]:
        """Plans for the workloads with the newest trials."""
        return recommend_plans(self.cells, self.target_batch)

    @property
    def workloads_without_plan(self) -> int:
        """Number of workloads that are not planned, because there are too many."""
        known = {(c.environment, c.workload.key()) for c in self.cells if c.workload is not None}
        return len(known) - len(self.recommendations)

    @functools.cached_property
    def predictions(self) -> list[PeakPrediction]:
        """Predicted peaks beside the measured ones."""
        return predict_peaks(self.cells)

    @functools.cached_property
    def tables(self) -> list[Table]:
        """Tables of limits beside the published ones."""
        return published_tables(self.cells)

    @functools.cached_property
    def compiled_tables(self) -> list[Table]:
        """Tables of limits by compilers."""
        return compiled_tables(self.compiled)

    @functools.cached_property
    def names(self) -> dict[Environment, str]:
        """Names of the environments; no two are the same."""
        return name_environments(cell.environment for cell in self.cells)

    @property
    def environments(self) -> list[Environment]:
        """Environments, the one with the newest trial first."""
        newest = {cell.environment: 0 for cell in self.cells}
        for cell in self.cells:
            newest[cell.environment] = max(newest[cell.environment], cell.newest.id)
        return sorted(newest, key=lambda environment: -newest[environment])

    def count(self, evidence: str, environment: Environment) -> int:
        """Number of cells of a environment with some evidence."""
        return sum(
            cell.evidence == evidence for cell in self.cells if cell.environment == environment
        )

    @property
    def failed(self) -> list[MeasuredCell]:
        """Cells in which all trials failed."""
        return [cell for cell in self.cells if cell.evidence == FAILED]

    @property
    def headline(self) -> str:
        """Summary of the report in a sentence."""
        if not self.rows and not self.compiled:
            return f"No trials in {self.ledger.name} yet: `bertbench probe` makes some."
        certified = sum(cell.evidence == CERTIFIED for cell in self.cells)
        trials = f"{len(self.rows):,} trial" + "s" * (len(self.rows) != 1)
        text = f"{trials} of {count_cells(len(self.cells))}; {certified:,} certified"
        if self.failed:
            text += f", {len(self.failed):,} without an answer because all trials failed"
        if self.compiled:
            text += f"; {len(self.compiled):,} limit{'s' * (len(self.compiled) != 1)} by compilers"
        return f"{text}."

    @functools.cached_property
    def pictures(self) -> list[Picture]:
        """All pictures for which there are measurements or plans."""
        groups = [
            (f"{task}, {self.names[environment]}", [c for c in cells if c.task == task])
            for environment in self.environments
            for cells in ([c for c in self.cells if c.environment == environment],)
            for task in sorted({c.task for c in cells})
        ]
        # The paper's systems first, as in the tables.
        groups.sort(key=lambda group: not any(cell.model in PAPER_MODELS for cell in group[1]))
        limits = [limits_picture(cells, where) for where, cells in groups]
        plans = [one for one in self.recommendations if isinstance(one.plan, Plan)]
        # For the largest workloads there are most settings to choose from.
        largest = sorted(
            plans, key=lambda p: (p.workload.config.hidden_size, p.workload.seq_len), reverse=True
        )[:_MAX_STEPS]
        found = [
            *[one for one in limits if one is not None][:_MAX_LIMITS],
            throughput_picture(self.cells, self.names),
            footprint_picture(self.recommendations, self.names),
            *(front_picture(one, self.names[one.environment]) for one in largest),
            *(timeline_picture(one, self.names[one.environment]) for one in largest),
            predictions_picture(self.predictions),
            training_picture(self.runs),
            *map(precision_recall_picture, self.runs),
        ]
        return name_apart([picture for picture in found if picture is not None])


def name_apart(pictures: Iterable[Picture]) -> list[Picture]:
    """Number pictures of the same name, so that their files and ids differ."""
    found: dict[str, Picture] = {}
    for picture in pictures:
        numbered = (f"{picture.name}-{number}" for number in itertools.count(2))
        name = next(n for n in itertools.chain([picture.name], numbered) if n not in found)
        found[name] = dataclasses.replace(picture, name=name)
    return list(found.values())


def version() -> str:
    """Return the version of bertbench."""
    return metadata.version("bertbench")
