"""Search for the largest number that passes a test, by doubling and halving."""

from __future__ import annotations

import sys
from collections.abc import Callable


def largest_passing(test: Callable[[int], bool], low: int = 0, at_most: int = sys.maxsize) -> int:
    """Find the largest number that passes a test, where no number above a failing one passes.

    The distance from `low` is doubled until a number fails; the gap is then halved.

    Args:
        test: whether a number passes; it is called with numbers above `low` only.
        low: a number that is known to pass; it is returned if all larger ones fail.
        at_most: largest number to try.
    """
    step = 1
    while low + step <= at_most and test(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, at_most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if test(middle) else (low, middle)
    return low
