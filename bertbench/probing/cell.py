"""One cell of a probe: a workload and levers, the largest batch that fits, and the evidence."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from bertbench.core.workload import Setup
from bertbench.ledger.database import Ledger
from bertbench.ledger.question import Question
from bertbench.memory.allocator.budget import empty_memory
from bertbench.memory.formula_prediction import FormulaPrediction
from bertbench.memory.prediction import LimitSource
from bertbench.memory.room import Room
from bertbench.probing.evidence import Evidence
from bertbench.probing.limit_from_recordings import LimitFromRecordings, chunk_sizes
from bertbench.probing.limit_from_trace import NO_HOLES, Holes, limit_from_trace
from bertbench.probing.search import Predictions, SearchResult, find_max_batch
from bertbench.probing.time_estimates import default_timeout_seconds
from bertbench.trials.measure import (
    MeasureBatches,
    TrialListener,
    TrialSettings,
    measure_batches,
)
from bertbench.trials.trial import Trial


@dataclasses.dataclass(frozen=True)
class ProbedCell:
    """A setup, and the largest batch that fits.

    Attributes:
        setup: workload and levers.
        result: what the search found.
        seconds: time it took now.
        replicas: copies of the model that took a batch each, at the same time.
        holes: batches near the limit that end otherwise than their neighbours, by the step's trace.
    """

    setup: Setup
    result: SearchResult
    seconds: float
    replicas: int = 1
    holes: Holes = NO_HOLES

    def examples_per_second(self, trial: Trial) -> float | None:
        """Rate of a trial of this cell; None if it has not been timed."""
        if not trial.step_seconds:
            return None
        examples = trial.batch * self.setup.levers.accumulation_steps * self.replicas
        return examples / trial.step_seconds

    def curve(self) -> list[dict[str, Any]]:
        """Examples per second of every batch that fits, by the last trial of each."""
        rates = {trial.batch: self.examples_per_second(trial) for trial in self.result.trials}
        return [
            {"batch": batch, "examples_per_second": round(rate, 3)}
            for batch, rate in sorted(rates.items())
            if rate is not None
        ]

    def to_json(self) -> dict[str, Any]:
        """Values under the keys of a probe file."""
        result, workload = self.result, self.setup.workload
        return {
            "model": workload.model,
            "head": workload.head,
            "seq_len": workload.seq_len,
            "levers": self.setup.levers.to_json(),
            "max_batch": result.max_batch,
            "stopped_by": result.stopped_by,
            "certificate": result.certificate.to_json() if result.certificate else None,
            "contradictions": [[a.to_json(), b.to_json()] for a, b in result.contradictions],
            "message": result.message,
            "missing_bytes": result.missing_bytes,
            "fits_again": list(self.holes.fits_again),
            "runs_out_below": list(self.holes.runs_out_below),
            "trials": [trial.to_json() for trial in result.trials],
            "curve": self.curve(),
            "measured": result.measured,
            "seconds": round(self.seconds, 3),
        }


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How a cell is probed.

    Attributes:
        max_batch: largest batch of interest.
        certify: measure both sides of the limit in fresh processes.
        ignore_ledger: use no earlier trials and recordings, so that all is measured again.
        steps: optimizer steps of a trial, at least 2.
        timeout_seconds: longest time of a trial; None takes ten times what a trial should take.
        measure: what makes the trials.
    """

    max_batch: int | None = None
    certify: bool = True
    ignore_ledger: bool = False
    steps: int = 3
    timeout_seconds: float | None = None
    measure: MeasureBatches = measure_batches


@dataclasses.dataclass(frozen=True)
class ProbeListener:
    """Functions that are called while a cell is probed.

    Attributes:
        on_attempt: takes the batches before they are tried.
        on_trial: takes every trial that was measured.
        poll: called several times a second; what it raises ends the search and is raised on.
    """

    on_attempt: Callable[[Sequence[int]], None] = lambda batches: None
    on_trial: Callable[[Trial], None] = lambda trial: None
    poll: Callable[[], None] = lambda: None


def probe_cell(
    ledger: Ledger,
    question: Question,
    settings: ProbeSettings = ProbeSettings(),
    listener: ProbeListener = ProbeListener(),
) -> ProbedCell:
    """Find and certify the largest batch of a cell; every trial goes to the ledger at once.

    Args:
        ledger: open; trials in it that answer the question are not repeated.
        question: workload and levers, device and bytes.
        settings: how the limit is searched for.
        listener: what is called meanwhile.
    """
    began = time.monotonic()
    setup, budget = question.setup, question.budget
    evidence = Evidence(ledger, question, ignore_ledger=settings.ignore_ledger)
    recorded = LimitFromRecordings(evidence, empty_memory(budget))
    traced = limit_from_trace(question, evidence.trials, listener.poll)
    result = find_max_batch(
        functools.partial(_measure, evidence, settings, listener),
        budget_bytes=budget.budget_bytes,
        known=evidence.known,
        predictions=Predictions(
            replay=_FirstAnswer([recorded] if traced is None else [traced, recorded]),
            formula=FormulaPrediction(setup, Room(budget.device.kind, budget.budget_bytes)),
            examples_per_chunk=max(chunk_sizes(setup), default=1),
        ),
        max_batch=settings.max_batch,
        certify=settings.certify,
    )
    holes = NO_HOLES if traced is None else traced.holes(result)
    seconds = time.monotonic() - began
    return ProbedCell(setup, result, seconds, budget.device.replicas, holes)


@dataclasses.dataclass(frozen=True)
class _FirstAnswer:
    """A `LimitSource` that takes the answer of the first source that can tell."""

    sources: Sequence[LimitSource]

    def max_micro_batch(self, at_most: int, fitting: int) -> int | None:
        """See `LimitSource`."""
        answers = (source.max_micro_batch(at_most, fitting) for source in self.sources)
        return next((answer for answer in answers if answer is not None), None)


def _measure(
    evidence: Evidence,
    settings: ProbeSettings,
    listener: ProbeListener,
    batches: Sequence[int],
    fresh: bool,
) -> list[Trial]:
    """Make trials for a search, see `bertbench.probing.search.Measure`; the ledger gets them."""
    listener.on_attempt(batches)
    question = evidence.question
    timeout_seconds = settings.timeout_seconds or default_timeout_seconds(
        question.budget, question.setup.step(max(batches)), evidence.trials, settings.steps
    )
    records = fresh and len(batches) > 1 and evidence.lacks_recordings()

    def on_trial(trial: Trial) -> None:
        evidence.add_trial(trial)
        listener.on_trial(trial)

    return settings.measure(
        question.setup,
        question.budget,
        batches,
        TrialSettings(settings.steps, timeout_seconds, fresh=fresh),
        TrialListener(on_trial, evidence.add_recording if records else None, listener.poll),
    )
