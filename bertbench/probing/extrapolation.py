"""Which batch fits, worked out from what smaller ones asked of TensorFlow's allocator.

On a capped CPU the order of a step's requests depends neither on its batch nor on its sequence
length (`finetune.model.ordering`). The bytes of a request are a sum of few terms: a constant, one
that grows with the examples, one that grows with the square of the length. Recordings of two
batches, or of two batches each of two other lengths, tell the terms. So the requests of any other
batch are known, and a replay of them (`bertbench.memory.allocator.bfc`) tells whether it fits.

Layers that are computed in chunks of examples ask more often, not for more, when the batch grows.
Their recorded requests have one part for each chunk, and the parts are alike. For a larger batch
one of them is repeated, with the sizes of that batch's chunks.

All that is still a prediction. It tells which batch to try, and a trial decides.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from bertbench.memory.allocator.bfc import Memory, Replay, replay
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.traces.loops import (
    SMALL_BYTES,
    Loop,
    Origin,
    Recorded,
    examples_of_chunk,
    loops_and_origins,
)

_EXACT_BYTES = 64
"""By how much a sum of terms may miss a recorded size."""

_NEAR = 0.01
"""The same as a part of the size, if no sum is exact."""

_ENOUGH_CHUNKS = 4
"""From so many on there are some to choose a usual one from."""

# Powers of the examples and of the sequence length; what explains most comes first. Where two
# lengths do not tell, a constant and a square is what the scratch space of a matrix product is.
_TERMS = ((0, 0), (1, 1), (1, 2), (1, 0), (0, 1), (0, 2))
_SUMS = (
    *((term,) for term in _TERMS),
    ((0, 0), (0, 2)),
    ((1, 1), (1, 2)),
    *itertools.combinations(_TERMS, 2),
)


@dataclasses.dataclass(frozen=True)
class _Size:
    """Bytes of an allocation, by the examples of the batch or of the chunk.

    Attributes:
        constant_bytes: with no example.
        example_bytes: for each example.
    """

    constant_bytes: float
    example_bytes: float

    def size_bytes(self, examples: int) -> int:
        """Bytes for a number of examples."""
        return max(round(self.constant_bytes + self.example_bytes * examples), 0)


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """What any batch would ask for.

    Attributes:
        recording: what was recorded, of which the sizes are replaced.
        batch: about as many tokens of the sequence length as were recorded.
        origins: of its allocations.
        sizes: of its allocations, for any batch.
        examples_per_chunk: most examples of a chunk, for every policy in use that has chunks.
        largest: batch above which nothing is known; None if there is none.
    """

    recording: Recording
    batch: int
    origins: tuple[Origin, ...]
    sizes: tuple[_Size, ...]
    examples_per_chunk: tuple[int, ...]
    largest: int | None

    def replay(self, batch: int, memory: Memory) -> Replay:
        """Replay the requests of a batch."""
        return replay(*self.requests(batch), memory)

    def requests(self, batch: int) -> tuple[list[int], list[int]]:
        """Events and sizes of a batch; more chunks are added, but none are taken away."""
        events: list[int] = []
        sizes: list[int] = []
        # The live allocations of each stream, oldest first.
        alive: dict[tuple[str, int, int], collections.deque[int]] = {
            origin.stream: collections.deque() for origin in self.origins
        }
        ends = collections.Counter(self.origins[~e].stream for e in self.recording.events if e < 0)

        def allocate(event: int, chunks_before: int) -> None:
            origin = self.origins[event]
            examples = batch
            if origin.loop is not None:
                chunks = self._chunks(origin.loop, batch)
                examples = examples_of_chunk(
                    batch, chunks, min(origin.chunk + chunks_before, chunks - 1)
                )
            alive[origin.stream].append(len(sizes))
            events.append(len(sizes))
            sizes.append(self.sizes[event].size_bytes(examples))

        additions = self._additions(batch)
        for position, event in enumerate(self.recording.events):
            if position in additions:
                chunk, times = additions[position]
                for time in range(times):
                    for again in chunk:
                        if again >= 0:
                            allocate(again, time)
                        elif alive[self.origins[~again].stream]:
                            events.append(~alive[self.origins[~again].stream].popleft())
            if event >= 0:
                origin = self.origins[event]
                later = origin.loop is not None and origin.chunk >= origin.loop.repeated[origin.run]
                allocate(event, self._added(origin.loop, batch) if later else 0)
                continue
            stream = self.origins[~event].stream
            ends[stream] -= 1
            # What a chunk did not free is freed with the last of its stream.
            while alive[stream]:
                events.append(~alive[stream].popleft())
                if ends[stream]:
                    break
        return events, sizes

    def _chunks(self, loop: Loop, batch: int) -> int:
        return -(-batch // self.examples_per_chunk[loop.policy])

    def _added(self, loop: Loop | None, batch: int) -> int:
        return max(self._chunks(loop, batch) - loop.chunks, 0) if loop else 0

    def _additions(self, batch: int) -> dict[int, tuple[tuple[int, ...], int]]:
        """Events of the chunk to repeat, and how often, by the position that they go before."""
        events = self.recording.events
        loops = {id(origin.loop): origin.loop for origin in self.origins if origin.loop}
        return {
            starts[number]: (events[starts[number] : starts[number + 1]], added)
            for loop in loops.values()
            if (added := self._added(loop, batch))
            for starts, number in zip(loop.starts, loop.repeated, strict=True)
        }


def extrapolate(
    recorded: Sequence[Recorded],
    seq_len: int,
    examples_per_chunk: Callable[[int], Sequence[int]] = lambda seq_len: (),
    *,
    few_chunks: bool = False,
) -> Extrapolation | None:
    """Work out what any batch would ask for.

    Args:
        recorded: of one model and one lever setting. Two batches of the sequence length are
            enough, for layers in chunks the larger of at least two chunks; so are two batches
            each of two other lengths. Batch 1 does not count: its gradients need no sums over
            examples, so that its step is another.
        seq_len: tokens per example.
        examples_per_chunk: most examples of a chunk at a sequence length, for every policy in use
            that has chunks.
        few_chunks: start from a recording with few chunks, for batches with no more than others
            have. It is less certain which of them is a usual one.

    Returns:
        None where the recordings are too few, or do not match.
    """
    batches: dict[int, set[int]] = collections.defaultdict(set)
    recorded = [one for one in recorded if one.batch > 1]
    for one in recorded:
        batches[one.seq_len].add(one.batch)
    full = {length for length, found in batches.items() if len(found) >= 2}
    if seq_len in full:
        full = {seq_len}
    elif len(full) < 2:
        return None
    recorded = [one for one in recorded if one.seq_len in full]
    found = loops_and_origins(recorded, [examples_per_chunk(one.seq_len) for one in recorded])

    def preference(number: int) -> tuple[int, int, int]:
        # A single chunk cannot be repeated, and of many the most usual one can be chosen; but none
        # are taken away.
        chunks = min((loop.chunks for loop in found[number][0].values()), default=_ENOUGH_CHUNKS)
        rank = 2 if chunks < 2 else 1 if (chunks < _ENOUGH_CHUNKS) is not few_chunks else 0
        return rank, abs(recorded[number].seq_len - seq_len), recorded[number].batch

    base = min(range(len(recorded)), key=preference)
    origins = found[base][1]
    points = [_bytes_by_examples(one, its) for one, (_, its) in zip(recorded, found, strict=True)]
    sizes: dict[tuple[str, int], _Size] = {}
    for key in {key for its in points for key in its}:
        known = [its[key] for its in points if key in its]
        if len(known) == len(points):
            size = _fit(tuple(point for its in known for point in sorted(its.items())), seq_len)
        elif max(size_bytes for its in known for size_bytes in its.values()) <= SMALL_BYTES:
            size = _Size(next(iter(known[0].values())), 0.0)
        else:
            return None
        if size is None:
            return None
        sizes[key] = size
    tokens = recorded[base].batch * recorded[base].seq_len
    most = tuple(examples_per_chunk(seq_len))
    single = [most[loop.policy] for loop in found[base][0].values() if loop.chunks < 2]
    return Extrapolation(
        recorded[base].recording,
        max(tokens // seq_len, 1),
        origins,
        tuple(sizes[origin.key] for origin in origins),
        most,
        min(single, default=None),
    )


def _bytes_by_examples(
    recorded: Recorded, origins: Sequence[Origin]
) -> dict[tuple[str, int], dict[tuple[int, int], int]]:
    """Bytes of the allocations of each key, by (examples of the batch or chunk, length)."""
    result: dict[tuple[str, int], dict[tuple[int, int], int]] = collections.defaultdict(dict)
    for origin, size_bytes in zip(origins, recorded.recording.sizes, strict=True):
        examples = recorded.batch
        if origin.loop is not None:
            examples = examples_of_chunk(recorded.batch, origin.loop.chunks, origin.chunk)
        result[origin.key][examples, recorded.seq_len] = size_bytes
    return result


@functools.lru_cache(maxsize=1 << 14)
def _fit(points: tuple[tuple[tuple[int, int], int], ...], seq_len: int) -> _Size | None:
    """Find the fewest terms whose sum the sizes are.

    Args:
        points: (examples, sequence length) and bytes.
        seq_len: length to find it for.

    Returns:
        None if no sum of two terms comes near.
    """
    (examples, lengths), wanted = (
        np.array([point for point, _ in points]).T,
        np.array([size_bytes for _, size_bytes in points]),
    )
    best, best_error = None, max(_EXACT_BYTES, _NEAR * wanted.max())
    for terms in _SUMS:
        if len({*lengths}) == 1 and any(length_power for _, length_power in terms):
            continue
        columns = np.stack([np.float64(examples) ** n * lengths**s for n, s in terms], axis=1)
        scale = columns.max(axis=0)
        factors = np.linalg.lstsq(columns / scale, wanted, rcond=None)[0]
        error = np.abs(columns / scale @ factors - wanted).max()
        if error < best_error:
            of_length = [
                f / m * seq_len**s for f, m, (_, s) in zip(factors, scale, terms, strict=True)
            ]
            constant = sum(value for value, (n, _) in zip(of_length, terms, strict=True) if not n)
            best = _Size(float(constant), float(sum(of_length) - constant))
            best_error = error
        if error < _EXACT_BYTES:
            break
    if best is None and wanted.max() <= SMALL_BYTES:
        return _Size(float(wanted[-1]), 0.0)
    return best
