"""A model of TensorFlow's allocator: which piece of memory each request gets.

TensorFlow's BFC allocator (best fit with coalescing, `tsl/framework/bfc_allocator.cc`) is
deterministic. So a replay of the requests of a step runs out of memory at the same request as the
real step, with the same pieces split and wasted. A *piece* here is what TensorFlow's sources call a
chunk; in this package a chunk is a part of the examples of a micro-batch.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence

from bertbench.core.units import MIB_BYTES

MIN_ALLOCATION_BYTES = 256
"""Smallest piece that the allocator hands out; all others are multiples of it."""

_SPLIT_REST = 128 * MIB_BYTES // MIN_ALLOCATION_BYTES
"""A free piece is split if it is at least twice as large as the request, or if at least this much
would be left of it. Otherwise it is handed out whole."""

_ADDRESS_BITS = 52  # 2 ** 60 bytes, in units of 256
_ADDRESS_MASK = (1 << _ADDRESS_BITS) - 1
_SINGLE_UNIT = 1 << _ADDRESS_BITS


@dataclasses.dataclass(frozen=True)
class Replay:
    """How a replay ended.

    Attributes:
        fits: no request failed.
        peak_bytes: largest sum of the pieces in use, as the allocator counts it.
        peak_at: number of the event that reached this peak; -1 if the memory in use was never more
            than before the first event.
    """

    fits: bool
    peak_bytes: int
    peak_at: int = dataclasses.field(default=-1, compare=False)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What an allocator has before the first request of a process.

    Attributes:
        region_bytes: sizes of the regions, which are not adjacent; none smaller than the one before
            it.
        small_pieces: pieces of `MIN_ALLOCATION_BYTES` that are set aside at the beginning, an odd
            number. The first, third and so on are held for good. Those between them are free and
            cannot join with other free memory, so they serve small requests.
    """

    region_bytes: tuple[int, ...]
    small_pieces: int = 0

    @property
    def total_bytes(self) -> int:
        """All regions together."""
        return sum(self.region_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of the small pieces that are held for good."""
        return (self.small_pieces + 1) // 2 * MIN_ALLOCATION_BYTES


class BestFitAllocator:
    """Hands out addresses as TensorFlow's BFC allocator does.

    It takes the smallest free piece that is large enough; of equal ones that with the lowest
    address. Inside, sizes and addresses are counted in units of `MIN_ALLOCATION_BYTES`.

    Args:
        memory: what it has; the small pieces are already set aside.

    Attributes:
        used_bytes: sum of the pieces in use.
    """

    def __init__(self, memory: Memory) -> None:
        self.used_bytes = 0
        self._size: dict[int, int] = {}
        # TensorFlow keeps free pieces in bins by size. The order is the same as here: by size, then
        # by address. One number holds both.
        self._free: list[int] = []
        self._free_size: dict[int, int] = {}
        self._free_start_by_end: dict[int, int] = {}
        start, small = 0, memory.small_pieces
        for region_bytes in memory.region_bytes:
            end = start + region_bytes // MIN_ALLOCATION_BYTES
            taken = min(small, end - start)
            # The state after asking for all small pieces and freeing every second one.
            free = range(start + (memory.small_pieces - small + 1) % 2, start + taken, 2)
            self._free += [_SINGLE_UNIT | unit for unit in free]
            self._free_size |= dict.fromkeys(free, 1)
            self._free_start_by_end |= {unit + 1: unit for unit in free}
            self.used_bytes += (taken - len(free)) * MIN_ALLOCATION_BYTES
            if start + taken < end:
                self._add(start + taken, end - start - taken)
            small -= taken
            start = end + 1  # not adjacent to the next

    def allocate(self, size_bytes: int) -> int | None:
        """Find a piece for a request: its address in units, or None if none is large enough."""
        wanted = -(-size_bytes // MIN_ALLOCATION_BYTES) or 1
        index = bisect.bisect_left(self._free, wanted << _ADDRESS_BITS)
        if index == len(self._free):
            return None
        key = self._free.pop(index)
        size, start = key >> _ADDRESS_BITS, key & _ADDRESS_MASK
        del self._free_size[start]
        rest = size - wanted
        if rest >= wanted or rest >= _SPLIT_REST:
            size = wanted
            self._add(start + wanted, rest)
        else:
            del self._free_start_by_end[start + size]
        self._size[start] = size
        self.used_bytes += size * MIN_ALLOCATION_BYTES
        return start

    def free(self, start: int) -> None:
        """Take a piece back, and join it with its free neighbours."""
        size = self._size.pop(start)
        self.used_bytes -= size * MIN_ALLOCATION_BYTES
        after = self._free_size.pop(start + size, 0)
        if after:
            self._forget(start + size, after)
            size += after
        before = self._free_start_by_end.pop(start, None)
        if before is not None:
            before_size = self._free_size.pop(before)
            self._forget(before, before_size)
            start, size = before, before_size + size
        self._add(start, size)

    def copy(self) -> BestFitAllocator:
        """Another one in the same state."""
        other = BestFitAllocator(Memory(()))
        for name, value in vars(self).items():
            setattr(other, name, value if isinstance(value, int) else value.copy())
        return other

    def _add(self, start: int, size: int) -> None:
        bisect.insort(self._free, size << _ADDRESS_BITS | start)
        self._free_size[start] = size
        self._free_start_by_end[start + size] = start

    def _forget(self, start: int, size: int) -> None:
        del self._free[bisect.bisect_left(self._free, size << _ADDRESS_BITS | start)]


@functools.lru_cache(maxsize=4)
def _prepared(memory: Memory) -> BestFitAllocator:
    return BestFitAllocator(memory)


def replay(events: Sequence[int], sizes: Sequence[int], memory: Memory) -> Replay:
    """Send requests to an allocator, up to the first one that fails.

    Args:
        events: in order: n for the n-th allocation, ~n for the release of it.
        sizes: requested bytes of each allocation.
        memory: what the allocator has.
    """
    allocator = _prepared(memory).copy()
    allocate, free = allocator.allocate, allocator.free
    starts: dict[int, int] = {}
    peak_bytes, peak_at = allocator.used_bytes, -1
    for number, event in enumerate(events):
        if event < 0:
            free(starts.pop(~event))
            continue
        start = allocate(sizes[event])
        if start is None:
            return Replay(False, peak_bytes, peak_at)
        starts[event] = start
        if allocator.used_bytes > peak_bytes:
            peak_bytes, peak_at = allocator.used_bytes, number
    return Replay(True, peak_bytes, peak_at)
