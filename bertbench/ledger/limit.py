"""What the trials of one question say together: the limit, and the evidence for it.

A question is a workload and levers under a budget of a device. The search, the report, the list of
the ledger and the plans all take their answer from here. Pure: it starts nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from bertbench.trials.trial import Trial

CERTIFIED, MEASURED, AT_LEAST, BELOW, FAILED = (
    "certified",
    "measured",
    "at least",
    "below",
    "failed",
)
"""Evidence for a limit.

- `certified`: batch b fits and batch b + 1 runs out of memory, each in a fresh process.
- `measured`: both sides were tried, but not in fresh processes, or with batches between them.
- `at least`: only batches that fit were tried.
- `below`: only batches that run out of memory were tried.
- `failed`: no trial has an answer.
"""


@dataclasses.dataclass(frozen=True)
class Limit:
    """The limit of a question, by its trials.

    Example:
        >>> find_limit([Trial(8, "fits"), Trial(9, "oom")]).max_batch
        8

    Attributes:
        fits: trial of the largest batch that fits and is smaller than the one of `oom`.
        oom: trial of the smallest batch that ran out of memory.
        fits_again: trials that fit although their batch is larger than that of `oom`, the smallest
            batch first. Free memory was in other pieces, or another process held some of it during
            the trial of `oom`.
    """

    fits: Trial | None = None
    oom: Trial | None = None
    fits_again: tuple[Trial, ...] = ()

    @property
    def max_batch(self) -> int | None:
        """Batch of `fits`; 0 if batch 1 runs out of memory; None if nothing tells."""
        if self.fits is not None:
            return self.fits.batch
        return 0 if self.oom is not None and self.oom.batch == 1 else None

    @property
    def neighbours(self) -> bool:
        """Whether no batch is left between the one that fits and the one that does not."""
        return self.oom is not None and self.oom.batch == (self.max_batch or 0) + 1

    @property
    def evidence(self) -> str:
        """How the limit is known: `certified`, `measured`, `at least`, `below` or `failed`."""
        if self.oom is None:
            return FAILED if self.fits is None else AT_LEAST
        if self.max_batch is None:
            return BELOW
        fresh = self.oom.fresh and (self.fits is None or self.fits.fresh)
        return CERTIFIED if self.neighbours and fresh else MEASURED


def find_limit(trials: Iterable[Trial]) -> Limit:
    """Find the limit by all trials of a question, the oldest first.

    Of several trials of a batch one counts, see `verdicts`. Failed trials do not count.
    """
    counted = verdicts(trials)
    oom = min((b for b, t in counted.items() if t.outcome == "oom"), default=None)
    fitting = sorted(batch for batch, trial in counted.items() if trial.outcome == "fits")
    below = [batch for batch in fitting if oom is None or batch < oom]
    return Limit(
        fits=counted[below[-1]] if below else None,
        oom=None if oom is None else counted[oom],
        fits_again=tuple(counted[batch] for batch in fitting[len(below) :]),
    )


def verdicts(trials: Iterable[Trial]) -> dict[int, Trial]:
    """Return the trial that counts for each batch.

    A trial in a fresh process counts before one in a process that has tried other batches. Of two
    alike the newer counts, because a doubtful trial is measured again. Steps of runs do not count:
    a run holds more memory than a trial, and after an error it is not repeated as a trial is.
    """
    counted: dict[int, Trial] = {}
    for trial in trials:
        if trial.of_run:
            continue
        before = counted.get(trial.batch)
        if trial.outcome != "failed" and (before is None or trial.fresh or not before.fresh):
            counted[trial.batch] = trial
    return counted


def contradictions(trials: Sequence[Trial]) -> tuple[tuple[Trial, Trial], ...]:
    """Pairs (a, b) of trials where a ran out of memory, and b, of no smaller batch, fits."""
    return tuple(
        (smaller, larger)
        for smaller in trials
        for larger in trials
        if smaller.outcome == "oom" and larger.outcome == "fits" and smaller.batch <= larger.batch
    )
