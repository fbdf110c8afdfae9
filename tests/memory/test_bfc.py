"""Replays of what a step asks its allocator for: like TensorFlow's allocator, to the byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bertbench.core.units import MIB_BYTES
from bertbench.memory.allocator.bfc import BestFitAllocator, Memory, Replay, replay


def allocator_of(*region_bytes: int) -> BestFitAllocator:
    return BestFitAllocator(Memory(region_bytes))


def test_the_smallest_piece_that_is_large_enough_is_taken() -> None:
    allocator = allocator_of(10_240)
    starts = [allocator.allocate(size) for size in (2048, 256, 1024, 256, 1)]
    assert starts == [0, 8, 9, 13, 14]
    allocator.free(0)
    allocator.free(9)
    assert allocator.allocate(1000) == 9
    assert allocator.allocate(1025) == 0
    assert allocator.used_bytes == 1024 + 256 + 256 + 256 + 2048


def test_a_piece_is_split_only_if_it_is_twice_as_large_or_leaves_much() -> None:
    allocator = allocator_of(768, 300 * MIB_BYTES)
    assert allocator.allocate(512) == 0
    assert allocator.used_bytes == 768
    assert allocator.allocate(172 * MIB_BYTES) is not None
    assert allocator.used_bytes == 768 + 172 * MIB_BYTES
    allocator = allocator_of(300 * MIB_BYTES)
    assert allocator.allocate(172 * MIB_BYTES + 256) == 0
    assert allocator.used_bytes == 300 * MIB_BYTES


def test_of_equal_pieces_that_with_the_lowest_address_is_taken() -> None:
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
def test_pieces_do_not_overlap_and_nothing_is_lost(requests: list[tuple[int, bool]]) -> None:
    total = 40 * 256
    allocator = allocator_of(total)
    live: dict[int, int] = {}
    for size, ends in requests:
        start = allocator.allocate(size)
        if start is not None:
            assert 256 * start + size <= total
            units = -(-size // 256)
            assert all(start + units <= s or s + n <= start for s, n in live.items())
            live[start] = units
        if ends and live:
            first = next(iter(live))
            allocator.free(first)
            del live[first]
    for start in live:
        allocator.free(start)
    assert allocator.used_bytes == 0
    assert allocator.allocate(total) == 0


@given(
    st.integers(0, 6).map(lambda pairs: 2 * pairs + 1),
    st.integers(1, 30),
    st.integers(13, 40),
    st.lists(st.integers(1, 3000), max_size=30),
)
def test_small_pieces_are_laid_out_as_if_they_had_been_asked_for(
    small: int, first: int, second: int, sizes: list[int]
) -> None:
    regions = 256 * first, 256 * (first + second)
    made = BestFitAllocator(Memory(regions, small))
    asked = allocator_of(*regions)
    for piece in [asked.allocate(1) for _ in range(small)][1::2]:
        assert piece is not None
        asked.free(piece)
    for size in sizes:
        assert made.used_bytes == asked.used_bytes
        assert made.allocate(size) == asked.allocate(size)


def test_small_pieces_that_are_set_aside_keep_scalars_out_of_the_way() -> None:
    """A scalar that outlives its step would halve the room for the next one."""
    events, sizes = (0, 1, ~0, 2, ~2), (5000, 4, 9000)
    assert not replay(events, sizes, Memory((10_240,))).fits
    assert replay(events, sizes, Memory((10_240 + 3 * 256,), 3)) == Replay(True, 11_008)
    # The last of them is held, and does not join with the rest.
    assert not replay((0,), (300,), Memory((1024,), 3)).fits
    # The second scalar has a place there only if there are two.
    assert replay((0, 1, 2, ~1, 3), (4, 5000, 4, 9000), Memory((10_240 + 1280,), 5)).fits
    assert not replay((0, 1, 2, ~1, 3), (4, 5000, 4, 9000), Memory((10_240 + 768,), 3)).fits


def test_memory_beyond_sixteen_tebibytes() -> None:
    tebibytes = 1 << 40
    events = (0, 1, ~0, 2, ~1, ~2)
    sizes = (9 * tebibytes, 12 * tebibytes, 20 * tebibytes)
    answer = replay(events, sizes, Memory((64 * tebibytes,)))
    assert (answer.fits, answer.peak_bytes) == (True, 32 * tebibytes)
