"""The largest number for which something holds, by doubling and halving."""

from __future__ import annotations

import sys
from collections.abc import Callable


def last_that_holds(holds: Callable[[int], bool], low: int = 0, at_most: int = sys.maxsize) -> int:
    """The last number from `low` on for which something holds that holds for all before it.

    Args:
        holds: asked of numbers above `low` alone.
        low: holds, or stands for nothing that does.
        at_most: largest number of interest.
    """
    step = 1
    while low + step <= at_most and holds(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, at_most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
