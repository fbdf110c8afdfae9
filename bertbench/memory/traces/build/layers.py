"""Find what a recorded step repeats for every layer.

Two samples that differ by one layer tell: the larger one has the items of one layer more, at one or
several places. Around such a place lie the items of the other layers, which are the same.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from bertbench.memory.traces.build.samples import StepItem, UnlikeError
from bertbench.memory.traces.trace import ALL_LAYERS

_NEVER = 1 << 30


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Items that are repeated for every layer: some whole periods, one for a layer.

    Attributes:
        kind: kind of the layers, see `bertbench.memory.traces.trace.PerLayer`.
        left: number of the first item.
        right: number of the item after the last one.
        length: items of a period.
        count: layers of that kind in the sample.
    """

    kind: str
    left: int
    right: int
    length: int
    count: int

    @property
    def periods(self) -> int:
        """How many times the items come."""
        return (self.right - self.left) // self.length

    def canonical(self, item: int) -> int:
        """Number of the item in the first period that is the same as an item in any period."""
        if self.left <= item < self.right:
            return self.left + (item - self.left) % self.length
        return item


def find_repetitions(
    fewer: Sequence[StepItem], more: Sequence[StepItem], kind: str, count: int
) -> list[Repetition]:
    """Find what is repeated for layers of one kind.

    The repetitions may still overlap, see `separated`.

    Args:
        fewer: items of a sample.
        more: items of a sample with one more layer of that kind.
        kind: of the layers.
        count: layers of that kind in the first sample.

    Raises:
        UnlikeError: the larger sample has more that is no layer's.
    """
    tokens, longer = [item.token for item in fewer], [item.token for item in more]
    repetitions: list[Repetition] = []
    for at, begin, end in insertions(tokens, longer, kind):
        found = _periodic(tokens, at, longer[begin:end])
        if found is None:
            raise UnlikeError(f"{kind}: what comes at {at} of {len(tokens)} is not a layer's")
        repetitions.append(Repetition(kind, *found, end - begin, count))
    return repetitions


def insertions(
    fewer: Sequence[object], more: Sequence[object], kind: str = ""
) -> list[tuple[int, int, int]]:
    """Find the smallest number of insertions that make one sequence of another.

    Args:
        fewer: the shorter sequence.
        more: the longer one.
        kind: of the layers, for the error.

    Returns:
        For each insertion its place in `fewer`, and the begin and end of what was inserted in
        `more`.

    Raises:
        UnlikeError: no insertions make one of the other.
    """
    number: dict[object, int] = {}
    a, b = ([number.setdefault(token, len(number)) for token in its] for its in (fewer, more))
    most = len(b) - len(a)
    if most < 0:
        raise UnlikeError(f"{kind}: fewer items in the larger sample")
    outside, within = _insertion_counts(a, b)
    if outside[0][0] >= _NEVER:
        raise UnlikeError(f"{kind}: not only insertions make the larger sample")
    found: list[tuple[int, int, int]] = []
    i = ahead = 0
    while i < len(a) or ahead < most:
        if i < len(a) and a[i] == b[i + ahead] and outside[i + 1][ahead] == outside[i][ahead]:
            i += 1
            continue
        begin = i + ahead
        ahead += 1
        while not (
            within[i][ahead] == outside[i + 1][ahead] and a[i] == b[i + ahead]
            if i < len(a)
            else ahead == most
        ):
            ahead += 1
        found.append((i, begin, i + ahead))
    return found


def _insertion_counts(
    a: Sequence[int], b: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Count the insertions that are still needed, from the ends of both sequences backwards.

    Returns:
        Two tables `[len(a) + 1, len(b) - len(a) + 1]` of the fewest insertions after item i of `a`
        and item i + ahead of `b`: outside of an insertion, and within one.
    """
    most = len(b) - len(a)
    outside = [[_NEVER] * (most + 1) for _ in range(len(a) + 1)]
    within = [[_NEVER] * (most + 1) for _ in range(len(a) + 1)]
    outside[-1] = [1] * most + [0]
    within[-1] = [0] * (most + 1)
    for i in range(len(a) - 1, -1, -1):
        after, row, inner = outside[i + 1], outside[i], within[i]
        for ahead in range(most, -1, -1):
            match = after[ahead] if a[i] == b[i + ahead] else _NEVER
            longer = inner[ahead + 1] if ahead < most else _NEVER
            row[ahead] = min(match, longer + 1)
            inner[ahead] = min(match, longer)
    return outside, within


def joined(repetitions: Sequence[Repetition], count: int) -> list[Repetition]:
    """Make one repetition of two that are the same for the layers of both policies.

    Args:
        repetitions: of all kinds.
        count: layers of both policies together.
    """
    found: dict[tuple[int, int, int], Repetition] = {}
    for one in repetitions:
        key = one.left, one.right, one.length
        if key in found:
            one = dataclasses.replace(one, kind=ALL_LAYERS, count=count)
        found[key] = one
    return list(found.values())


def separated(repetitions: Sequence[Repetition]) -> list[Repetition]:
    """Cut repetitions so that none begins before the one before it has ended.

    They can overlap because the first items of two kinds of layers are the same.

    Raises:
        UnlikeError: no whole period would be left of one.
    """
    result: list[Repetition] = []
    end = 0
    for one in sorted(repetitions, key=lambda one: one.left):
        one = dataclasses.replace(one, left=max(one.left, end))
        if one.periods < 1:
            raise UnlikeError(f"{one.kind}: layers overlap at {one.left}")
        end = one.left + one.periods * one.length
        result.append(dataclasses.replace(one, right=end))
    return result


def _periodic(
    tokens: Sequence[object], at: int, inserted: Sequence[object]
) -> tuple[int, int] | None:
    """Find the longest part around a place in which every item equals that one period later.

    A period consists of the inserted items; it may begin with any of them.
    """
    best: tuple[int, int] | None = None
    length, wanted = len(inserted), collections.Counter(inserted)

    def same(place: int) -> bool:
        later = place + length
        return place >= 0 and later < len(tokens) and tokens[place] == tokens[later]

    for start in range(max(at - length, 0), at + 1):
        if collections.Counter(tokens[start : start + length]) != wanted:
            continue
        left = right = start
        while same(right):
            right += 1
        while same(left - 1):
            left -= 1
        reaches = right > left and left <= at <= right + length
        if reaches and (best is None or right - left > best[1] - best[0]):
            best = left, right
    return best and (best[0], best[1] + length)
