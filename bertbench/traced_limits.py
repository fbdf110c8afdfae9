"""Where a step's trace says that memory ends: to the byte on a CPU, nearly so on a GPU.

A GPU has the same allocator and is asked for the same tensors, but the workspaces of its kernels
are its own. How much they take is seen at a batch a little below the limit.

This module does not import TensorFlow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence, Set

from bertbench.allocations import Memory, Replay
from bertbench.extrapolation import largest_batch
from bertbench.search import LARGEST_BATCH
from bertbench.traced_footprint import traced_footprint
from bertbench.traced_steps import replay_step, step_requests, traced_peak_bytes
from bertbench.trial import Trial
from bertbench.workload import Levers, Workload

_LOOKED_AT_BEYOND = 64
_REQUESTS_LOOKED_THROUGH = 1_000_000
_HOLES_FROM = 0.8
_BEGIN_SHARE = 0.98
_FIRST_SHARE = 0.97
"""Part of the limit by the trace that another device is tried with first."""


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
        return replay_step(self.workload, self.levers, batch, self.memory)

    def refuted_by(self, trials: Sequence[Trial]) -> bool:
        """Whether a trial has ended otherwise than a replay."""
        fits = max((t.batch for t in trials if t.outcome == "fits"), default=None)
        oom = min((t.batch for t in trials if t.outcome == "oom"), default=None)
        return any(
            batch is not None and self.replayed(batch).fits is not expected
            for batch, expected in ((fits, True), (oom, False))
        )

    def limit(self, at_most: int = LARGEST_BATCH, fitting: int = 0) -> int:
        """Largest batch that fits; see `bertbench.extrapolation.largest_batch`."""
        return self._largest(lambda batch: self.memory, at_most, fitting)

    def _largest(self, memory_for: Callable[[int], Memory], at_most: int, fitting: int) -> int:
        """Largest batch that fits in the memory that is for it."""

        def alive(batch: int) -> bool:
            return self._alive_bytes(batch) <= memory_for(batch).total_bytes

        def replayed(batch: int) -> Replay:
            return dataclasses.replace(self, memory=memory_for(batch)).replayed(batch)

        # A replay takes up to a second, and what is alive at once a fraction of a millisecond.
        bound = _last(alive, fitting, at_most)
        if bound <= fitting:
            return fitting
        limit = largest_batch(
            replayed,
            memory_for(bound).total_bytes,
            begin=int(_BEGIN_SHARE * bound),
            at_most=bound,
            fitting=fitting,
        )
        assert limit is not None
        return limit

    def limit_of_another_device(
        self, trials: Sequence[Trial], at_most: int = LARGEST_BATCH
    ) -> int | None:
        """Where to try a device next whose kernels take other workspaces.

        Args:
            trials: of this step, on the device.
            at_most: largest batch of interest.

        Returns:
            A batch a little below the limit while there is no trial; then the limit in memory that
            is smaller, or larger, by what the peaks of batches that fitted were off: as much as
            that of one, or as the line through those of the two largest says. None if nothing
            fitted.
        """
        if not trials:
            limit = self.limit(at_most)
            return max(int(_FIRST_SHARE * limit), 1) if limit else 0
        peaks = {t.batch: t.peak_bytes for t in trials if t.outcome == "fits" and t.peak_bytes}
        if not peaks:
            return None
        *others, largest = sorted(peaks)
        more_bytes = peaks[largest] - self.peak_bytes(largest)
        more_each = 0.0
        if others:
            less_bytes = more_bytes - (peaks[others[-1]] - self.peak_bytes(others[-1]))
            more_each = less_bytes / (largest - others[-1])
        *regions, last = self.memory.region_bytes

        def memory_for(batch: int) -> Memory:
            left = last - more_bytes - int(more_each * (batch - largest))
            return dataclasses.replace(self.memory, region_bytes=(*regions, max(left, 0)))

        return self._largest(memory_for, at_most, largest)

    def peak_bytes(self, batch: int) -> int:
        """Predicted peak, without what the allocator loses if that is too much for the memory."""
        for replayed in (True, False):
            footprint = traced_footprint(
                self.workload, self.levers, batch, self.memory, replayed=replayed
            )
            if footprint is not None:
                break
        assert footprint is not None
        return footprint.peak_bytes

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
        requests = step_requests(self.workload, self.levers, limit)
        assert requests is not None
        looked_at = _REQUESTS_LOOKED_THROUGH // len(requests[0])
        found = []
        for batch in range(limit - 1, max(limit - 1 - looked_at, 0), -1):
            if self._alive(batch) < _HOLES_FROM:
                break
            if batch not in tried and not self.replayed(batch).fits:
                found.append(batch)
        return tuple(reversed(found))

    def _alive(self, batch: int) -> float:
        """Part of memory that is alive at the peak, whatever pieces the rest is in."""
        return self._alive_bytes(batch) / self.memory.total_bytes

    def _alive_bytes(self, batch: int) -> int:
        alive_bytes = traced_peak_bytes(self.workload, self.levers, batch)
        assert alive_bytes is not None
        return alive_bytes + self.memory.held_bytes


def _last(holds: Callable[[int], bool], low: int, at_most: int) -> int:
    """The last number from `low` on for which something holds that holds for all before it."""
    step = 1
    while low + step <= at_most and holds(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, at_most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
