"""Find the allocation sites of a recorded step, and in which order each site's are freed.

Allocations that are made at the same place of a layer, in whatever layer, have one site. So have
those that are freed at the same place. What remains to be found is which of a site's live
allocations is freed first: this order is the same for all layers, so it is enough to try the three
orders that there are.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from bertbench.memory.traces.build.layers import Repetition
from bertbench.memory.traces.build.samples import StepItem, Steps, UnlikeError
from bertbench.memory.traces.trace import NEWEST, OLDEST, OLDEST_OF_LAYER

CodePlace = tuple[int, int]
"""Number of an item of the first layer, and position in its chunk: the same for all layers."""


@dataclasses.dataclass(frozen=True)
class Sites:
    """Allocation sites; each is named by one of its places.

    Attributes:
        of_event: site of the allocation that each event makes or frees.
        free_order: for each site, which of its live allocations is freed first.
    """

    of_event: list[CodePlace]
    free_order: dict[CodePlace, str]


def find_sites(steps: Steps, items: Sequence[StepItem], repetitions: Sequence[Repetition]) -> Sites:
    """Find the sites of all allocations.

    Args:
        steps: events of a sample.
        items: the same as items.
        repetitions: what is repeated for every layer, without overlaps.

    Raises:
        UnlikeError: something is freed that was allocated before the steps, or a site's allocations
            are freed in none of the three orders.
    """
    place: dict[int, CodePlace] = {}
    layer: dict[int, int] = {}
    begins = {one.left + n * one.length for one in repetitions for n in range(one.periods + 1)}
    number = 0
    for index, item in enumerate(items):
        number += index in begins
        first = index
        for one in repetitions:
            first = one.canonical(first)
        for event in item.events:
            place[event] = first, (event - item.events[0]) % item.length
            layer[event] = number
    same = _SamePlaces()
    freed: dict[CodePlace, CodePlace] = {}
    for number, event in enumerate(steps.events):
        if event < 0:
            if ~event not in steps.made_at:
                raise UnlikeError("a step frees what was allocated before it")
            made = place[steps.made_at[~event]]
            same.join(freed.setdefault(place[number], made), made)
    of_event = [
        same.find(place[number] if event >= 0 else freed[place[number]])
        for number, event in enumerate(steps.events)
    ]
    alone = {event for item in items if item.token[0] != "all" for event in item.events}
    return Sites(of_event, _free_order(steps, of_event, layer, alone))


class _SamePlaces:
    """Places of one site, put together pair by pair."""

    def __init__(self) -> None:
        self._same: dict[CodePlace, CodePlace] = {}

    def find(self, place: CodePlace) -> CodePlace:
        while place in self._same:
            place = self._same[place]
        return place

    def join(self, one: CodePlace, other: CodePlace) -> None:
        one, other = self.find(one), self.find(other)
        if one != other:
            self._same[other] = one


def _free_order(
    steps: Steps, of_event: Sequence[CodePlace], layer: Mapping[int, int], alone: set[int]
) -> dict[CodePlace, str]:
    """Try which orders explain all releases of a site.

    Releases that follow each other may come in any order: the allocator ends in the same state.

    Args:
        steps: events of a sample.
        of_event: site of each event.
        layer: number of the layer of each event.
        alone: events that are not among the releases of all that a layer still has.
    """
    possible = {site: [NEWEST, OLDEST_OF_LAYER, OLDEST] for site in of_event}
    live: dict[CodePlace, list[tuple[int, int]]] = collections.defaultdict(list)
    for releases, group in itertools.groupby(
        range(len(steps.events)), lambda number: steps.events[number] < 0
    ):
        numbers = list(group)
        if not releases:
            for number in numbers:
                live[of_event[number]].append((layer[number], steps.events[number]))
            continue
        by_site: dict[CodePlace, list[int]] = collections.defaultdict(list)
        for number in numbers:
            by_site[of_event[number]].append(number)
        for site, its in by_site.items():
            freed = {~steps.events[number] for number in its}
            if alone.issuperset(its):
                possible[site] = [
                    order
                    for order in possible[site]
                    if {made for _, made in _first(order, live[site], len(its))} == freed
                ]
            elif freed != {made for where, made in live[site] if where == live[site][-1][0]}:
                raise UnlikeError(f"at {its[0]} not all of the last layer is freed")
            if not possible[site]:
                raise UnlikeError(f"allocations of {steps.token(its[0])} are freed in no order")
            live[site] = [one for one in live[site] if one[1] not in freed]
    return {site: orders[0] for site, orders in possible.items()}


def _first(order: str, live: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Those of some (layer, allocation) that are freed first."""
    if order == NEWEST:
        return list(live[-count:])
    if order == OLDEST:
        return list(live[:count])
    left = list(live)
    return [
        left.pop(next(i for i, (layer, _) in enumerate(left) if layer == left[-1][0]))
        for _ in range(count)
    ]
