"""What a step asks TensorFlow's allocator for, and what the allocator makes of it.

TensorFlow's BFC allocator (best fit with coalescing, `tsl/framework/bfc_allocator.cc`) is
deterministic, so its answers can be worked out: a replay of recorded requests ends where the real
step would run out of memory, with the same chunks split and wasted.
"""

from __future__ import annotations

import base64
import bisect
import dataclasses
import functools
import json
import zlib
from collections.abc import Sequence

from bertbench.bytes import MIB_BYTES

CHUNK_BYTES = 256
"""What the allocator hands out at least; it gives multiples of this."""

_UNSPLIT_BYTES = 128 * MIB_BYTES
"""A free chunk is handed out whole unless it is at least twice as large as what is asked for, or
leaves at least this much."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a process asked of an allocator, from its first request to its last.

    Attributes:
        events: in order: n for the n-th allocation, ~n for its end.
        sizes: bytes that each allocation asked for.
        operations: name of the operation that asked, or "".
    """

    events: tuple[int, ...]
    sizes: tuple[int, ...]
    operations: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Replay:
    """How a replay ended.

    Attributes:
        fits: no request failed.
        peak_bytes: largest sum of the chunks in use, as the allocator counts it.
    """

    fits: bool
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """What an allocator has before a step asks for anything.

    Attributes:
        region_bytes: sizes of the regions, which are not adjacent.
        small_chunks: chunks of `CHUNK_BYTES` that were taken first, an odd number. All but the
            second, fourth, ... are held for good, so that those do not join with anything: they
            are what small requests get.
    """

    region_bytes: tuple[int, ...]
    small_chunks: int = 0

    @property
    def total_bytes(self) -> int:
        """All regions together."""
        return sum(self.region_bytes)


class BestFitAllocator:
    """Hands out addresses as TensorFlow's BFC allocator does.

    Of the free chunks that are large enough the smallest is taken, of equal ones that with the
    lowest address.

    Args:
        region_bytes: sizes of the regions that it has, which are not adjacent.
    """

    def __init__(self, region_bytes: Sequence[int]) -> None:
        self.used_bytes = 0
        self._size: dict[int, int] = {}
        self._before: dict[int, int | None] = {}
        self._after: dict[int, int | None] = {}
        # (size, address), in order. TensorFlow keeps them in bins of sizes, in the same order.
        self._free: list[tuple[int, int]] = []
        self._is_free: set[int] = set()
        start = 0
        for size in region_bytes:
            self._size[start], self._before[start], self._after[start] = size, None, None
            self._add(start)
            start += size + CHUNK_BYTES

    def allocate(self, size_bytes: int) -> int | None:
        """Return the address of a chunk, or None if no free chunk is large enough."""
        wanted = max(-(-size_bytes // CHUNK_BYTES), 1) * CHUNK_BYTES
        index = bisect.bisect_left(self._free, (wanted, -1))
        if index == len(self._free):
            return None
        size, start = self._free.pop(index)
        self._is_free.discard(start)
        if size >= 2 * wanted or size - wanted >= _UNSPLIT_BYTES:
            rest, after = start + wanted, self._after[start]
            self._size[start], self._size[rest] = wanted, size - wanted
            self._after[start], self._before[rest], self._after[rest] = rest, start, after
            if after is not None:
                self._before[after] = rest
            self._add(rest)
        self.used_bytes += self._size[start]
        return start

    def free(self, start: int) -> None:
        """Take a chunk back, and join it with free neighbours."""
        self.used_bytes -= self._size[start]
        after, before = self._after[start], self._before[start]
        if after in self._is_free:
            self._remove(after)
            self._join(start, after)
        if before in self._is_free:
            self._remove(before)
            self._join(before, start)
            start = before
        self._add(start)

    def copy(self) -> BestFitAllocator:
        """Another one in the same state."""
        other = BestFitAllocator(())
        for name, value in vars(self).items():
            setattr(other, name, value if isinstance(value, int) else value.copy())
        return other

    def _add(self, start: int) -> None:
        bisect.insort(self._free, (self._size[start], start))
        self._is_free.add(start)

    def _remove(self, start: int) -> None:
        del self._free[bisect.bisect_left(self._free, (self._size[start], start))]
        self._is_free.discard(start)

    def _join(self, start: int, next_: int) -> None:
        self._size[start] += self._size.pop(next_)
        after = self._after.pop(next_)
        del self._before[next_]
        self._after[start] = after
        if after is not None:
            self._before[after] = start


@functools.lru_cache(maxsize=4)
def _prepared(memory: Memory) -> BestFitAllocator:
    allocator = BestFitAllocator(memory.region_bytes)
    chunks = [allocator.allocate(1) for _ in range(memory.small_chunks)]
    for start in chunks[1::2]:
        if start is not None:
            allocator.free(start)
    return allocator


def replay(events: Sequence[int], sizes: Sequence[int], memory: Memory) -> Replay:
    """Ask an allocator for what was recorded, up to the first request that fails."""
    allocator = _prepared(memory).copy()
    addresses: dict[int, int] = {}
    peak_bytes = allocator.used_bytes
    for event in events:
        if event < 0:
            allocator.free(addresses.pop(~event))
            continue
        address = allocator.allocate(sizes[event])
        if address is None:
            return Replay(False, peak_bytes)
        addresses[event] = address
        peak_bytes = max(peak_bytes, allocator.used_bytes)
    return Replay(True, peak_bytes)


def recording_to_text(recording: Recording) -> str:
    """Compress a recording, so that it can be sent and kept."""
    names = sorted(set(recording.operations))
    index = {name: number for number, name in enumerate(names)}
    values = [
        recording.events,
        recording.sizes,
        names,
        [index[name] for name in recording.operations],
    ]
    return base64.b85encode(zlib.compress(json.dumps(values).encode(), 6)).decode()


def recording_from_text(text: str) -> Recording:
    """Read what `recording_to_text` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        events, sizes, names, numbers = json.loads(zlib.decompress(base64.b85decode(text)))
        return Recording(tuple(events), tuple(sizes), tuple(names[n] for n in numbers))
    except (zlib.error, TypeError, IndexError) as error:
        raise ValueError(f"not a recording of allocations ({error})") from error
