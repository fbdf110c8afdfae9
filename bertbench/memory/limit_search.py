"""The largest batch that fits, found by replays: each takes up to a second, so few are made."""

from __future__ import annotations

from collections.abc import Callable

from bertbench.memory.allocator.bfc import Replay

_LOOKED_AT = 5
"""Batches below a limit that might not fit either."""


def largest_batch(
    replayed: Callable[[int], Replay],
    memory_bytes: int,
    *,
    begin: int,
    at_most: int,
    fitting: int = 0,
    known_up_to: int | None = None,
) -> int | None:
    """Find the largest batch that fits, as do all between `fitting` and it.

    Near the limit the pieces that memory is in may be too small for one batch and not for the next.
    So the limit that is found is the end of several batches in a row that fit.

    Args:
        replayed: how a batch ends.
        memory_bytes: what the allocator has.
        begin: batch to look at first.
        at_most: largest batch of interest.
        fitting: a batch that fits, as a trial has said; smaller ones are not asked about.
        known_up_to: batch above which nothing is known; None if there is none.

    Returns:
        `fitting` if no larger one does, None if all fit of which something is known, but larger
        ones may.
    """
    peaks: dict[int, int] = {}

    def fits(batch: int) -> bool:
        ending = replayed(batch)
        if ending.fits:
            peaks[batch] = ending.peak_bytes
        return ending.fits

    known = at_most if known_up_to is None else min(at_most, known_up_to)
    low, high = min(fitting, known), known + 1
    batch = min(max(begin, low + 1), known)
    while low < batch < high:
        low, high = (batch, high) if fits(batch) else (low, batch)
        batch = min(2 * batch, known)
    guess = (low + high) // 2
    if len(peaks) >= 2:
        # A line through the last two; further back the peak may be another moment's.
        (first, first_bytes), (second, second_bytes) = sorted(peaks.items())[-2:]
        rest_bytes = memory_bytes - second_bytes
        if second_bytes > first_bytes:
            guess = second + rest_bytes * (second - first) // (second_bytes - first_bytes)
    low = _last_that_fits(fits, low, high, guess)
    if low == known < at_most:
        return None
    for batch in range(low - 1, fitting, -1):
        if batch <= low - _LOOKED_AT:
            break
        if batch not in peaks and not fits(batch):
            low = batch - 1  # which is looked at next
    return low


def _last_that_fits(fits: Callable[[int], bool], low: int, high: int, guess: int) -> int:
    """Find a batch that fits and whose successor does not, near a guess.

    Args:
        fits: tells whether a batch does. It is costly.
        low: fits.
        high: does not, or is too large.
        guess: where it may be.
    """
    step = max(guess // 128, 1)
    batch = guess
    rising: bool | None = None
    while high - low > 1:
        batch = min(max(batch, low + 1), high - 1)
        fit = fits(batch)
        low, high = (batch, high) if fit else (low, batch)
        if rising is None:
            rising = fit
        if fit is rising and step:
            # Ever longer steps from the guess, until one is beyond it.
            batch = low + step if rising else high - step
            step *= 2
        else:
            step = 0
            batch = (low + high) // 2
    return low
