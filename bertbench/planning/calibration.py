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
from bertbench.hardware.device import Budget, Device
from bertbench.hardware.step_time import Rates, predict_step_seconds
from bertbench.ledger.database import (
    default_ledger_path,
    ledger_exists,
    open_ledger,
    read_ledger,
)
from bertbench.ledger.limit import verdicts
from bertbench.ledger.question import Question, versions_key
from bertbench.ledger.records import LedgerRow, read_device_rows, record
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.trials.trial import Trial, out_of_memory_in_run
from finetune.errors import InputError

_MIN_TRIALS = 4
"""Fewest trials that the speed of a device is taken from; the margin needs twice as many."""

_MAX_TRIALS = 400
"""Most trials of other workloads that are read, the newest first."""

_MIN_MARGIN = 0.01
_CLEARLY_MORE = 1.1


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What trials have shown of one setting (levers and micro-batch) of a workload.

    Each trial ran in a process of its own.

    Attributes:
        fits_bytes: budgets in which the setting has fitted.
        exceeds_bytes: budgets in which it has run out of memory. Of one budget the newest trial
            counts: during an older one another process may have held memory.
    """

    fits_bytes: frozenset[int] = frozenset()
    exceeds_bytes: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What trials on a device teach the predictions for a workload.

    Attributes:
        time_factor: measured seconds of a step, divided by the predicted ones; the median of the
            trials.
        trials: number of these trials; 0 if there are too few.
        curve: pairs of a micro-batch and the time factor there, the smallest micro-batch first, of
            trials of this workload alone. It is empty if there are too few, and on a CPU, where
            other programs make some trials slower than others.
        margin: part of a predicted peak to add before it is compared with a budget, where a margin
            is kept; None if too few trials tell.
        outcomes: what fitted and what did not, by levers and micro-batch.
    """

    time_factor: float = 1.0
    trials: int = 0
    curve: tuple[tuple[float, float], ...] = ()
    margin: float | None = None
    outcomes: Mapping[tuple[Levers, int], Outcomes] = dataclasses.field(default_factory=dict)

    def seconds(self, predicted_seconds: float, micro_batch: int) -> float:
        """Correct the predicted seconds of a step.

        Between two micro-batches of the curve the factor is interpolated over the logarithm of the
        micro-batch. Beyond an end of the curve it is the factor of that end.
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
        """What has run out of memory, alone.

        On a device that other programs use too, what has fitted before may not fit now.
        """
        return Calibration(
            outcomes={
                setting: dataclasses.replace(seen, fits_bytes=frozenset())
                for setting, seen in self.outcomes.items()
            }
        )

    def fits(self, levers: Levers, micro_batch: int, budget_bytes: int) -> bool | None:
        """Whether trials have shown that a setting fits, or that it does not; None if neither.

        A setting that has run out of memory in a budget does not fit in a smaller one either. A
        setting that has fitted fits in the same budget, and in all that are at least a tenth
        larger. In a budget that is only a little larger, free memory may be in pieces that are too
        small.
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

    Nothing is written of a step on several devices, as each of them holds more than one device
    alone. Where the ledger cannot be written, one line says so.

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
    """Calibrate predictions by the trials in a ledger.

    Args:
        device: a device of this machine.
        workload: what is trained.
        rates: of the device, as predicted.
        ledger_file: the ledger; None takes the user's, or no trials if it cannot be read.

    Raises:
        InputError: the file that was named cannot be read.
    """
    try:
        path = ledger_file or default_ledger_path()
        if not ledger_exists(path):
            return Calibration()
        with read_ledger(path) as ledger:
            rows = read_device_rows(ledger, device, versions_key(), workload, _MAX_TRIALS)
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
        workload: workload of the outcomes and the curve; time factor and margin come from the
            trials of all workloads.
        rates: of the device, as predicted.
        device_kind: `cpu`, `gpu` or `tpu`.
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
    """Sort the trials that count under each budget by levers and micro-batch."""
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
    """Median time factors of micro-batches within a factor of two; empty if there are too few."""
    octaves: dict[int, list[tuple[int, float]]] = {}
    for micro_batch, factor in factors:
        octaves.setdefault(micro_batch.bit_length(), []).append((micro_batch, factor))
    if len(factors) < _MIN_TRIALS or len(octaves) < 2:
        return ()
    return tuple(
        (statistics.median(batch for batch, _ in some), statistics.median(f for _, f in some))
        for _, some in sorted(octaves.items())
    )
