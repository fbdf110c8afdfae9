"""Find the largest batch that fits with few trials, and certify it. Pure: it starts nothing.

Where the limit should be is known before the first trial, by a trace of the step
(`bertbench.memory.prediction`); or two small batches tell it, by a replay of what they asked of
the allocator (`bertbench.memory.allocator.bfc`) or, where there is none, because the peak is close
to affine in the batch once activations outweigh the optimizer's temporaries. A trial there and one
beside it are usually all that is left. The cost to keep low is that of trials that do not fit:
TensorFlow's allocator waits 10 seconds, sometimes several times, before it gives up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from bertbench.core.bisection import largest_passing
from bertbench.ledger.limit import Limit, contradictions, find_limit, verdicts
from bertbench.trials.trial import Trial

LARGEST_BATCH = 1 << 16
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
        message: the cause if it failed; the error of the first batch that does not fit otherwise.
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


def find_max_batch(
    measure: Measure,
    *,
    known: Sequence[Trial] = (),
    predict_peak_bytes: Callable[[int], int] | None = None,
    locate: Callable[[int], int | None] | None = None,
    examples_per_chunk: int = 1,
    budget_bytes: int,
    max_batch: int | None = None,
    certify: bool = True,
) -> SearchResult:
    """Find the largest batch that fits.

    The answer rests on trials only, as `bertbench.ledger.limit` reads them; the prediction and the
    peaks merely choose which to make. `SearchResult.contradictions` names trials that a limit
    cannot explain.

    Args:
        measure: makes trials. The first batch of a call is taken as measured in a fresh process.
        known: earlier trials of the same question; failed ones are ignored.
        predict_peak_bytes: predicted peak of a batch, rising with it.
        locate: says up to where all fits beyond a batch that does, by a trace of the step or by
            what trials in fresh processes have recorded so far; None if nothing tells.
        examples_per_chunk: of layers that are computed in chunks. The larger of the first two
            batches then has up to six of them, at least two if it may, of unequal sizes: for
            `locate` needs that.
        budget_bytes: what the allocator may use.
        max_batch: largest batch of interest.
        certify: measure both sides of the limit in fresh processes.

    Returns:
        The result, with all evidence.
    """
    cap = LARGEST_BATCH if max_batch is None else max_batch
    if cap < 1:
        raise ValueError(f"max_batch must be at least 1, not {max_batch}")
    trials = [t for t in known if t.outcome != "failed" and t.batch <= cap]
    known_count = len(trials)
    guesses: list[str] = []
    while True:
        limit = find_limit(trials)
        low, high = _bracket(limit)
        batches = _unsettled(limit, cap, certify)
        if batches is None:
            break
        if not batches:
            bound = _predicted_limit(predict_peak_bytes, budget_bytes, (high or cap + 1) - 1)
            located = locate(low) if locate and len(guesses) < _BELIEVED else None
            if located is not None:
                batches = [_guess(low, high, cap, located, guesses)]
            elif low == 0:
                batches = _first_batches(bound, high, cap, examples_per_chunk)
            else:
                estimate = _estimate(trials, predict_peak_bytes, budget_bytes)
                if low and not high and estimate and min(estimate, cap) > _REACH * low:
                    batches = [_REACH // 2 * low, _REACH * low]
                else:
                    batches = [_guess(low, high, cap, estimate, guesses)]
        fresh = len(batches) == 1 or (locate is not None and low == 0)
        found = measure(batches, fresh)
        if not found or [trial.batch for trial in found] != batches[: len(found)]:
            raise RuntimeError(f"batches {batches} were to be tried, not {found}")
        for index, trial in enumerate(found):
            trials.append(dataclasses.replace(trial, fresh=fresh or index == 0))
        if found[-1].outcome == "failed":
            low, _ = _bracket(find_limit(trials))
            return _result("failed", low, None, trials, known_count, found[-1].message)
        if len(batches) == 1:
            guesses.append(found[0].outcome)

    if limit.oom is None:
        return _result("max_batch", low, None, trials, known_count, "")
    certificate = Certificate(limit.fits, limit.oom) if certify else None
    result = _result("oom", low, certificate, trials, known_count, limit.oom.message)
    if low == 0 and predict_peak_bytes is not None:
        missing_bytes = predict_peak_bytes(1) - budget_bytes
        result = dataclasses.replace(
            result, missing_bytes=missing_bytes if missing_bytes > 0 else None
        )
    return result


def _result(
    stopped_by: StoppedBy,
    max_batch: int,
    certificate: Certificate | None,
    trials: Sequence[Trial],
    known_count: int,
    message: str,
) -> SearchResult:
    return SearchResult(
        max_batch=max_batch,
        certificate=certificate,
        stopped_by=stopped_by,
        trials=tuple(trials),
        measured=len(trials) - known_count,
        contradictions=contradictions(trials),
        message=message,
    )


def _bracket(limit: Limit) -> tuple[int, int | None]:
    """Return the largest batch that fits, or 0, and the smallest that does not."""
    return limit.max_batch or 0, None if limit.oom is None else limit.oom.batch


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


def _predicted_limit(
    predict: Callable[[int], int] | None, budget_bytes: int, largest: int
) -> int | None:
    """Largest batch up to `largest` that is predicted to fit; 0 if none, None if not predicted."""
    if predict is None:
        return None
    return largest_passing(lambda batch: predict(batch) <= budget_bytes, at_most=largest)


def _first_batches(
    limit: int | None, high: int | None, cap: int, examples_per_chunk: int
) -> list[int]:
    """Two cheap batches to extrapolate from."""
    below = cap + 1 if high is None else high
    bound = high if limit is None else limit
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


def _estimate(
    trials: Sequence[Trial], predict: Callable[[int], int] | None, budget_bytes: int
) -> int | None:
    """Where the limit should be by what is known; None if nothing tells."""
    peaks = {
        batch: trial.peak_bytes
        for batch, trial in verdicts(trials).items()
        if trial.outcome == "fits" and trial.peak_bytes is not None
    }
    regular = sorted(batch for batch in peaks if batch >= 2)
    if len(regular) >= 2:
        last = regular[-1]
        # The nearest to half of the last: near enough to see a bend, far enough to see past noise.
        first = min(regular[:-1], key=lambda batch: abs(2 * batch - last))
        rise = peaks[last] - peaks[first]
        if rise <= 0:
            return None
        return last + (budget_bytes - peaks[last]) * (last - first) // rise
    if predict is None:
        return None
    error_bytes = 0
    if peaks:
        error_bytes = peaks[max(peaks)] - predict(max(peaks))
    return _predicted_limit(predict, budget_bytes - error_bytes, LARGEST_BATCH)


def _guess(
    low: int, high: int | None, cap: int, estimate: int | None, guesses: Sequence[str]
) -> int:
    """Choose the next batch strictly between what fits and what does not."""
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
