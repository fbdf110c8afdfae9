"""Write step traces out: for numbers of layers and blocks, with numbers or symbols for sizes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from bertbench.memory.traces.trace import LAST, OLDEST, Ask, Blocks, End, Repeated, StepTrace

T = TypeVar("T")


class NothingAliveError(ValueError):
    """A trace that does not hold for these numbers of layers: something ends that never was."""


@dataclasses.dataclass(frozen=True)
class Section:
    """Where a part of what was written out begins.

    Attributes:
        event: the first one.
        item: number of the item.
        layer: which repetition of the item, and how many there are.
        block: policy, which block, and how many there are; None outside of blocks.
        part: tells the parts of a layer apart.
    """

    event: int
    item: int
    layer: tuple[int, int]
    block: tuple[str, int, int] | None
    part: int


class Written(Generic[T]):
    """A trace, written out.

    Args:
        trace: what to write out.
        layers: how many there are of each kind.
        blocks: how many there are by policy.
        values: of the sizes by number, for a policy and one of its blocks, or for "" and 0.

    Attributes:
        events: as `bertbench.memory.allocator.bfc.replay` takes them.
        sizes: of every request, as `values` gives them.
        sections: in order.
    """

    def __init__(
        self,
        trace: StepTrace,
        layers: Mapping[str, int],
        blocks: Mapping[str, int],
        values: Callable[[str, int], Sequence[T]],
    ) -> None:
        self.events: list[int] = []
        self.sizes: list[T] = []
        self.sections: list[Section] = []
        self._trace, self._blocks, self._values = trace, blocks, values
        self._alive: list[collections.deque[tuple[int, int]]] = [
            collections.deque() for _ in trace.ends
        ]
        self._layer = 0
        for number, item in enumerate(trace.items):
            if isinstance(item, Repeated):
                count = layers[item.over] + item.more
                for index in range(count):
                    self._layer += 1
                    self._body(item.body, number, (index, count))
                self._layer += 1
            else:
                self._body((item,), number, (0, 1))

    def _body(
        self,
        items: Sequence[Ask | End | Blocks],
        number: int,
        layer: tuple[int, int],
        block: tuple[str, int, int] | None = None,
        part: int = 0,
    ) -> None:
        events, sizes, alive = self.events, self.sizes, self._alive
        values = self._values(*block[:2]) if block else self._values("", 0)
        self._begin(number, layer, block, part)
        for item in items:
            if isinstance(item, Ask):
                alive[item.role].append((self._layer, len(sizes)))
                events.append(len(sizes))
                sizes.append(values[item.size])
            elif isinstance(item, End):
                self._end(item)
                if item.all_of_layer:
                    # As many as there are blocks.
                    part += 1
                    self._begin(number, layer, block, part)
            else:
                count = self._blocks[item.policy]
                part += 1
                for index in range(count):
                    self._body(item.body, number, layer, (item.policy, index, count), part)
                part += 1
                self._begin(number, layer, block, part)

    def _begin(
        self, number: int, layer: tuple[int, int], block: tuple[str, int, int] | None, part: int
    ) -> None:
        self.sections.append(Section(len(self.events), number, layer, block, part))

    def _end(self, item: End) -> None:
        alive = self._alive[item.role]
        if not alive:
            raise NothingAliveError(f"nothing of role {item.role} is alive")
        layer = alive[-1][0]
        if item.all_of_layer:
            while alive and alive[-1][0] == layer:
                self.events.append(~alive.pop()[1])
            return
        ends = self._trace.ends[item.role]
        if ends == LAST:
            self.events.append(~alive.pop()[1])
        elif ends == OLDEST:
            self.events.append(~alive.popleft()[1])
        else:
            index = next(i for i, (its_layer, _) in enumerate(alive) if its_layer == layer)
            self.events.append(~alive[index][1])
            del alive[index]
