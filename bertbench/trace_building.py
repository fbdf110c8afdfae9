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
import difflib
import itertools
from collections.abc import Mapping, Sequence

from bertbench.step_traces import (
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
from bertbench.trace_moments import find_moments
from bertbench.trace_samples import Sample, StepItem, Steps, UnlikeError, step_items
from bertbench.trace_sizes import find_sizes
from bertbench.traced_steps import layers_of

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
    tokens = [item.token for item in fewer]
    differences = difflib.SequenceMatcher(None, tokens, [i.token for i in more], autojunk=False)
    runs: list[_Run] = []
    for kind, at, _, begin, end in differences.get_opcodes():
        if kind == "equal":
            continue
        length = end - begin
        found = _periodic(tokens, at, length) if kind == "insert" else None
        if found is None:
            raise UnlikeError(f"{over}: {kind} at {at} of {len(tokens)} is not a layer's")
        runs.append(_Run(over, *found, length, count))
    return runs


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


def _periodic(tokens: Sequence[object], at: int, length: int) -> tuple[int, int] | None:
    """Find the longest stretch around a place in which every item is like that a period later."""
    best: tuple[int, int] | None = None

    def same(place: int) -> bool:
        later = place + length
        return place >= 0 and later < len(tokens) and tokens[place] == tokens[later]

    for start in range(at - length, at + 1):
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
    return dataclasses.replace(trace, moments=find_moments(trace))


def _layers(sample: Sample, over: str) -> int:
    return layers_of(sample.workload, sample.levers)[over]
