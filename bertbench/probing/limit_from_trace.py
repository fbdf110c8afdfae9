"""The limit of a setup by replays of its step trace, and the batches near it that end otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from bertbench.core.workload import Setup
from bertbench.hardware.device import Budget
from bertbench.ledger.limit import verdicts
from bertbench.ledger.question import Question
from bertbench.memory.prediction import TracePrediction, has_trace
from bertbench.memory.room import Room
from bertbench.memory.traces.step_requests import step_requests
from bertbench.probing.search import SearchResult
from bertbench.trials.trial import Trial

_LOOKED_AT_BEYOND = 64
_REQUESTS_LOOKED_THROUGH = 1_000_000
_HOLES_FROM = 0.8


def is_traced(budget: Budget, setup: Setup) -> bool:
    """Whether the step has a trace that needs no margin, as on the CPU that traces are recorded on.

    Kernels of other devices need other workspaces.
    """
    kind = budget.device.kind
    return kind == "cpu" and has_trace(setup, kind)


def limit_from_trace(
    question: Question, trials: Sequence[Trial], poll: Callable[[], None] = lambda: None
) -> LimitFromTrace | None:
    """Return what predicts the limit by the step's trace; None unless `is_traced`.

    Args:
        question: whose limit is asked for.
        trials: see `LimitFromTrace`.
        poll: called before each replay; what it raises ends the replays and is raised on.
    """
    if not is_traced(question.budget, question.setup):
        return None
    room = Room(question.budget.device.kind, question.budget.budget_bytes)
    return LimitFromTrace(TracePrediction(question.setup, room, before_replay=poll), trials)


@dataclasses.dataclass(frozen=True)
class Holes:
    """Batches near a limit that end otherwise than their neighbours, by replays; not measured.

    Free memory is in pieces, and the pieces differ from batch to batch.

    Attributes:
        fits_again: batches above one that does not fit, which fit.
        runs_out_below: batches below the limit that do not fit.
    """

    fits_again: tuple[int, ...] = ()
    runs_out_below: tuple[int, ...] = ()


NO_HOLES = Holes()


@dataclasses.dataclass(frozen=True)
class LimitFromTrace:
    """A `bertbench.memory.prediction.LimitSource` by a step trace, until a trial refutes the trace.

    Attributes:
        prediction: of the step's memory, by its trace.
        trials: what was measured; more of them may come while the search goes on.
    """

    prediction: TracePrediction
    trials: Sequence[Trial]

    def max_micro_batch(self, at_most: int, fitting: int) -> int | None:
        """See `bertbench.memory.prediction.LimitSource`."""
        return None if self.is_refuted() else self.prediction.max_micro_batch(at_most, fitting)

    def is_refuted(self) -> bool:
        """Whether a trial that counts has ended otherwise than its replay."""
        counted = verdicts(self.trials).values()
        fits = max((t.batch for t in counted if t.outcome == "fits"), default=None)
        oom = min((t.batch for t in counted if t.outcome == "oom"), default=None)
        return any(
            batch is not None and self.prediction.fits(batch) is not expected
            for batch, expected in ((fits, True), (oom, False))
        )

    def holes(self, result: SearchResult) -> Holes:
        """Find holes near a limit; none by a trace that was wrong about a trial."""
        if self.is_refuted():
            return NO_HOLES
        limit = result.max_batch
        return Holes(
            self._fits_again(limit) if result.stopped_by == "oom" else (),
            self._runs_out_below(limit) if limit else (),
        )

    def _fits_again(self, limit: int) -> tuple[int, ...]:
        found = []
        for batch in range(limit + 2, limit + 2 + _LOOKED_AT_BEYOND):
            if self.prediction.peak_bytes(batch) > self.prediction.usable_bytes:
                break
            if self.prediction.fits(batch):
                found.append(batch)
        return tuple(found)

    def _runs_out_below(self, limit: int) -> tuple[int, ...]:
        """Look at untried batches below the limit, as far down as costs a second or two.

        Live bytes must fill most of the memory for the pieces of the rest to matter.
        """
        requests = step_requests(self.prediction.setup.step(limit))
        assert requests is not None
        looked_at = _REQUESTS_LOOKED_THROUGH // len(requests[0])
        tried = {trial.batch for trial in self.trials}
        found = []
        for batch in range(limit - 1, max(limit - 1 - looked_at, 0), -1):
            if self.prediction.peak_bytes(batch) < _HOLES_FROM * self.prediction.usable_bytes:
                break
            if batch not in tried and not self.prediction.fits(batch):
                found.append(batch)
        return tuple(reversed(found))
