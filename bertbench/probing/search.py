"""Find the largest batch that fits with few trials, and certify it. Pure: it starts nothing.

A `LimitSource` predicts where the limit is. A step trace tells it before the first trial
(`bertbench.probing.limit_from_trace`). Otherwise two small batches are tried. Recordings of them
tell it (`bertbench.probing.limit_from_recordings`), or a line through their peaks: peaks are close
to affine in the batch once activations outweigh the optimizer's temporaries. Then a trial at the
predicted limit and one above it are usually enough. Trials that do not fit cost most: TensorFlow's
allocator waits 10 seconds, sometimes several times, before it gives up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from bertbench.core.bisection import largest_passing
from bertbench.ledger.limit import Limit, contradictions, find_limit, verdicts
from bertbench.memory.prediction import LimitSource, MemoryPrediction
from bertbench.trials.trial import Trial

MAX_PROBED_BATCH = 1 << 16
"""No batch above this is tried, even when nothing limits it."""

# After so many guesses the device is not as regular as guessing supposes: halve what is left.
_GUESSES = 5

# After so many guesses what was recorded is not believed any more.
_BELIEVED = 4

# How far beyond what fits an extrapolation is believed. The peak of a small model hardly depends on
# the first few batches, and a line through two of them ends at ten times the limit.
_REACH = 8

StoppedBy = Literal["oom", "max_batch", "failed"]


class Measure(Protocol):
    """Try rising batches in one process; stop at the first that does not fit."""

    def __call__(self, batches: Sequence[int], fresh: bool) -> list[Trial]:
        """With `fresh`, in a new process for each batch; at least one trial comes back."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Two trials in fresh processes: `fits` fits, and one more example does not.

    Attributes:
        fits: None when not even batch 1 fits.
        oom: the trial of one example more.
    """

    fits: Trial | None
    oom: Trial

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {"fits": self.fits.to_json() if self.fits else None, "oom": self.oom.to_json()}


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        max_batch: largest batch below which no tried batch ran out of memory, see
            `bertbench.ledger.limit`; 0 if none has fitted.
        certificate: None if the search was stopped, or not asked to certify.
        stopped_by: `oom`: a limit was measured. `max_batch`: all up to the bound that was asked
            for fits, and no limit was looked for. `failed`: a trial failed for another reason,
            and `max_batch` is only the largest that has fitted so far.
        trials: all evidence in order, beginning with what was known.
        measured: how many of them were measured now.
        contradictions: pairs (a, b) where a ran out of memory, and b, no smaller, fits. They may
            be the same batch, tried twice.
        message: why it failed. If it did not fail: the error of the first batch that does not fit.
        missing_bytes: by how much the prediction for batch 1 exceeds the budget, if `max_batch` is
            0 and there is a prediction that does.
    """

    max_batch: int
    certificate: Certificate | None
    stopped_by: StoppedBy
    trials: tuple[Trial, ...]
    measured: int
    contradictions: tuple[tuple[Trial, Trial], ...] = ()
    message: str = ""
    missing_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What is predicted of a limit before it is measured.

    Attributes:
        replay: finds the limit by replays of what a step asks of the allocator, and so to the
            batch, if it can tell. Without it no trial is recorded either.
        formula: is off by some percent, but always tells. Its limit chooses the first batches.
        examples_per_chunk: of layers that are computed in chunks. The larger of the first two
            batches then has up to six of them, at least two if it may, of unequal sizes: recordings
            of it tell most.
    """

    replay: LimitSource | None = None
    formula: MemoryPrediction | None = None
    examples_per_chunk: int = 1


def find_max_batch(
    measure: Measure,
    *,
    budget_bytes: int,
    known: Sequence[Trial] = (),
    predictions: Predictions = Predictions(),
    max_batch: int | None = None,
    certify: bool = True,
) -> SearchResult:
    """Find the largest batch that fits.

    The answer rests on trials only, as `bertbench.ledger.limit` reads them; the predictions and the
    peaks merely choose which to make. `SearchResult.contradictions` names trials that a limit
    cannot explain.

    Args:
        measure: makes trials. The first batch of a call is taken as measured in a fresh process.
        budget_bytes: what the allocator may use.
        known: earlier trials of the same question; failed ones are ignored.
        predictions: of the limit.
        max_batch: largest batch of interest.
        certify: measure both sides of the limit in fresh processes.

    Returns:
        The result, with all evidence.
    """
    cap = MAX_PROBED_BATCH if max_batch is None else max_batch
    if cap < 1:
        raise ValueError(f"max_batch must be at least 1, not {max_batch}")
    trials = [t for t in known if t.outcome != "failed" and t.batch <= cap]
    search = _Search(budget_bytes, predictions, cap, trials)
    known_count = len(trials)
    while True:
        batches = _unsettled(find_limit(trials), cap, certify)
        if batches is None:
            break
        batches = batches or search.next_batches()
        message = search.measure(measure, batches)
        if message is not None:
            return _result("failed", search, known_count, message=message)
    limit = find_limit(trials)
    if limit.oom is None:
        return _result("max_batch", search, known_count)
    certificate = Certificate(limit.fits, limit.oom) if certify else None
    return _result("oom", search, known_count, certificate, limit.oom.message)


@dataclasses.dataclass
class _Search:
    """A search that is under way.

    Attributes:
        budget_bytes: what the allocator may use.
        predictions: of the limit.
        cap: largest batch of interest.
        trials: evidence so far, in order.
        guesses: outcomes of the batches that were tried alone.
    """

    budget_bytes: int
    predictions: Predictions
    cap: int
    trials: list[Trial]
    guesses: list[str] = dataclasses.field(default_factory=list)

    def bracket(self) -> tuple[int, int | None]:
        """Return the largest batch that fits, or 0, and the smallest that does not."""
        limit = find_limit(self.trials)
        return limit.max_batch or 0, None if limit.oom is None else limit.oom.batch

    def next_batches(self) -> list[int]:
        """Choose batches that narrow the limit, rising; at least one."""
        low, high = self.bracket()
        located = None
        if self.predictions.replay is not None and len(self.guesses) < _BELIEVED:
            located = self.predictions.replay.max_micro_batch(self.cap, low)
        if located is not None:
            return [next_guess(low, high, self.cap, located, self.guesses)]
        if low == 0:
            return self._first_batches(high)
        estimate = self._estimate()
        if not high and estimate and min(estimate, self.cap) > _REACH * low:
            return [_REACH // 2 * low, _REACH * low]
        return [next_guess(low, high, self.cap, estimate, self.guesses)]

    def measure(self, measure: Measure, batches: list[int]) -> str | None:
        """Try batches; return why the last of them failed, or None."""
        low, _ = self.bracket()
        fresh = len(batches) == 1 or (self.predictions.replay is not None and low == 0)
        found = measure(batches, fresh)
        if not found or [trial.batch for trial in found] != batches[: len(found)]:
            raise RuntimeError(f"batches {batches} were to be tried, not {found}")
        for index, trial in enumerate(found):
            self.trials.append(dataclasses.replace(trial, fresh=fresh or index == 0))
        if found[-1].outcome == "failed":
            return found[-1].message
        if len(batches) == 1:
            self.guesses.append(found[0].outcome)
        return None

    def missing_bytes(self) -> int | None:
        """By how much the predicted peak of batch 1 exceeds the budget, if it does."""
        formula = self.predictions.formula
        missing_bytes = 0 if formula is None else formula.peak_bytes(1) - self.budget_bytes
        return missing_bytes if missing_bytes > 0 else None

    def _first_batches(self, high: int | None) -> list[int]:
        below = self.cap + 1 if high is None else high
        bound = high
        if self.predictions.formula is not None:
            bound = self.predictions.formula.max_micro_batch(below - 1, 0)
        return _first_batches(bound, below, self.predictions.examples_per_chunk)

    def _estimate(self) -> int | None:
        """Where the limit should be by measured peaks and the formula; None if nothing tells."""
        peaks = {
            batch: trial.peak_bytes
            for batch, trial in verdicts(self.trials).items()
            if trial.outcome == "fits" and trial.peak_bytes is not None
        }
        if sum(batch >= 2 for batch in peaks) >= 2:
            return _line_limit(peaks, self.budget_bytes)
        formula = self.predictions.formula
        if formula is None:
            return None
        error_bytes = peaks[max(peaks)] - formula.peak_bytes(max(peaks)) if peaks else 0
        usable_bytes = self.budget_bytes - error_bytes
        return largest_passing(
            lambda batch: formula.peak_bytes(batch) <= usable_bytes, at_most=MAX_PROBED_BATCH
        )


def _result(
    stopped_by: StoppedBy,
    search: _Search,
    known_count: int,
    certificate: Certificate | None = None,
    message: str = "",
) -> SearchResult:
    low, _ = search.bracket()
    return SearchResult(
        max_batch=low,
        certificate=certificate,
        stopped_by=stopped_by,
        trials=tuple(search.trials),
        measured=len(search.trials) - known_count,
        contradictions=contradictions(search.trials),
        message=message,
        missing_bytes=search.missing_bytes() if stopped_by == "oom" and low == 0 else None,
    )


def _unsettled(limit: Limit, cap: int, certify: bool) -> list[int] | None:
    """Tell what is left once the limit is between two neighbours.

    Returns:
        The batch to repeat in a fresh process; an empty list while the limit is not that narrow;
        None when nothing is left. The batch that fits comes first: it costs no waiting.
    """
    if not limit.neighbours and not (limit.oom is None and limit.max_batch == cap):
        return []
    for trial in (limit.fits, limit.oom) if certify else ():
        if trial is not None and not trial.fresh:
            return [trial.batch]
    return None


def _first_batches(bound: int | None, below: int, examples_per_chunk: int) -> list[int]:
    """Choose two cheap batches to extrapolate from.

    Args:
        bound: where the limit is thought to be; None if nothing tells.
        below: the batches must be smaller.
        examples_per_chunk: see `Predictions`.
    """
    pair: tuple[int, ...] = (2, 4)
    if bound is not None and bound < 2:
        pair = (1,)
    elif bound is not None and bound < 4:
        pair = (1, 2)
    elif bound == 4:
        pair = (2, 3)
    elif bound is not None and bound >= 16:
        # Far enough from where the limit is thought to be to fit even if that is twice too much,
        # near enough to extrapolate from.
        pair = (bound // 8, bound // 3)
    if bound is not None and bound >= 8 and examples_per_chunk > 1:
        # One example less than fills the chunks, so that they are of two sizes.
        wanted = [n * examples_per_chunk - 1 for n in (6, 4, 3, 2)]
        larger = [n for n in wanted if n <= 0.6 * bound]
        if not larger and examples_per_chunk + 3 <= 0.85 * bound:
            larger = [examples_per_chunk + 3]
        if larger:
            pair = (min(pair[0], larger[0] - 1), larger[0])
    return [batch for batch in pair if batch < below] or [1]


def _line_limit(peaks: Mapping[int, int], budget_bytes: int) -> int | None:
    """Where a line through the peaks of two batches meets the budget; None if it does not rise.

    Args:
        peaks: bytes by batch, of at least two batches above 1.
        budget_bytes: what the allocator may use.
    """
    *others, last = sorted(batch for batch in peaks if batch >= 2)
    # The nearest to half of the last: near enough to see a bend, far enough to see past noise.
    first = min(others, key=lambda batch: abs(2 * batch - last))
    rise = peaks[last] - peaks[first]
    if rise <= 0:
        return None
    return last + (budget_bytes - peaks[last]) * (last - first) // rise


def next_guess(
    low: int, high: int | None, cap: int, estimate: int | None, guesses: Sequence[str]
) -> int:
    """Choose the next batch strictly between what fits and what does not.

    Args:
        low: largest batch that fits, or 0.
        high: smallest one that does not; None if none is known.
        cap: largest batch of interest.
        estimate: where the limit should be; None if nothing tells.
        guesses: outcomes of the guesses so far, `fits` or another word.
    """
    if high is not None and (len(guesses) >= _GUESSES or estimate is None):
        return (low + high) // 2
    repeated = 1
    while repeated < len(guesses) and guesses[-repeated - 1] == guesses[-1]:
        repeated += 1
    # The first miss beside the estimate is by one, for that would be the certificate; then by
    # growing parts of the batch, for that is how fragmentation grows.
    step = 1 if repeated == 1 else max(1, (high or low) // 32) * 3 ** (repeated - 1)
    last = guesses[-1] if guesses else ""
    guess = 2 * low if estimate is None else max(estimate, low + 1)
    if last == "fits" and repeated > 1:
        guess = max(guess, low + step)
    if high is not None:
        guess = min(guess, high - (step if last == "oom" else 1))
        middle = (low + high) // 2
        if repeated > 1:
            guess = min(guess, middle) if last == "fits" else max(guess, middle)
    return max(low + 1, min(guess, cap if high is None else high - 1))
