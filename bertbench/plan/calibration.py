"""What the ledger's trials on a device teach a plan: how fast it is, and what has fitted."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from bertbench.core.terminal import say
from bertbench.core.workload import (
    Levers,
    Setup,
    TrainingStep,
    Workload,
    levers_from_json,
    workload_from_key,
)
from bertbench.devices.device import Budget, Device
from bertbench.devices.step_time import Rates, predict_step_seconds
from bertbench.ledger.database import (
    default_ledger_path,
    ledger_exists,
    open_ledger,
    read_ledger,
)
from bertbench.ledger.limit import verdicts
from bertbench.ledger.question import Question, versions_key
from bertbench.ledger.records import LedgerRow, read_device_rows, record
from bertbench.memory.prediction import Room, predict_memory
from bertbench.trials.trial import Trial, out_of_memory_in_run
from finetune.errors import InputError

_MIN_TRIALS = 4
"""Fewest trials that the speed of a device is taken from; the margin needs twice as many."""

_MOST_TRIALS = 400
"""The newest of other workloads that are looked at."""

_MIN_MARGIN = 0.01
_CLEARLY_MORE = 1.1


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What was seen of one setting of a workload, each time in a process of its own.

    Attributes:
        fits_bytes: the budgets that it has fitted in.
        exceeds_bytes: those in which it has run out of memory. Of one budget the newest trial
            counts, as another process may have held memory before.
    """

    fits_bytes: frozenset[int] = frozenset()
    exceeds_bytes: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What is known of a workload on a device.

    Attributes:
        time_factor: measured seconds of a step, in those predicted.
        trials: that it is the median of; 0 if there are too few.
        curve: the same by micro-batch for this workload alone, as pairs of them with the smallest
            first; empty if too few trials tell, and on a CPU, where whatever else runs then makes
            some trials slower than others.
        margin: part of a prediction to add before it is compared with a budget, where a margin is
            kept; None if too few trials tell.
        outcomes: by levers and micro-batch.
    """

    time_factor: float = 1.0
    trials: int = 0
    curve: tuple[tuple[float, float], ...] = ()
    margin: float | None = None
    outcomes: Mapping[tuple[Levers, int], Outcomes] = dataclasses.field(default_factory=dict)

    def seconds(self, predicted_seconds: float, micro_batch: int) -> float:
        """What a step takes, from what is predicted of it.

        Between two micro-batches of the curve by their logarithms, beyond its ends as there.
        """
        if not self.curve:
            return predicted_seconds * self.time_factor
        number = bisect.bisect_left(self.curve, (micro_batch, 0.0))
        (low, first), (high, second) = (
            self.curve[max(number - 1, 0)],
            self.curve[min(number, len(self.curve) - 1)],
        )
        share = 0.0 if high <= low else math.log(micro_batch / low) / math.log(high / low)
        return predicted_seconds * (first + share * (second - first))

    def failures(self) -> Calibration:
        """What has run out of memory alone: of a device that others use too, all that holds."""
        return Calibration(
            outcomes={
                setting: dataclasses.replace(seen, fits_bytes=frozenset())
                for setting, seen in self.outcomes.items()
            }
        )

    def fits(self, levers: Levers, micro_batch: int, budget_bytes: int) -> bool | None:
        """Whether trials have shown that a setting fits, or that it does not; None if neither.

        What has run out in a budget is taken not to fit in a smaller one. What has fitted fits in
        the same budget and in one that is a tenth larger; just above, memory may be in pieces that
        are too small again.
        """
        seen = self.outcomes.get((levers, micro_batch), Outcomes())
        if budget_bytes in seen.fits_bytes:
            return True
        if any(budget_bytes <= size for size in seen.exceeds_bytes):
            return False
        if any(budget_bytes >= _CLEARLY_MORE * size for size in seen.fits_bytes):
            return True
        return None


def note_out_of_memory(step: TrainingStep, budget: Budget, message: str) -> None:
    """Write into the user's ledger that a run's step ran out of memory, as evidence for plans.

    Of several devices nothing is written: what each of them holds is more than one alone would.
    Where the ledger cannot be written, one line says so.

    Args:
        step: the training step.
        budget: that it ran under.
        message: what happened.
    """
    if budget.device.replicas > 1:
        return
    trial = out_of_memory_in_run(step.micro_batch, message)
    try:
        with open_ledger() as ledger:
            record(ledger, Question(budget, step.setup), trial)
    except InputError as error:
        say(f"warning: {error}; other plans do not learn of it")


def read_calibration(
    device: Device, workload: Workload, rates: Rates, ledger_file: Path | None = None
) -> Calibration:
    """Read what the ledger tells.

    Args:
        device: an attached one.
        workload: what is trained.
        rates: the device's, as predicted.
        ledger_file: None takes the user's, and does without it if it cannot be read.

    Raises:
        InputError: the file that was named cannot be read.
    """
    try:
        path = ledger_file or default_ledger_path()
        if not ledger_exists(path):
            return Calibration()
        with read_ledger(path) as ledger:
            rows = read_device_rows(ledger, device, versions_key(), workload, _MOST_TRIALS)
    except InputError as error:
        if ledger_file is not None:
            raise
        say(f"warning: {error}; planning without it")
        return Calibration()
    return calibrate(rows, workload, rates, device.kind)


def calibrate(
    rows: list[LedgerRow], workload: Workload, rates: Rates, device_kind: str
) -> Calibration:
    """Calibrate predictions for a device by trials on it.

    Args:
        rows: trials that fitted or ran out of memory.
        workload: that outcomes and a curve are wanted of; speed and error are learnt from all
            workloads.
        rates: the device's, as predicted.
        device_kind: of the device.
    """
    factors, errors = [], []
    of_workload: list[tuple[int, float]] = []
    evidence: dict[tuple[Levers, int], list[Trial]] = {}  # by levers and budget
    for row in rows:
        trial = row.trial
        try:
            levers = levers_from_json(dict(row.levers))
            tried = workload_from_key(row.model, row.question.workload)
        except (InputError, KeyError, TypeError, ValueError):
            continue  # As of another version.
        if trial.step_seconds is not None:
            step = Setup(tried, levers).step(trial.batch)
            factors.append(trial.step_seconds / predict_step_seconds(step, rates))
            if tried.key() == workload.key():
                of_workload.append((trial.batch, factors[-1]))
        if trial.peak_bytes is not None:
            predicted = predict_memory(Setup(tried, levers), Room(device_kind, row.budget_bytes))
            if predicted.source == "trace":
                errors.append(trial.peak_bytes / predicted.peak_bytes(trial.batch) - 1)
        if (trial.fresh or trial.of_run) and tried.key() == workload.key():
            # For a plan a run's step is worth as much as a trial: the newer of them counts.
            alike = dataclasses.replace(trial, fresh=True, message="")
            evidence.setdefault((levers, row.budget_bytes), []).append(alike)
    enough = len(factors) >= _MIN_TRIALS
    return Calibration(
        time_factor=statistics.median(factors) if enough else 1.0,
        trials=len(factors) if enough else 0,
        curve=() if device_kind == "cpu" else _curve(of_workload),
        margin=max(0.0, *errors) + _MIN_MARGIN if len(errors) >= 2 * _MIN_TRIALS else None,
        outcomes=_outcomes(evidence),
    )


def _outcomes(
    evidence: Mapping[tuple[Levers, int], Sequence[Trial]],
) -> dict[tuple[Levers, int], Outcomes]:
    """Put what was seen under several budgets together."""
    outcomes: dict[tuple[Levers, int], Outcomes] = {}
    for (levers, budget_bytes), trials in evidence.items():
        for batch, trial in verdicts(trials).items():
            seen = outcomes.get((levers, batch), Outcomes())
            if trial.outcome == "oom":
                seen = dataclasses.replace(seen, exceeds_bytes=seen.exceeds_bytes | {budget_bytes})
            else:
                seen = dataclasses.replace(seen, fits_bytes=seen.fits_bytes | {budget_bytes})
            outcomes[levers, batch] = seen
    return outcomes


def _curve(factors: Sequence[tuple[int, float]]) -> tuple[tuple[float, float], ...]:
    """Medians of the factors of micro-batches within a factor of two, if they say anything."""
    octaves: dict[int, list[tuple[int, float]]] = {}
    for micro_batch, factor in factors:
        octaves.setdefault(micro_batch.bit_length(), []).append((micro_batch, factor))
    if len(factors) < _MIN_TRIALS or len(octaves) < 2:
        return ()
    return tuple(
        (statistics.median(batch for batch, _ in some), statistics.median(f for _, f in some))
        for _, some in sorted(octaves.items())
    )
