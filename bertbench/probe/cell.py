"""One cell of a probe: a workload and levers, the largest batch that fits, and the evidence."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from bertbench.core.workload import Levers, Setup, Workload
from bertbench.devices.device import Budget
from bertbench.devices.step_time import device_rates, predict_step_seconds
from bertbench.ledger.database import Ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import find, find_allocations, record, record_allocations
from bertbench.memory.allocator.limit import empty_memory
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.limit_search import largest_batch
from bertbench.memory.prediction import FormulaPrediction, Room, TracePrediction, has_trace
from bertbench.memory.traces.loops import Recorded
from bertbench.probe.extrapolation import extrapolate
from bertbench.probe.search import LARGEST_BATCH, SearchResult, find_max_batch
from bertbench.probe.traced_limit import fits_again, refuted, runs_out_below
from bertbench.trials.measure import (
    TIMEOUT_SECONDS,
    TrialListener,
    TrialSettings,
    measure_batches,
)
from bertbench.trials.trial import Trial
from finetune.spec.checkpointing import examples_per_chunk

_PLENTY = 10.0
_START_SECONDS = 5.0
_ALLOCATOR_WAITS_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """A question and its answer.

    Attributes:
        workload: model, head and sequence length.
        levers: lever settings.
        result: what the search found.
        seconds: time it took now.
        replicas: copies of the model that took a batch each, at the same time.
        fits_again: batches above one that does not fit for which memory happens to be in larger
            pieces, by the step's trace; not measured.
        runs_out_below: batches below the limit for which memory happens to be in smaller pieces,
            by the step's trace; not measured.
    """

    workload: Workload
    levers: Levers
    result: SearchResult
    seconds: float
    replicas: int = 1
    fits_again: tuple[int, ...] = ()
    runs_out_below: tuple[int, ...] = ()

    def examples_per_second(self, trial: Trial) -> float | None:
        """Rate of a trial of this cell; None if it has not been timed."""
        if not trial.step_seconds:
            return None
        return trial.batch * self.levers.accumulation_steps * self.replicas / trial.step_seconds

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
        result = self.result
        return {
            "model": self.workload.model,
            "head": self.workload.head,
            "seq_len": self.workload.seq_len,
            "levers": self.levers.to_json(),
            "max_batch": result.max_batch,
            "stopped_by": result.stopped_by,
            "certificate": result.certificate.to_json() if result.certificate else None,
            "contradictions": [[a.to_json(), b.to_json()] for a, b in result.contradictions],
            "message": result.message,
            "missing_bytes": result.missing_bytes,
            "fits_again": list(self.fits_again),
            "runs_out_below": list(self.runs_out_below),
            "trials": [trial.to_json() for trial in result.trials],
            "curve": self.curve(),
            "measured": result.measured,
            "seconds": round(self.seconds, 3),
        }


def probe_cell(
    ledger: Ledger,
    budget: Budget,
    workload: Workload,
    levers: Levers,
    *,
    max_batch: int | None = None,
    certify: bool = True,
    fresh: bool = False,
    steps: int = 3,
    timeout_seconds: float | None = None,
    on_attempt: Callable[[Sequence[int]], None] = lambda batches: None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    check: Callable[[], None] = lambda: None,
) -> Cell:
    """Find and certify the largest batch of a cell; every trial goes to the ledger at once.

    Args:
        ledger: open; trials in it that answer the same question are not repeated.
        budget: device and bytes.
        workload: model, head and sequence length.
        levers: lever settings.
        max_batch: largest batch of interest.
        certify: measure both sides of the limit in fresh processes.
        fresh: measure again what the ledger knows.
        steps: optimizer steps of a trial, at least 2.
        timeout_seconds: longest time of a trial; None for what is plenty by the trials so far.
        on_attempt: called with the batches before they are tried.
        on_trial: called after every trial that was measured.
        check: called several times a second; what it raises ends the search and is raised on.
    """
    began = time.monotonic()
    question = Question(budget, Setup(workload, levers))

    known = [] if fresh else find(ledger, question)
    measured = list(known)

    def keep(trial: Trial) -> None:
        measured.append(trial)
        record(ledger, question, trial)
        on_trial(trial)

    @functools.cache  # not read at all if the trials that are known answer the question
    def recorded() -> list[Recorded]:
        return [] if fresh else find_allocations(ledger, question)

    def keep_recording(batch: int, recording: Recording) -> None:
        recorded().append(Recorded(workload.seq_len, batch, recording))
        record_allocations(ledger, question, batch, recording)

    def enough() -> bool:
        # A TPU's memory is laid out by the compiler, before the step. Batch 1 tells nothing.
        on_tpu = budget.device.kind == "tpu"
        own = {one.batch for one in recorded() if one.seq_len == workload.seq_len}
        return on_tpu or len(own - {1}) >= 2

    def measure(batches: Sequence[int], fresh: bool) -> list[Trial]:
        on_attempt(batches)
        seconds = timeout_seconds or plenty_seconds(
            budget, workload, levers, measured, max(batches), steps
        )
        on_recording = keep_recording if fresh and len(batches) > 1 and not enough() else None
        return measure_batches(
            question.setup,
            budget,
            batches,
            TrialSettings(steps, seconds, fresh=fresh),
            TrialListener(keep, on_recording, check),
        )

    setup, memory = Setup(workload, levers), empty_memory(budget)
    room = Room(budget.device.kind, budget.budget_bytes)
    formula, traced = FormulaPrediction(setup, room), None
    if is_traced(budget, setup):
        traced = TracePrediction(setup, room, before_replay=check)

    @functools.lru_cache(maxsize=1)
    def extrapolated(number_recorded: int, fitting: int) -> int | None:
        for few_chunks in (False, True):
            extrapolation = extrapolate(
                recorded(),
                workload.seq_len,
                lambda seq_len: _examples_per_chunk(workload, levers, seq_len),
                few_chunks=few_chunks,
            )
            if extrapolation is None:
                return None
            limit = largest_batch(
                functools.partial(extrapolation.replay, memory=memory),
                memory.total_bytes,
                begin=extrapolation.batch,
                at_most=LARGEST_BATCH,
                fitting=fitting,
                known_up_to=extrapolation.largest,
            )
            if limit is None or limit >= extrapolation.batch:
                break
        return limit

    def locate(fitting: int) -> int | None:
        if traced is not None and not refuted(traced, measured):
            return traced.max_micro_batch(max_batch or LARGEST_BATCH, fitting)
        return extrapolated(len(recorded()), fitting)

    result = find_max_batch(
        measure,
        known=known,
        predict_peak_bytes=formula.peak_bytes,
        locate=locate,
        examples_per_chunk=max(_examples_per_chunk(workload, levers, workload.seq_len), default=1),
        budget_bytes=budget.budget_bytes,
        max_batch=max_batch,
        certify=certify,
    )
    again: tuple[int, ...] = ()
    below: tuple[int, ...] = ()
    # A trace that was wrong about a trial is not asked about what was not tried.
    if traced is not None and not refuted(traced, measured):
        if result.stopped_by == "oom":
            again = fits_again(traced, result.max_batch)
        if result.max_batch:
            tried = {trial.batch for trial in measured}
            below = runs_out_below(setup, traced, result.max_batch, tried)
    seconds = time.monotonic() - began
    return Cell(workload, levers, result, seconds, budget.device.replicas, again, below)


def is_traced(budget: Budget, setup: Setup) -> bool:
    """Whether the step's trace is exact; another device's kernels have other workspaces."""
    kind = budget.device.kind
    return kind == "cpu" and has_trace(setup, kind)


def predict_cell_seconds(
    budget: Budget, workload: Workload, levers: Levers, steps: int = 3
) -> float:
    """Guess how long a cell takes: the limit, and one that does not fit; two small ones before."""
    setup, room = Setup(workload, levers), Room(budget.device.kind, budget.budget_bytes)
    limit = FormulaPrediction(setup, room).max_micro_batch()
    rates = device_rates(budget.device)
    seconds = _ALLOCATOR_WAITS_SECONDS
    batches = [(limit, steps), (limit + 1, 1)]
    if not is_traced(budget, setup):
        batches += [(limit // 8, steps + 2), (limit // 3, steps + 2)]
    for batch, its_steps in batches:
        step_seconds = predict_step_seconds(setup.step(max(batch, 1)), rates)
        seconds += _START_SECONDS + its_steps * step_seconds
    return seconds


def plenty_seconds(
    budget: Budget,
    workload: Workload,
    levers: Levers,
    trials: Sequence[Trial],
    batch: int,
    steps: int,
) -> float:
    """Time after which a trial of a batch must be hanging: ten times what others let expect."""
    timed = [t.step_seconds / t.batch for t in trials if t.step_seconds is not None]
    if timed:
        step_seconds = max(timed) * batch
    else:
        step_seconds = predict_step_seconds(
            Setup(workload, levers).step(batch), device_rates(budget.device)
        )
    # A first step takes longer than the others, and recording repeats it.
    return max(TIMEOUT_SECONDS, _PLENTY * step_seconds * (steps + 3))


def _examples_per_chunk(workload: Workload, levers: Levers, seq_len: int) -> list[int]:
    """Most examples of a chunk, for every policy in use that has chunks."""
    policies = levers.checkpointing.chunked_policies(workload.config.num_hidden_layers)
    return [examples_per_chunk(policy, seq_len) or 1 for policy in policies]
