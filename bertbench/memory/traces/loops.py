"""Find the loops over chunks of examples in recordings.

`finetune.model.chunks` computes some layers for one chunk of examples at a time. Every chunk makes
the same requests. To predict the requests of more chunks, it must be known where each chunk begins.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from bertbench.memory.allocator.recording import Recording

SMALL_BYTES = 1024
"""Allocations up to this size, such as counters and shapes, are ignored in a loop: they are freed a
little earlier or later in each process."""

_LOOP_RE = re.compile(r"(.*while(?:_\d+)?)/(body|cond)/_\d+/")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A recording of a trial, with the sizes of its batch.

    Attributes:
        seq_len: tokens per example.
        batch: examples.
        recording: what the trial asked of the allocator.
    """

    seq_len: int
    batch: int
    recording: Recording


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop over chunks of examples, as recorded.

    Attributes:
        policy: index of the checkpointing policy, in the order in which `loops_and_origins` was
            given their numbers of examples.
        starts: for each run of the loop, numbers of the events that begin a chunk, and the number
            of the event after the last chunk.
        repeated: for each run, the number of the chunk to repeat where more chunks are needed.
    """

    policy: int
    starts: tuple[tuple[int, ...], ...]
    repeated: tuple[int, ...]

    @property
    def chunks(self) -> int:
        """Number of chunks in each run."""
        return len(self.starts[0]) - 1


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where in a step an allocation was made.

    Attributes:
        operation: name of the operation that made it.
        run: number of the loop's run; 0 outside of loops over chunks.
        index: number of the allocation among those that the operation made for this chunk; outside
            of loops among all that it made.
        chunk: number of the chunk in this run; 0 outside of loops.
        loop: the loop; None outside of loops.
    """

    operation: str
    run: int
    index: int
    chunk: int = 0
    loop: Loop | None = None

    @property
    def stream(self) -> tuple[str, int, int]:
        """The same for all chunks of a run; their allocations are freed in the order of chunks."""
        return self.operation, self.run, self.index

    @property
    def key(self) -> tuple[str, int]:
        """The same for allocations whose sizes have the same formula."""
        return self.operation, self.index


def loops_and_origins(
    recorded: Sequence[Recorded], examples_per_chunk: Sequence[Sequence[int]]
) -> list[tuple[dict[str, Loop], tuple[Origin, ...]]]:
    """Find the loops over chunks that all recordings have, and where each allocation was made.

    Args:
        recorded: recordings of one model and one lever setting.
        examples_per_chunk: for each recording and each policy that works in chunks, the most
            examples of a chunk.

    Returns:
        For each recording its loops by name, and the origins of its allocations.
    """
    loop_names = {
        name: (match[1], match[2])
        for name in {name for one in recorded for name in one.recording.operations}
        if (match := _LOOP_RE.match(name))
    }
    loops = _common(
        [
            _find_loops(one, loop_names, most)
            for one, most in zip(recorded, examples_per_chunk, strict=True)
        ]
    )
    return [
        (found, _origins(one.recording, found, loop_names))
        for one, found in zip(recorded, loops, strict=True)
    ]


def examples_of_chunk(batch: int, chunks: int, chunk: int) -> int:
    """Number of examples in a chunk, as `finetune.model.chunks` shares them out.

    Args:
        batch: examples of all chunks.
        chunks: number of chunks.
        chunk: number of the chunk, from 0 on.
    """
    return (chunk + 1) * batch // chunks - chunk * batch // chunks


def _find_loops(
    recorded: Recorded,
    loop_names: Mapping[str, tuple[str, str]],
    examples_per_chunk: Sequence[int],
) -> dict[tuple[str, int, int], Loop]:
    """Find loops whose body allocates as often as there are chunks.

    TensorFlow's names of operations say which loop they are in. A chunk begins where the condition
    of the loop was computed.

    Returns:
        Loops by name, policy and number of runs. A loop that fits several policies is there for
        each of them.
    """
    recording = recorded.recording
    bodies: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    conditions: dict[str, dict[str, list[int]]] = collections.defaultdict(dict)
    for position, event in enumerate(recording.events):
        if event < 0 or recording.operations[event] not in loop_names:
            continue
        name = recording.operations[event]
        loop, part = loop_names[name]
        if part == "cond":
            conditions[loop].setdefault(name, []).append(position)
        elif recording.sizes[event] > SMALL_BYTES:
            bodies[loop][name] += 1
    loops: dict[tuple[str, int, int], Loop] = {}
    for loop, counts in bodies.items():
        asked = max(conditions[loop].values(), key=len, default=[])
        for policy, most in enumerate(examples_per_chunk):
            chunks = -(-recorded.batch // most)
            runs, rest = divmod(min(counts.values()), chunks)
            if runs and not rest and len(asked) == runs * (chunks + 1):
                by_run = [asked[n : n + chunks + 1] for n in range(0, len(asked), chunks + 1)]
                repeated = tuple(_most_usual(recording, starts) for starts in by_run)
                loops[loop, policy, runs] = Loop(policy, tuple(map(tuple, by_run)), repeated)
    return loops


def _common(found: Sequence[dict[tuple[str, int, int], Loop]]) -> list[dict[str, Loop]]:
    """Keep the loops that are in all recordings, by their names.

    Other loops can have the same number of repetitions by chance in one recording.
    """
    keys = functools.reduce(lambda a, b: a & b, (set(loops) for loops in found))
    return [{key[0]: loops[key] for key in sorted(keys, reverse=True)} for loops in found]


def _most_usual(recording: Recording, starts: Sequence[int]) -> int:
    """Find the chunk after the first that is most like the others: it can be repeated.

    Sometimes a loop's counter is freed only after the next chunk has begun. If such a chunk, or the
    one after it, were repeated, the numbers of allocations and releases would differ.
    """
    later = range(1, len(starts) - 1)
    chunks = {
        number: [
            (event >= 0, recording.operations[max(event, ~event)])
            for event in recording.events[starts[number] : starts[number + 1]]
        ]
        for number in later
    }

    def not_freed(number: int) -> int:
        more: collections.Counter[str] = collections.Counter()
        for allocates, name in chunks[number]:
            more[name] += 1 if allocates else -1
        return sum(map(abs, more.values()))

    def alike(number: int) -> int:
        return sum(chunk == chunks[number] for chunk in chunks.values())

    return min(later, key=lambda number: (not_freed(number), -alike(number)), default=0)


def _origins(
    recording: Recording,
    loops: Mapping[str, Loop],
    loop_names: Mapping[str, tuple[str, str]],
) -> tuple[Origin, ...]:
    """Find the origins of all allocations."""
    made: dict[tuple[str, int, int], int] = collections.Counter()
    result: list[Origin] = []
    for position, event in enumerate(recording.events):
        if event < 0:
            continue
        name = recording.operations[event]
        loop = loops.get(loop_names[name][0]) if name in loop_names else None
        run = chunk = 0
        if loop is not None:
            run = bisect.bisect_right(loop.starts, position, key=lambda starts: starts[0])
            run = max(run - 1, 0)
            starts = loop.starts[run]
            chunk = max(bisect.bisect_right(starts, position, hi=loop.chunks) - 1, 0)
        result.append(Origin(name, run, made[name, run, chunk], chunk, loop))
        made[name, run, chunk] += 1
    return tuple(result)
