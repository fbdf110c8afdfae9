"""Make step traces out of recordings of small models.

Two recordings that differ in nothing but the number of layers tell what a layer asks for: it is
what one has more. Blocks of examples are told apart by their loops. What is left of an allocation
to find out is which one ends where; that is the same in each layer, so it is enough to know, for
all allocations of one *role*, whether the newest or the oldest ends first. And sizes are products:
recordings that differ in one dimension tell its power.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from bertbench.memory.traces.build.moments import find_moments
from bertbench.memory.traces.build.samples import Sample, StepItem, Steps, UnlikeError, step_items
from bertbench.memory.traces.build.sizes import find_sizes
from bertbench.memory.traces.step import layers_of, write_out
from bertbench.memory.traces.trace import (
    ALL_LAYERS,
    LAST,
    OLDEST,
    OLDEST_OF_LAYER,
    Ask,
    Blocks,
    End,
    Repeated,
    StepTrace,
)
from bertbench.memory.traces.unroll import NothingAliveError

Place = tuple[int, int]
"""Number of an item, and position in its block."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """Items that come again and again, once for every layer.

    Attributes:
        over: what layers.
        left: first item that is like that of the next period.
        right: end of the last item that is like that of the period before.
        length: items of a period.
        count: layers of that kind in the sample.
    """

    over: str
    left: int
    right: int
    length: int
    count: int

    @property
    def periods(self) -> int:
        return (self.right - self.left) // self.length

    def canonical(self, item: int) -> int:
        """The item of the first period that another one stands for."""
        if self.left <= item < self.right:
            return self.left + (item - self.left) % self.length
        return item


def _runs(fewer: Sequence[StepItem], more: Sequence[StepItem], over: str, count: int) -> list[_Run]:
    """Find what a sample with a layer more has more."""
    tokens, longer = [item.token for item in fewer], [item.token for item in more]
    runs: list[_Run] = []
    for at, begin, end in insertions(tokens, longer, over):
        found = _periodic(tokens, at, longer[begin:end])
        if found is None:
            raise UnlikeError(f"{over}: what comes at {at} of {len(tokens)} is not a layer's")
        runs.append(_Run(over, *found, end - begin, count))
    return runs


_NEVER = 1 << 30
_WORDS_ERROR = 0.02


def insertions(
    fewer: Sequence[object], more: Sequence[object], over: str = ""
) -> list[tuple[int, int, int]]:
    """Find the fewest stretches that one sequence has more than another.

    Args:
        fewer: the shorter one.
        more: the same with stretches inserted.
        over: for the error.

    Returns:
        For each stretch the place in `fewer` where it comes, and begin and end in `more`.

    Raises:
        UnlikeError: no insertions make one of the other.
    """
    number: dict[object, int] = {}
    a, b = ([number.setdefault(token, len(number)) for token in its] for its in (fewer, more))
    most = len(b) - len(a)
    if most < 0:
        raise UnlikeError(f"{over}: fewer items in the larger sample")
    # From the end: fewest stretches to come at place i of the one and i + ahead of the other,
    # outside of a stretch and within one.
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
    if outside[0][0] >= _NEVER:
        raise UnlikeError(f"{over}: not only insertions make the larger sample")
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


def _alike(runs: Sequence[_Run], count: int) -> list[_Run]:
    """Put together what is the same for the layers of both policies."""
    found: dict[tuple[int, int, int], _Run] = {}
    for run in runs:
        key = run.left, run.right, run.length
        if key in found:
            run = dataclasses.replace(run, over=ALL_LAYERS, count=count)
        found[key] = run
    return list(found.values())


def _apart(runs: Sequence[_Run]) -> list[_Run]:
    """Let none begin before the one before it has ended: the first items of two layers are alike.

    Raises:
        UnlikeError: nothing would be left of one.
    """
    result: list[_Run] = []
    end = 0
    for run in sorted(runs, key=lambda run: run.left):
        run = dataclasses.replace(run, left=max(run.left, end))
        if run.periods < 1:
            raise UnlikeError(f"{run.over}: layers overlap at {run.left}")
        end = run.left + run.periods * run.length
        result.append(dataclasses.replace(run, right=end))
    return result


def _periodic(
    tokens: Sequence[object], at: int, inserted: Sequence[object]
) -> tuple[int, int] | None:
    """Find the longest stretch around a place in which every item is like that a period later.

    A period has what has been inserted there, in any rotation.
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


class _Roles:
    """Which allocations have the same role, and which of a role's ends first.

    Attributes:
        of_place: role of the allocation that an event makes or ends.
        ends: by role.
    """

    def __init__(self, steps: Steps, items: Sequence[StepItem], runs: Sequence[_Run]) -> None:
        address: dict[int, Place] = {}
        layer: dict[int, int] = {}
        begins = {run.left + n * run.length for run in runs for n in range(run.periods + 1)}
        number = 0
        for index, item in enumerate(items):
            number += index in begins
            first = index
            for run in runs:
                first = run.canonical(first)
            for place in item.places:
                address[place] = first, (place - item.places[0]) % item.length
                layer[place] = number
        self._same: dict[Place, Place] = {}
        ended: dict[Place, Place] = {}
        for place, event in enumerate(steps.events):
            if event < 0:
                if ~event not in steps.made_at:
                    raise UnlikeError("a step lets go of what was there before it")
                made = address[steps.made_at[~event]]
                self._join(ended.setdefault(address[place], made), made)
        self.of_place = [
            self._find(address[place] if event >= 0 else ended[address[place]])
            for place, event in enumerate(steps.events)
        ]
        alone = {place for item in items if item.token[0] != "all" for place in item.places}
        self.ends = self._order(steps, layer, alone)

    def _find(self, role: Place) -> Place:
        while role in self._same:
            role = self._same[role]
        return role

    def _join(self, one: Place, other: Place) -> None:
        one, other = self._find(one), self._find(other)
        if one != other:
            self._same[other] = one

    def _order(self, steps: Steps, layer: Mapping[int, int], alone: set[int]) -> dict[Place, str]:
        """Find which of a role's allocations end first; those that end together in any order."""
        possible: dict[Place, list[str]] = {
            role: [LAST, OLDEST_OF_LAYER, OLDEST] for role in self.of_place
        }
        alive: dict[Place, list[tuple[int, int]]] = collections.defaultdict(list)
        for ends, together in itertools.groupby(
            range(len(steps.events)), lambda place: steps.events[place] < 0
        ):
            places = list(together)
            if not ends:
                for place in places:
                    alive[self.of_place[place]].append((layer[place], steps.events[place]))
                continue
            ended: dict[Place, list[int]] = collections.defaultdict(list)
            for place in places:
                ended[self.of_place[place]].append(place)
            for role, its in ended.items():
                gone = {~steps.events[place] for place in its}
                if alone.issuperset(its):
                    possible[role] = [
                        name
                        for name in possible[role]
                        if {made for _, made in _first(name, alive[role], len(its))} == gone
                    ]
                elif gone != {made for number, made in alive[role] if number == alive[role][-1][0]}:
                    raise UnlikeError(f"at {its[0]} not all of the last layer ends")
                if not possible[role]:
                    raise UnlikeError(f"allocations of {steps.token(its[0])} end in no order")
                alive[role] = [one for one in alive[role] if one[1] not in gone]
        return {role: names[0] for role, names in possible.items()}


def _first(ends: str, alive: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Those of (layer, allocation) that end first."""
    if ends == LAST:
        return list(alive[-count:])
    if ends == OLDEST:
        return list(alive[:count])
    left = list(alive)
    return [
        left.pop(next(i for i, (layer, _) in enumerate(left) if layer == left[-1][0]))
        for _ in range(count)
    ]


def build_trace(
    base: Sample, more_layers: Mapping[str, Sample], varied: Mapping[str, Sample]
) -> StepTrace:
    """Make a trace.

    Args:
        base: four layers or more of each kind.
        more_layers: by what is repeated, a sample with one layer more of that kind.
        varied: by dimension, a sample with another value of it. That for the examples has a number
            that the blocks do not divide.

    Returns:
        A trace that says of the samples what they recorded.

    Raises:
        UnlikeError: the recordings do not have that structure.
    """
    steps = Steps(base)
    items = step_items(steps)
    runs: list[_Run] = []
    for over, sample in more_layers.items():
        runs += _runs(items, step_items(Steps(sample)), over, _layers(base, over))
    runs = _apart(_alike(runs, _layers(base, ALL_LAYERS)))
    roles = _Roles(steps, items, runs)
    sizes, size_of = find_sizes(base, steps, items, varied)
    role_number = {role: number for number, role in enumerate(roles.ends)}

    def written(place: int) -> Ask | End:
        event = steps.events[place]
        role = role_number[roles.of_place[place]]
        return Ask(role, size_of[event]) if event >= 0 else End(role)

    def item_of(item: StepItem) -> Ask | End | Blocks:
        if item.policy is not None:
            return Blocks(item.policy, tuple(map(written, item.places[: item.length])))
        if item.token[0] == "all":
            return End(role_number[roles.of_place[item.places[0]]], all_of_layer=True)
        return written(item.places[0])

    result: list[Ask | End | Blocks | Repeated] = []
    index = 0
    by_left = {run.left: run for run in runs}
    while index < len(items):
        run = by_left.get(index)
        if run is None:
            result.append(item_of(items[index]))
            index += 1
            continue
        body = tuple(map(item_of, items[index : index + run.length]))
        result.append(Repeated(run.over, run.periods - run.count, body))
        index += run.periods * run.length
    trace = StepTrace(sizes, tuple(roles.ends.values()), tuple(result))
    for sample in (base, *more_layers.values()):
        if not says(trace, sample):
            number = sample.step.workload.config.num_hidden_layers
            raise UnlikeError(f"of {number} layers the trace does not say what was recorded")
    return dataclasses.replace(trace, moments=find_moments(trace))


def says(trace: StepTrace, sample: Sample) -> bool:
    """Whether a trace, written out, is what a sample has recorded.

    To the byte, but for what there is of different words: their number is only expected.
    """
    steps = Steps(sample)
    try:
        told = write_out(trace, sample.step)
    except NothingAliveError:
        return False
    its, own = _canonical(told.events, told.sizes), _canonical(steps.events, steps.sizes)

    def alike(one: int | frozenset[int], other: int | frozenset[int]) -> bool:
        if isinstance(one, int) and isinstance(other, int):
            return math.isclose(one, other, rel_tol=_WORDS_ERROR)
        return one == other

    return len(its) == len(own) and all(map(alike, its, own))


def _canonical(events: Sequence[int], sizes: Sequence[int]) -> list[int | frozenset[int]]:
    """Sizes of requests, and sets of the allocations that end with nothing in between."""
    number: dict[int, int] = {}
    result: list[int | frozenset[int]] = []
    for event in events:
        if event >= 0:
            number[event] = len(number)
            result.append(sizes[event])
        elif result and isinstance(result[-1], frozenset):
            result[-1] |= {number[~event]}
        else:
            result.append(frozenset({number[~event]}))
    return result


def _layers(sample: Sample, over: str) -> int:
    return layers_of(sample.step.setup)[over]
