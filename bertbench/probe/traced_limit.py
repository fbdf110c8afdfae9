"""Where memory ends for a step that there is a trace of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence, Set

from bertbench.core.bisection import largest_passing
from bertbench.core.workload import Levers, Setup, TrainingStep, Workload
from bertbench.ledger.limit import verdicts
from bertbench.memory.allocator.bfc import Memory, Replay
from bertbench.memory.traces.peaks import traced_peak_bytes
from bertbench.memory.traces.step import replay_step, step_requests
from bertbench.probe.extrapolation import largest_batch
from bertbench.probe.search import LARGEST_BATCH
from bertbench.trials.trial import Trial

_LOOKED_AT_BEYOND = 64
_REQUESTS_LOOKED_THROUGH = 1_000_000
_HOLES_FROM = 0.8
_BEGIN_SHARE = 0.98


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step that there is a trace of, in an allocator's memory.

    Attributes:
        workload: model, head and sequence length.
        levers: lever settings.
        memory: what the allocator has.
        check: called between replays; what it raises ends them and is raised on.
    """

    workload: Workload
    levers: Levers
    memory: Memory
    check: Callable[[], None] = lambda: None

    def replayed(self, batch: int) -> Replay:
        """How a batch ends."""
        self.check()
        return replay_step(self._step(batch), self.memory)

    def refuted_by(self, trials: Sequence[Trial]) -> bool:
        """Whether a trial that counts has ended otherwise than a replay."""
        counted = verdicts(trials).values()
        fits = max((t.batch for t in counted if t.outcome == "fits"), default=None)
        oom = min((t.batch for t in counted if t.outcome == "oom"), default=None)
        return any(
            batch is not None and self.replayed(batch).fits is not expected
            for batch, expected in ((fits, True), (oom, False))
        )

    def limit(self, at_most: int = LARGEST_BATCH, fitting: int = 0) -> int:
        """Largest batch that fits; see `bertbench.probe.extrapolation.largest_batch`."""
        # A replay takes up to a second, and what is alive at once a fraction of a millisecond.
        bound = largest_passing(lambda batch: self._alive(batch) <= 1.0, fitting, at_most)
        if bound <= fitting:
            return fitting
        limit = largest_batch(
            self.replayed,
            self.memory.total_bytes,
            begin=int(_BEGIN_SHARE * bound),
            at_most=bound,
            fitting=fitting,
        )
        assert limit is not None
        return limit

    def fits_again(self, limit: int) -> tuple[int, ...]:
        """Batches above one that does not fit that do."""
        found = []
        for batch in range(limit + 2, limit + 2 + _LOOKED_AT_BEYOND):
            if self._alive(batch) > 1.0:
                break
            if self.replayed(batch).fits:
                found.append(batch)
        return tuple(found)

    def runs_out_below(self, limit: int, tried: Set[int]) -> tuple[int, ...]:
        """Batches below the limit that do not fit, as far down as costs a second or two.

        What is alive must fill most of memory for the pieces of the rest to matter.

        Args:
            limit: a batch that fits.
            tried: batches that trials have told of.
        """
        requests = step_requests(self._step(limit))
        assert requests is not None
        looked_at = _REQUESTS_LOOKED_THROUGH // len(requests[0])
        found = []
        for batch in range(limit - 1, max(limit - 1 - looked_at, 0), -1):
            if self._alive(batch) < _HOLES_FROM:
                break
            if batch not in tried and not self.replayed(batch).fits:
                found.append(batch)
        return tuple(reversed(found))

    def _step(self, batch: int) -> TrainingStep:
        return Setup(self.workload, self.levers).step(batch)

    def _alive(self, batch: int) -> float:
        """Part of memory that is alive at the peak, whatever pieces the rest is in."""
        alive_bytes = traced_peak_bytes(self._step(batch))
        assert alive_bytes is not None
        return (alive_bytes + self.memory.held_bytes) / self.memory.total_bytes
