"""Unroll step traces: repeat what is written once, for numbers of layers and of chunks."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from bertbench.memory.traces.trace import (
    NEWEST,
    OLDEST,
    Allocate,
    Free,
    PerChunk,
    PerLayer,
    StepTrace,
)

T = TypeVar("T")


class NothingLiveError(ValueError):
    """A trace does not hold for these numbers of layers: it frees what was never allocated."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of an unrolled trace that lies in one layer and one chunk.

    It ends where the next section begins.

    Attributes:
        event: number of its first event.
        item: number of the trace's item that it was unrolled from.
        layer: number of the repetition of the item, and how many repetitions there are.
        chunk: policy, number of the chunk, and how many chunks there are; None outside of chunks.
        part: counts the sections of a layer, so that none of them has the same values. All chunks
            of a loop have the same.
    """

    event: int
    item: int
    layer: tuple[int, int]
    chunk: tuple[str, int, int] | None
    part: int


class Unrolled(Generic[T]):
    """An unrolled trace.

    Sizes may be of any type: numbers of bytes, or symbols.

    Args:
        trace: the trace.
        layers: number of layers by kind.
        chunks: number of chunks by policy.
        values: gives the values of all sizes, by their numbers. It is called with a policy and the
            number of a chunk; outside of chunks with "" and 0.

    Attributes:
        events: n for the n-th allocation, ~n for the release of it.
        sizes: size of each allocation.
        sections: in order.

    Raises:
        NothingLiveError: there are too few layers.
    """

    def __init__(
        self,
        trace: StepTrace,
        layers: Mapping[str, int],
        chunks: Mapping[str, int],
        values: Callable[[str, int], Sequence[T]],
    ) -> None:
        self.events: list[int] = []
        self.sizes: list[T] = []
        self.sections: list[Section] = []
        self._trace, self._chunks, self._values = trace, chunks, values
        # Live allocations of each site, oldest first: number of the layer, and of the allocation.
        self._live: list[collections.deque[tuple[int, int]]] = [
            collections.deque() for _ in trace.free_order
        ]
        self._layer = 0
        for number, item in enumerate(trace.items):
            if isinstance(item, PerLayer):
                count = layers[item.kind] + item.extra
                for index in range(count):
                    self._layer += 1
                    self._unroll(item.body, number, (index, count))
                self._layer += 1
            else:
                self._unroll((item,), number, (0, 1))

    def _unroll(
        self,
        items: Sequence[Allocate | Free | PerChunk],
        number: int,
        layer: tuple[int, int],
        chunk: tuple[str, int, int] | None = None,
        part: int = 0,
    ) -> None:
        events, sizes, live = self.events, self.sizes, self._live
        values = self._values(*chunk[:2]) if chunk else self._values("", 0)
        self._begin(number, layer, chunk, part)
        for item in items:
            if isinstance(item, Allocate):
                live[item.site].append((self._layer, len(sizes)))
                events.append(len(sizes))
                sizes.append(values[item.size])
            elif isinstance(item, Free):
                self._free(item)
                if item.all_of_layer:
                    # These are as many as there are chunks. The next section begins after them, so
                    # that its events have the same positions for any number of chunks.
                    part += 1
                    self._begin(number, layer, chunk, part)
            else:
                count = self._chunks[item.policy]
                part += 1
                for index in range(count):
                    self._unroll(item.body, number, layer, (item.policy, index, count), part)
                part += 1
                self._begin(number, layer, chunk, part)

    def _begin(
        self, number: int, layer: tuple[int, int], chunk: tuple[str, int, int] | None, part: int
    ) -> None:
        self.sections.append(Section(len(self.events), number, layer, chunk, part))

    def _free(self, item: Free) -> None:
        live = self._live[item.site]
        if not live:
            raise NothingLiveError(f"site {item.site} has no live allocation")
        layer = live[-1][0]
        if item.all_of_layer:
            while live and live[-1][0] == layer:
                self.events.append(~live.pop()[1])
            return
        order = self._trace.free_order[item.site]
        if order == NEWEST:
            self.events.append(~live.pop()[1])
        elif order == OLDEST:
            self.events.append(~live.popleft()[1])
        else:
            index = next(i for i, (its_layer, _) in enumerate(live) if its_layer == layer)
            self.events.append(~live[index][1])
            del live[index]
