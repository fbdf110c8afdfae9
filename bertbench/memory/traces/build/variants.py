"""Make the step traces of other optimizers out of AdamW's.

Forward and backward pass are the same, and the update differs. An update takes the variables one
after the other. So for each variable the allocations of AdamW's update are replaced by those of the
other optimizer's. Biases of keys get no gradient with these optimizers, but their update is in the
trace: a few kilobytes too much.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from bertbench.memory.traces.build.samples import UnlikeError
from bertbench.memory.traces.trace import (
    NEWEST,
    Allocate,
    Free,
    Item,
    PerChunk,
    PerLayer,
    Size,
    StepTrace,
)

_OF_MATRIX, _OF_VECTOR = 0, 1
_UPDATES = {
    "lion": ("a+ b+ b- a- g-", "a+ b+ b- a- g-"),
    "adafactor": ("a+ r+ r- c+ c- a- r+ r- c+ c- a+ a- g-", "a+ a- b+ g- a+ a- b-"),
}
"""Allocations (+) and releases (-) after the weight decay of a matrix, and for a vector, which has
no weight decay. a and b are as large as the variable, r has a number for each row, c one for each
column, and g is the gradient. From recordings of Lion and Adafactor."""

_EXAMPLES = frozenset("neruws")
"""Dimensions that depend on the examples; no tensor of an update has them."""


def with_optimizer(trace: StepTrace, optimizer: str) -> StepTrace:
    """Replace AdamW's update by another optimizer's.

    Args:
        trace: of a step with AdamW.
        optimizer: `lion` or `adafactor`.

    Returns:
        A trace without candidate peaks.

    Raises:
        UnlikeError: the trace does not have AdamW's update twice.
    """
    update = _Update(trace, _UPDATES[optimizer])
    items: list[Item] = []
    found = 0
    for inside, part in _parts(trace):
        found += inside
        items += update.rewritten(_begin_with_requests(part)) if inside else part
    if found != 2:
        raise UnlikeError(f"{found} updates in two steps")
    return StepTrace(tuple(update.sizes), tuple(update.free_order), tuple(items))


def _parts(trace: StepTrace) -> Iterator[tuple[bool, list[Item]]]:
    """Cut a trace into its updates (True) and what is between them."""
    part: list[Item] = []
    last = False
    for item in trace.items:
        now = _of_update(trace, item)
        if now != last:
            yield last and _updates_words(trace, part), part
            part = []
        last = now
        part.append(item)
    yield last and _updates_words(trace, part), part


def _of_update(trace: StepTrace, item: Item) -> bool:
    """Whether an item can be part of an update: nothing in it grows with the examples."""
    if isinstance(item, PerLayer):
        return all(_of_update(trace, inner) for inner in item.body)
    if isinstance(item, Allocate):
        return not _EXAMPLES & dict(trace.sizes[item.size].powers).keys()
    return isinstance(item, Free)


def _updates_words(trace: StepTrace, part: Sequence[Item]) -> bool:
    """Whether the weight decay of the word embeddings is allocated and freed at once."""
    return any(
        isinstance(item, Allocate)
        and following == Free(item.site)
        and "v" in dict(trace.sizes[item.size].powers)
        for item, following in itertools.pairwise(part)
    )


def _begin_with_requests(part: Sequence[Item]) -> list[Item]:
    """Move releases from the begin of a layer's part to its release.

    They free the gradient of the variable before, which belongs to the layer before.
    """
    result: list[Item] = []
    for item in part:
        if isinstance(item, PerLayer) and any(isinstance(one, Allocate) for one in item.body):
            count = next(n for n, one in enumerate(item.body) if isinstance(one, Allocate))
            first, rest = item.body[:count], item.body[count:]
            again = PerLayer(item.kind, item.extra - bool(count), (*rest, *first))
            # An update has no chunks.
            result += [*first, again, *(rest if count else ())]
        else:
            result.append(item)
    return result


class _Update:
    """Replaces AdamW's update.

    Attributes:
        sizes: sizes of the trace, and new ones.
        free_order: orders of the trace's sites, and of new ones.
    """

    def __init__(self, trace: StepTrace, updates: tuple[str, str]) -> None:
        self.sizes, self.free_order = list(trace.sizes), list(trace.free_order)
        self._updates = updates
        self._size_of = dict(_sizes_of_sites(trace.items))
        self._sites: dict[tuple[str, int], int] = {}

    def rewritten(self, part: Sequence[Item]) -> list[Item]:
        """Replace the update of each variable: the events from its weight decay on."""
        result: list[Item] = []
        index = 0
        while index < len(part):
            item = part[index]
            if isinstance(item, PerLayer):
                body = tuple(self.rewritten(item.body))
                result.append(dataclasses.replace(item, body=body))  # type: ignore[arg-type]
            else:
                result.append(item)
            index += 1
            if isinstance(item, Allocate) and self._is_decay(item, part[index]):
                following = itertools.takewhile(lambda one: isinstance(one, Free), part[index:])
                decay, *releases = (one for one in following if isinstance(one, Free))
                result += [decay, *self._variables(self.sizes[item.size], releases)]
                index += 1 + len(releases)
        return result

    def _is_decay(self, item: Allocate, following: Item) -> bool:
        """Whether it is the weight decay of a matrix, which is freed at once."""
        sides = sum(power for _, power in self.sizes[item.size].powers)
        return sides >= 2 and following == Free(item.site)

    def _variables(self, decayed: Size, releases: Sequence[Free]) -> Iterator[Allocate | Free]:
        """Events of the update of a matrix, and of the vectors after it.

        Args:
            decayed: size of the matrix.
            releases: releases that followed the weight decay.
        """

        def size_of(release: Free) -> Size:
            return self.sizes[self._size_of[release.site]]

        gradients = [
            release for release in releases if not _EXAMPLES & dict(size_of(release).powers).keys()
        ]
        matrix = next((release for release in gradients if size_of(release) == decayed), None)
        if matrix is None:
            raise UnlikeError("after a weight decay its gradient is not freed")
        # Releases that follow each other are in the order of their allocations, the newest first.
        # The update takes the variables in the order in which gradients are freed. Sums over
        # micro-batches are allocated in the order of the variables, gradients in the reverse order.
        if matrix is not gradients[0]:
            gradients.reverse()
        gradients.sort(key=lambda release: release is not matrix)
        for release in gradients:
            sizes = _sizes_for(size_of(release))
            kind = _OF_MATRIX if release is matrix else _OF_VECTOR
            for one in self._updates[kind].split():
                if one == "g-":
                    yield release
                    continue
                size = self._number(sizes[one[0]])
                site = self._site(one[0], size)
                yield Allocate(site, size) if one[1] == "+" else Free(site)
        yield from (release for release in releases if release not in gradients)

    def _number(self, size: Size) -> int:
        if size not in self.sizes:
            self.sizes.append(size)
        return self.sizes.index(size)

    def _site(self, what: str, size: int) -> int:
        if (what, size) not in self._sites:
            self._sites[what, size] = len(self.free_order)
            self.free_order.append(NEWEST)
        return self._sites[what, size]


def _sizes_for(variable: Size) -> dict[str, Size]:
    """Sizes that the letters of an update stand for."""
    dimensions = [name for name, power in variable.powers for _ in range(power)]
    sides = [Size(0, 4, ((name, 1),)) for name in dimensions]
    return {"a": variable, "b": variable, "r": sides[0], "c": sides[-1]}


def _sizes_of_sites(items: Sequence[Item]) -> Iterator[tuple[int, int]]:
    for item in items:
        if isinstance(item, Allocate):
            yield item.site, item.size
        elif isinstance(item, PerChunk | PerLayer):
            yield from _sizes_of_sites(item.body)
