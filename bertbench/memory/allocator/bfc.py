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
import zlib
from collections.abc import Sequence

from bertbench.core.units import MIB_BYTES
from finetune.storage.json_files import json_text, parse_json

CHUNK_BYTES = 256
"""What the allocator hands out at least; it gives multiples of this."""

_UNSPLIT_CHUNKS = 128 * MIB_BYTES // CHUNK_BYTES
"""A free chunk is handed out whole unless it is at least twice as large as what is asked for, or
leaves at least this much."""

_RECORDING_BYTES = 256 * MIB_BYTES
"""Largest text of a recording; those of a BERT-Large step are below 3 MiB."""

_ADDRESS_BITS = 52  # 2 ** 60 bytes in chunks
_ADDRESS_MASK = (1 << _ADDRESS_BITS) - 1
_CHUNK_KEY = 1 << _ADDRESS_BITS


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
        peak_at: number of the event after which it was; -1 if it was before the first.
    """

    fits: bool
    peak_bytes: int
    peak_at: int = dataclasses.field(default=-1, compare=False)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What an allocator has before a step asks for anything.

    Attributes:
        region_bytes: sizes of the regions, which are not adjacent; none smaller than the one before
            it.
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

    @property
    def held_bytes(self) -> int:
        """Small chunks that are held for good."""
        return (self.small_chunks + 1) // 2 * CHUNK_BYTES


class BestFitAllocator:
    """Hands out addresses as TensorFlow's BFC allocator does.

    Of the free chunks that are large enough the smallest is taken, of equal ones that with the
    lowest address. Inside, sizes and addresses are counted in `CHUNK_BYTES`.

    Args:
        memory: what it has, with its small chunks set aside.
    """

    def __init__(self, memory: Memory) -> None:
        self.used_bytes = 0
        self._size: dict[int, int] = {}
        # TensorFlow keeps free chunks in bins of sizes, in the same order as here: by size, then
        # address, both in one number.
        self._free: list[int] = []
        self._free_size: dict[int, int] = {}
        self._free_start_by_end: dict[int, int] = {}
        start, small = 0, memory.small_chunks
        for region_bytes in memory.region_bytes:
            end = start + region_bytes // CHUNK_BYTES
            taken = min(small, end - start)
            # Laid out at once, as if they had been asked for and every other one given back.
            free = range(start + (memory.small_chunks - small + 1) % 2, start + taken, 2)
            self._free += [_CHUNK_KEY | chunk for chunk in free]
            self._free_size |= dict.fromkeys(free, 1)
            self._free_start_by_end |= {chunk + 1: chunk for chunk in free}
            self.used_bytes += (taken - len(free)) * CHUNK_BYTES
            if start + taken < end:
                self._add(start + taken, end - start - taken)
            small -= taken
            start = end + 1  # not adjacent to the next

    def allocate(self, size_bytes: int) -> int | None:
        """Return the number of the chunk that a request gets, or None if none is large enough."""
        wanted = -(-size_bytes // CHUNK_BYTES) or 1
        index = bisect.bisect_left(self._free, wanted << _ADDRESS_BITS)
        if index == len(self._free):
            return None
        key = self._free.pop(index)
        size, start = key >> _ADDRESS_BITS, key & _ADDRESS_MASK
        del self._free_size[start]
        rest = size - wanted
        if rest >= wanted or rest >= _UNSPLIT_CHUNKS:
            size = wanted
            self._add(start + wanted, rest)
        else:
            del self._free_start_by_end[start + size]
        self._size[start] = size
        self.used_bytes += size * CHUNK_BYTES
        return start

    def free(self, start: int) -> None:
        """Take a chunk back, and join it with free neighbours."""
        size = self._size.pop(start)
        self.used_bytes -= size * CHUNK_BYTES
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
    """Ask an allocator for what was recorded, up to the first request that fails."""
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
    return base64.b85encode(zlib.compress(json_text(values).encode(), 6)).decode()


def recording_from_text(text: str) -> Recording:
    """Read what `recording_to_text` wrote.

    Raises:
        ValueError: it is something else, or too large to be one.
    """
    try:
        decompress = zlib.decompressobj()
        data = decompress.decompress(base64.b85decode(text), _RECORDING_BYTES)
        if not decompress.eof:
            raise ValueError("cut short, or too large")
        events, sizes, names, numbers = parse_json(data.decode())
        operations = tuple(str(names[number]) for number in numbers)
        recording = Recording(tuple(events), tuple(sizes), operations)
        _check_recording(recording)
    except (zlib.error, TypeError, LookupError, ValueError) as error:
        raise ValueError(f"not a recording of allocations ({error})") from error
    return recording


def _check_recording(recording: Recording) -> None:
    """Refuse what no allocator can have been asked: an end without a beginning, and the like."""
    begun, alive = 0, set()
    for event in recording.events:
        if event == begun:
            alive.add(event)
            begun += 1
        elif ~event in alive:
            alive.remove(~event)
        else:
            raise ValueError(f"event {event} out of order")
    if not begun == len(recording.sizes) == len(recording.operations):
        raise ValueError("another number of sizes than of allocations")
    if any(type(size) is not int or size < 0 for size in recording.sizes):
        raise ValueError("a size that is none")
