"""Predicted peaks beside the measured peaks of a ledger's trials."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from bertbench.core.workload import Setup
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from reports.measured_cells import MeasuredCell

_MAX_TRIALS = 200
"""Number of the newest trials that are predicted; a replay takes some hundredths of a second."""


@dataclasses.dataclass(frozen=True)
class PeakPrediction:
    """A measured peak, and the predicted peak of the same training step.

    Attributes:
        measured_bytes: peak of the allocator in a fresh process.
        predicted_bytes: the peak that a plan would state for this training step.
        traced: whether the peak is predicted by a replay of a trace; False for the formula.
    """

    measured_bytes: int
    predicted_bytes: int
    traced: bool

    @property
    def error(self) -> float:
        """Relative error; above 0 if the predicted peak is larger than the measured one."""
        return self.predicted_bytes / self.measured_bytes - 1


def predict_peaks(cells: Sequence[MeasuredCell]) -> list[PeakPrediction]:
    """Predict the peaks of the newest trials that fit in fresh processes, one for each setting."""
    trials = {
        (cell.newest.question, row.trial.batch): (row, cell)
        for cell in cells
        for row in cell.rows
        if row.trial.outcome == "fits" and row.trial.fresh and row.trial.peak_bytes
    }
    newest = sorted(trials.values(), key=lambda pair: -pair[0].id)[:_MAX_TRIALS]
    found = []
    for row, cell in newest:
        workload, levers, peak_bytes = cell.workload, cell.levers, row.trial.peak_bytes
        if workload is None or levers is None or peak_bytes is None:
            continue
        room = Room(cell.environment.kind, row.budget_bytes)
        predicted = predict_memory(Setup(workload, levers), room)
        predicted_bytes = predicted.footprint(row.trial.batch).peak_bytes
        found.append(PeakPrediction(peak_bytes, predicted_bytes, predicted.source == "trace"))
    return found


def describe_errors(predictions: Sequence[PeakPrediction]) -> str:
    """Describe the errors in a sentence; empty without predictions."""
    if not predictions:
        return ""
    errors = [100 * one.error for one in predictions]
    median = statistics.median(map(abs, errors))
    return (
        f"{len(errors)} peaks predicted with a median error of {median:.2f} %, from "
        f"{min(errors):+.2f} % to {max(errors):+.2f} %."
    )
