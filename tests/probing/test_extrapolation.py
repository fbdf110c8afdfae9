"""What other batches ask for, worked out from two: like real steps, to the byte."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.allocator.bfc import Memory, Replay, replay
from bertbench.memory.allocator.budget import empty_memory
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.limit_search import _last_that_fits, largest_batch
from bertbench.memory.traces.loops import Recorded
from bertbench.probing.extrapolation import (
    Extrapolation,
    extrapolate,
)
from bertbench.trials.measure import (
    TrialListener,
    TrialSettings,
    measure_batches,
    measure_step,
)
from bertbench.trials.trial import Trial
from finetune.spec.checkpointing import examples_per_chunk, parse_checkpointing

PLENTY, LITTLE = Memory((10**7,)), Memory((50_000,))


def limit_of(found: Extrapolation, memory: Memory, at_most: int) -> int | None:
    return largest_batch(
        lambda batch: found.replay(batch, memory),
        memory.total_bytes,
        begin=found.batch,
        at_most=at_most,
        known_up_to=found.largest,
    )


def recording(batch: int) -> Recording:
    """Two buffers that grow, the first of which is gone when a constant one comes."""
    return Recording((0, 1, ~0, 2, ~1, ~2), (100 * batch, 30 * batch + 8, 700), ("a", "b", "c"))


def at_one_length(*found: tuple[int, Recording], most: Sequence[int] = ()) -> Extrapolation | None:
    recorded = [Recorded(32, batch, made) for batch, made in found]
    return extrapolate(recorded, 32, lambda seq_len: most)


def test_sizes_between_and_beyond_two_recordings() -> None:
    found = at_one_length((2, recording(2)), (7, recording(7)))
    assert found is not None
    for batch in (1, 2, 5, 7, 19):
        expected = replay(recording(batch).events, recording(batch).sizes, Memory((10_000,)))
        assert found.replay(batch, Memory((10_000,))) == expected
    limit = limit_of(found, Memory((10_000,)), 1 << 16)
    assert limit is not None
    assert limit > 20
    assert found.replay(limit, Memory((10_000,))).fits
    assert not found.replay(limit + 1, Memory((10_000,))).fits
    assert limit_of(found, Memory((10_000,)), 20) == 20
    assert limit_of(found, Memory((256,)), 20) == 0


def at_length(batch: int, seq_len: int) -> Recording:
    """Hidden states, attention scores, positions, a product's scratch, a weight."""
    sizes = (
        4 * batch * seq_len * 96,
        4 * batch * seq_len**2 * 3,
        4 * seq_len * 96,
        1536 + 8 * seq_len**2,
        50_000,
        4 * batch * 96,
        batch * seq_len * 96 + 3 * batch * seq_len**2,
        8,
    )
    events = (4, 0, 2, ~2, 1, 3, ~3, ~0, 5, 6, ~1, 7, ~6, ~5, ~7, ~4)
    numbers = {event: number for number, event in enumerate(e for e in events if e >= 0)}
    order = tuple(numbers[event] if event >= 0 else ~numbers[~event] for event in events)
    by_time = sorted(numbers, key=numbers.__getitem__)
    return Recording(order, tuple(sizes[n] for n in by_time), tuple(f"op{n}" for n in by_time))


@given(
    lengths=st.lists(st.sampled_from([32, 64, 96, 128, 384]), min_size=2, max_size=4, unique=True),
    seq_len=st.sampled_from([48, 64, 128, 256, 512]),
    batch=st.integers(1, 300),
)
def test_two_other_lengths_tell(lengths: list[int], seq_len: int, batch: int) -> None:
    recorded = [Recorded(s, b, at_length(b, s)) for s in lengths for b in (3, 14)]
    found = extrapolate(recorded, seq_len)
    assert found is not None
    expected = at_length(batch, seq_len)
    events, sizes = found.requests(batch)
    assert events == list(expected.events)
    assert max(abs(a - b) for a, b in zip(sizes, expected.sizes, strict=True)) <= 64


def test_one_other_length_tells_nothing() -> None:
    recorded = [Recorded(64, b, at_length(b, 64)) for b in (3, 14)]
    assert extrapolate(recorded, 64) is not None
    assert extrapolate(recorded, 128) is None
    assert extrapolate([*recorded, Recorded(128, 3, at_length(3, 128))], 128) is None


def test_recordings_of_other_things_are_not_extrapolated() -> None:
    other = Recording((0, 1, ~0, 2), (1, 2, 3000), ("a", "b", "d"))
    assert at_one_length((2, recording(2)), (7, other)) is None
    assert at_one_length((2, other), (7, recording(7))) is None
    assert at_one_length((7, recording(7)), (7, recording(7))) is None


def test_small_things_may_happen_more_often_in_one_of_them() -> None:
    def more_often(made: Recording) -> Recording:
        return Recording((*made.events, 3, ~3), (*made.sizes, 8), (*made.operations, "b"))

    expected = replay(recording(40).events, recording(40).sizes, Memory((10_000,)))
    for small, large in (
        (recording(2), more_often(recording(7))),
        (more_often(recording(2)), recording(7)),
    ):
        found = at_one_length((2, small), (7, large))
        assert found is not None
        assert found.replay(40, Memory((10_000,))) == expected


class Recorder:
    """Writes a recording by names of operations."""

    def __init__(self) -> None:
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.operations: list[str] = []

    def ask(self, name: str, size_bytes: int) -> int:
        self.events.append(len(self.sizes))
        self.sizes.append(size_bytes)
        self.operations.append(name)
        return self.events[-1]

    def end(self, *numbers: int) -> None:
        self.events += [~number for number in numbers]

    def recording(self) -> Recording:
        return Recording(tuple(self.events), tuple(self.sizes), tuple(self.operations))


def in_chunks(batch: int, most: int, *, late: int | None = None) -> Recording:
    """Two steps with a loop forwards that puts something aside, and one backwards that takes it.

    The counter of the chunk `late` is let go of only when the next one has begun.
    """
    chunks = -(-batch // most)
    examples = [(n + 1) * batch // chunks - n * batch // chunks for n in range(chunks)]
    recorder = Recorder()
    ask, end = recorder.ask, recorder.end
    weights = ask("weights", 5000)
    for _ in range(2):
        inputs = ask("inputs", 2000 * batch)
        asked = ask("while/cond/_0/Less", 1)
        kept, joined, waiting = [], [], None
        for number, count in enumerate(examples):
            counter = ask("while/body/_1/add", 4)
            end(asked)
            if waiting is not None:
                end(waiting)
                waiting = None
            work = ask("while/body/_1/MatMul", 3000 * count + 4096)
            kept.append(ask("while/body/_1/keep", 2048 * count))
            joined.append(ask("while/body/_1/result", 1500 * count))
            end(work)
            asked = ask("while/cond/_0/Less", 1)
            if number == late:
                waiting = counter
            else:
                end(counter)
        end(asked)
        result = ask("concat", 1500 * batch)
        end(*joined)
        totals = ask("zeros", 8192)
        asked = ask("while_1/cond/_0/Less", 1)
        for number, count in enumerate(examples):
            end(asked)
            work = ask("while_1/body/_1/MatMul", 6000 * count)
            end(kept[number])
            more = ask("while_1/body/_1/sum", 8192)
            end(totals, work)
            totals = more
            asked = ask("while_1/cond/_0/Less", 1)
        end(asked, totals, result, inputs)
    end(weights)
    return recorder.recording()


@given(
    most=st.integers(2, 6),
    chunks=st.integers(2, 7),
    small=st.integers(2, 20),
    more=st.integers(0, 60),
)
def test_chunks_are_repeated(most: int, chunks: int, small: int, more: int) -> None:
    large = chunks * most - 1
    small = min(small, large - 1)
    found = at_one_length(
        (small, in_chunks(small, most)), (large, in_chunks(large, most)), most=[most]
    )
    assert found is not None
    expected = in_chunks(large + more, most)
    for region_bytes in (10**7, 60_000 + 3000 * (large + more), 40_000):
        told = found.replay(large + more, Memory((region_bytes,)))
        assert told == replay(expected.events, expected.sizes, Memory((region_bytes,)))


def most_alive(events: Sequence[int]) -> int:
    return max(itertools.accumulate(1 if event >= 0 else -1 for event in events))


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_chunk_that_leaves_something_to_the_next_one_is_not_repeated(late: int) -> None:
    found = at_one_length((9, in_chunks(9, 4)), (23, in_chunks(23, 4, late=late)), most=[4])
    assert found is not None
    events, _ = found.requests(200)
    assert most_alive(events) <= most_alive(in_chunks(200, 4).events) + 1


def requests(made: Recording) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return made.events, made.sizes


def test_a_single_chunk_tells_of_no_second_one() -> None:
    found = at_one_length((2, in_chunks(2, 6)), (5, in_chunks(5, 6)), most=[6])
    assert found is not None
    expected = in_chunks(6, 6)
    assert found.replay(6, PLENTY) == replay(expected.events, expected.sizes, PLENTY)
    fitting = [b for b in range(1, 7) if replay(*requests(in_chunks(b, 6)), LITTLE).fits]
    assert limit_of(found, LITTLE, 100) == max(fitting) < 6
    assert limit_of(found, PLENTY, 100) is None
    assert limit_of(found, PLENTY, 5) == 5


@pytest.mark.parametrize(
    ("policy", "batches"),
    [
        ("none", (3, 10)),
        pytest.param("selective", (30, 191), marks=pytest.mark.slow),
        pytest.param("nested:1", (40, 143), marks=pytest.mark.slow),
    ],
)
def test_a_real_step_needs_what_two_others_say(policy: str, batches: tuple[int, int]) -> None:
    workload = published_workload("bert-tiny", 32)
    checkpointing = parse_checkpointing(policy)
    budget = make_budget(resolve_device("cpu"), 192 * MIB_BYTES)
    memory = empty_memory(budget)
    recordings: dict[int, Recording] = {}

    def measure(*batches: int) -> list[Trial]:
        return measure_batches(
            Setup(workload, Levers(checkpointing)),
            budget,
            batches,
            TrialSettings(steps=1, fresh=True),
            TrialListener(on_recording=recordings.__setitem__),
        )

    trials = measure(*batches)
    found = extrapolate(
        [Recorded(workload.seq_len, *pair) for pair in recordings.items()],
        workload.seq_len,
        lambda seq_len: [examples_per_chunk(policy.partition(":")[0], seq_len) or 1],
    )
    assert found is not None
    limit = limit_of(found, memory, 1 << 16)
    assert limit is not None
    assert limit > max(batches)
    assert not found.replay(limit + 1, memory).fits
    trials += measure(limit)
    for trial in trials[1:]:
        assert trial.outcome == "fits"
        assert trial.peak_bytes is not None
        # A counter of 256 bytes may be alive a moment longer in one process than in another.
        assert abs(found.replay(trial.batch, memory).peak_bytes - trial.peak_bytes) <= 1024


def test_recording_does_not_change_the_peak() -> None:
    """With this optimizer making the model needs more than a small step."""
    budget = make_budget(resolve_device("cpu"), 192 * MIB_BYTES)
    (plain, recorded) = (
        measure_step(
            Setup(published_workload("bert-tiny", 32), Levers(optimizer="adafactor")).step(2),
            budget,
            TrialSettings(steps=1),
            TrialListener(on_recording=on_recording),
        )
        for on_recording in (None, lambda batch, recording: None)
    )
    assert plain.peak_bytes is not None
    assert recorded.peak_bytes is not None
    assert recorded.peak_bytes == pytest.approx(plain.peak_bytes, rel=1e-3)


@given(limit=st.integers(0, 70_000), guess=st.integers(-5, 80_000), low=st.integers(0, 300))
def test_a_limit_is_found_near_its_guess_with_few_replays(limit: int, guess: int, low: int) -> None:
    low, high = min(low, limit), 65_537
    tried: list[int] = []

    def fits(batch: int) -> bool:
        assert low < batch < high
        assert batch not in tried
        tried.append(batch)
        return batch <= limit

    assert _last_that_fits(fits, low, high, guess) == min(limit, high - 1)
    assert len(tried) <= 40
    if abs(guess - limit) <= limit // 128 and 1024 <= limit <= 65_000:
        assert len(tried) <= 12


def test_a_hole_below_the_limit_is_the_limit() -> None:
    """In what a device can hold there may be holes; the first one counts."""

    def limit(at_most: int = 1 << 16, fitting: int = 0, hole: Container[int] = (97,)) -> int | None:
        return largest_batch(
            lambda batch: Replay(batch <= 100 and batch not in hole, 7 * batch),
            700,
            begin=10,
            at_most=at_most,
            fitting=fitting,
        )

    assert limit() == 96
    # A trial that fits beyond the hole is believed, and what lies below it is settled.
    assert limit(fitting=98) == 100
    assert limit(fitting=100) == 100
    assert limit(99, 98) == 99
    # However long it is, or with another one below it.
    assert limit(hole=range(88, 98)) == 87
    assert limit(hole=(95, 97)) == 94
    assert limit(hole=range(1, 98)) == 0
    assert limit(hole=range(88, 98), fitting=90) == 90


def test_a_single_example_tells_nothing() -> None:
    recorded = [Recorded(32, b, recording(b)) for b in (1, 7)]
    assert extrapolate(recorded, 32) is None
    assert extrapolate([*recorded, Recorded(32, 2, recording(2))], 32) is not None
    others = [Recorded(s, b, at_length(b, s)) for s in (64, 96) for b in (3, 14)]
    assert extrapolate([Recorded(32, b, at_length(b, 32)) for b in (1, 2)] + others, 32) is not None


def test_of_several_recordings_one_with_enough_chunks_is_repeated() -> None:
    found = [(9, in_chunks(9, 4)), (23, in_chunks(23, 4)), (39, in_chunks(39, 4))]
    recorded = [Recorded(32, batch, made) for batch, made in found]
    many = extrapolate(recorded, 32, lambda seq_len: [4])
    few = extrapolate(recorded, 32, lambda seq_len: [4], few_chunks=True)
    assert many is not None
    assert few is not None
    assert (many.batch, few.batch) == (23, 9)
    expected = in_chunks(12, 4)
    assert few.replay(12, PLENTY) == replay(expected.events, expected.sizes, PLENTY)
