"""Replays of what a step asks its allocator for: like TensorFlow's allocator, to the byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertbench.allocations import (
    BestFitAllocator,
    Memory,
    Recording,
    Replay,
    recording_from_text,
    recording_to_text,
    replay,
)
from bertbench.bytes import MIB_BYTES


def test_the_smallest_chunk_that_is_large_enough_is_taken() -> None:
    allocator = BestFitAllocator([10_240])
    starts = [allocator.allocate(size) for size in (2048, 256, 1024, 256, 1)]
    assert starts == [0, 2048, 2304, 3328, 3584]
    allocator.free(0)
    allocator.free(2304)
    assert allocator.allocate(1000) == 2304
    assert allocator.allocate(1025) == 0
    assert allocator.used_bytes == 1024 + 256 + 256 + 256 + 2048


def test_a_chunk_is_split_only_if_it_is_twice_as_large_or_leaves_much() -> None:
    allocator = BestFitAllocator([1023, 300 * MIB_BYTES])
    assert allocator.allocate(512) == 0
    assert allocator.used_bytes == 1023
    assert allocator.allocate(172 * MIB_BYTES) is not None
    assert allocator.used_bytes == 1023 + 172 * MIB_BYTES
    allocator = BestFitAllocator([300 * MIB_BYTES])
    assert allocator.allocate(172 * MIB_BYTES + 256) == 0
    assert allocator.used_bytes == 300 * MIB_BYTES


def test_what_is_given_back_joins_its_neighbours_but_not_another_region() -> None:
    allocator = BestFitAllocator([768, 768])
    starts = [allocator.allocate(256) for _ in range(6)]
    assert None not in starts
    assert allocator.allocate(1) is None
    for start in starts[1], starts[0], starts[2], starts[4], starts[3], starts[5]:
        assert start is not None
        allocator.free(start)
    assert allocator.used_bytes == 0
    assert allocator.allocate(769) is None
    assert allocator.allocate(768) is not None
    assert allocator.allocate(768) is not None


@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=60))
def test_chunks_do_not_overlap_and_nothing_is_lost(requests: list[tuple[int, bool]]) -> None:
    total = 40 * 256
    allocator = BestFitAllocator([total])
    alive: dict[int, int] = {}
    for size, ends in requests:
        start = allocator.allocate(size)
        if start is not None:
            assert start % 256 == 0
            assert start + size <= total
            assert all(start + size <= s or s + n <= start for s, n in alive.items())
            alive[start] = size
        if ends and alive:
            first = next(iter(alive))
            allocator.free(first)
            del alive[first]
    for start in alive:
        allocator.free(start)
    assert allocator.used_bytes == 0
    assert allocator.allocate(total) == 0


def test_small_chunks_that_are_set_aside_keep_scalars_out_of_the_way() -> None:
    """A scalar that outlives its step would halve the room for the next one."""
    events, sizes = (0, 1, ~0, 2, ~2), (5000, 4, 9000)
    assert not replay(events, sizes, Memory((10_240,))).fits
    assert replay(events, sizes, Memory((10_240 + 3 * 256,), 3)) == Replay(True, 11_008)
    # The last of them is held, and does not join with the rest.
    assert not replay((0,), (300,), Memory((1024,), 3)).fits
    # The second scalar has a place there only if there are two.
    assert replay((0, 1, 2, ~1, 3), (4, 5000, 4, 9000), Memory((10_240 + 1280,), 5)).fits
    assert not replay((0, 1, 2, ~1, 3), (4, 5000, 4, 9000), Memory((10_240 + 768,), 3)).fits


RECORDING = Recording((0, 1, ~0, 2, ~1, ~2), (300, 98, 700), ("a", "b", "c"))


def test_text_of_a_recording() -> None:
    text = recording_to_text(RECORDING)
    assert recording_from_text(text) == RECORDING
    for wrong in ("", "abc", text[:-9]):
        with pytest.raises(ValueError, match=r"recording|base85|JSON|Expecting"):
            recording_from_text(wrong)
