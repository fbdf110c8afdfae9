"""Batches near the limit of a step that there is a trace of, and trials that refute the trace."""

from __future__ import annotations

from collections.abc import Sequence, Set

from bertbench.core.workload import Setup
from bertbench.ledger.limit import verdicts
from bertbench.memory.prediction import MemoryPrediction
from bertbench.memory.traces.step import step_requests
from bertbench.trials.trial import Trial

_LOOKED_AT_BEYOND = 64
_REQUESTS_LOOKED_THROUGH = 1_000_000
_HOLES_FROM = 0.8


def refuted(prediction: MemoryPrediction, trials: Sequence[Trial]) -> bool:
    """Whether a trial that counts has ended otherwise than predicted."""
    counted = verdicts(trials).values()
    fits = max((t.batch for t in counted if t.outcome == "fits"), default=None)
    oom = min((t.batch for t in counted if t.outcome == "oom"), default=None)
    return any(
        batch is not None and prediction.fits(batch) is not expected
        for batch, expected in ((fits, True), (oom, False))
    )


def fits_again(prediction: MemoryPrediction, limit: int) -> tuple[int, ...]:
    """Batches that fit above the first one that does not."""
    found = []
    for batch in range(limit + 2, limit + 2 + _LOOKED_AT_BEYOND):
        if prediction.peak_bytes(batch) > prediction.usable_bytes:
            break
        if prediction.fits(batch):
            found.append(batch)
    return tuple(found)


def runs_out_below(
    setup: Setup, prediction: MemoryPrediction, limit: int, tried: Set[int]
) -> tuple[int, ...]:
    """Batches below the limit that do not fit, as far down as costs a second or two.

    Live bytes must fill most of the memory for the pieces of the rest to matter.

    Args:
        setup: what is trained; there must be a trace of it.
        prediction: of its memory, by the trace.
        limit: a batch that fits.
        tried: batches that trials have told of.
    """
    requests = step_requests(setup.step(limit))
    assert requests is not None
    looked_at = _REQUESTS_LOOKED_THROUGH // len(requests[0])
    found = []
    for batch in range(limit - 1, max(limit - 1 - looked_at, 0), -1):
        if prediction.peak_bytes(batch) < _HOLES_FROM * prediction.usable_bytes:
            break
        if batch not in tried and not prediction.fits(batch):
            found.append(batch)
    return tuple(reversed(found))
