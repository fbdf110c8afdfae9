"""Replays of what a step asks its allocator for: like TensorFlow's allocator, to the byte."""

from __future__ import annotations

import base64
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertbench.core.units import MIB_BYTES
from bertbench.memory.allocator.bfc import (
    BestFitAllocator,
    Memory,
    Recording,
    Replay,
    recording_from_text,
    recording_to_text,
    replay,
)


def allocator_of(*region_bytes: int) -> BestFitAllocator:
    return BestFitAllocator(Memory(region_bytes))


def test_the_smallest_chunk_that_is_large_enough_is_taken() -> None:
    allocator = allocator_of(10_240)
    starts = [allocator.allocate(size) for size in (2048, 256, 1024, 256, 1)]
    assert starts == [0, 8, 9, 13, 14]
    allocator.free(0)
    allocator.free(9)
    assert allocator.allocate(1000) == 9
    assert allocator.allocate(1025) == 0
    assert allocator.used_bytes == 1024 + 256 + 256 + 256 + 2048


def test_a_chunk_is_split_only_if_it_is_twice_as_large_or_leaves_much() -> None:
    allocator = allocator_of(768, 300 * MIB_BYTES)
    assert allocator.allocate(512) == 0
    assert allocator.used_bytes == 768
    assert allocator.allocate(172 * MIB_BYTES) is not None
    assert allocator.used_bytes == 768 + 172 * MIB_BYTES
    allocator = allocator_of(300 * MIB_BYTES)
    assert allocator.allocate(172 * MIB_BYTES + 256) == 0
    assert allocator.used_bytes == 300 * MIB_BYTES


def test_of_equal_chunks_that_with_the_lowest_address_is_taken() -> None:
    allocator = allocator_of(2560)
    starts = [allocator.allocate(512) for _ in range(5)]
    assert starts == [0, 2, 4, 6, 8]
    for start in (6, 2):
        allocator.free(start)
    assert allocator.allocate(300) == 2


def test_what_is_given_back_joins_its_neighbours_but_not_another_region() -> None:
    allocator = allocator_of(768, 768)
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
    allocator = allocator_of(total)
    alive: dict[int, int] = {}
    for size, ends in requests:
        start = allocator.allocate(size)
        if start is not None:
            assert 256 * start + size <= total
            chunks = -(-size // 256)
            assert all(start + chunks <= s or s + n <= start for s, n in alive.items())
            alive[start] = chunks
        if ends and alive:
            first = next(iter(alive))
            allocator.free(first)
            del alive[first]
    for start in alive:
        allocator.free(start)
    assert allocator.used_bytes == 0
    assert allocator.allocate(total) == 0


@given(
    st.integers(0, 6).map(lambda pairs: 2 * pairs + 1),
    st.integers(1, 30),
    st.integers(13, 40),
    st.lists(st.integers(1, 3000), max_size=30),
)
def test_small_chunks_are_laid_out_as_if_they_had_been_asked_for(
    small: int, first: int, second: int, sizes: list[int]
) -> None:
    regions = 256 * first, 256 * (first + second)
    made = BestFitAllocator(Memory(regions, small))
    asked = allocator_of(*regions)
    for chunk in [asked.allocate(1) for _ in range(small)][1::2]:
        assert chunk is not None
        asked.free(chunk)
    for size in sizes:
        assert made.used_bytes == asked.used_bytes
        assert made.allocate(size) == asked.allocate(size)


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


def packed(values: object, cut: int | None = None) -> str:
    return base64.b85encode(zlib.compress(json.dumps(values).encode())[:cut]).decode()


@pytest.mark.parametrize(
    "text",
    [
        packed([[0, 1, ~1, ~1], [4, 4], [""], [0, 0]]),  # ends twice
        packed([[~0], [], [""], []]),
        packed([[1], [4], [""], [0]]),
        packed([[0], [4, 4], [""], [0, 0]]),
        packed([[0], [-4], [""], [0]]),
        packed([["a"], [4], [""], [0]]),
        packed([[0], [4], [""], [7]]),
        packed([[0], [4], [""], [0]], cut=-3),
        packed("text"),
        packed([1, 2, 3, 4]),
        "no base 85",
    ],
)
def test_what_no_allocator_was_asked_is_no_recording(text: str) -> None:
    with pytest.raises(ValueError, match="not a recording of allocations"):
        recording_from_text(text)


def test_a_recording_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    text = recording_to_text(Recording((0, 1, ~0), (8, 9), ("", "a")))
    assert recording_from_text(text).sizes == (8, 9)
    monkeypatch.setattr("bertbench.memory.allocator.bfc._RECORDING_BYTES", 10)
    with pytest.raises(ValueError, match="too large"):
        recording_from_text(text)


def test_memory_beyond_sixteen_tebibytes() -> None:
    tebibytes = 1 << 40
    events = (0, 1, ~0, 2, ~1, ~2)
    sizes = (9 * tebibytes, 12 * tebibytes, 20 * tebibytes)
    answer = replay(events, sizes, Memory((64 * tebibytes,)))
    assert (answer.fits, answer.peak_bytes) == (True, 32 * tebibytes)
