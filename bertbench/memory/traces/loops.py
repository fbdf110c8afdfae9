"""Loops over chunks of examples, found in recordings of what a step asks its allocator for.

`finetune.model.chunks` runs some layers a chunk of examples at a time, and their requests come
back for every chunk. To tell what more chunks would ask for, one has to know where each of them
begins.
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
"""Counters, shapes and the like, which come and go a little earlier or later in each process."""

_LOOP_RE = re.compile(r"(.*while(?:_\d+)?)/(body|cond)/_\d+/")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a trial has recorded.

    Attributes:
        seq_len: tokens per example.
        batch: examples.
        recording: what they asked for.
    """

    seq_len: int
    batch: int
    recording: Recording


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop over chunks of examples, as recorded.

    Attributes:
        policy: index of the most examples of a chunk among those of all policies.
        starts: for each run of the loop, the positions among the events at which its chunks begin,
            and at which the last one ends.
        repeated: for each run, the chunk that stands for more of them.
    """

    policy: int
    starts: tuple[tuple[int, ...], ...]
    repeated: tuple[int, ...]

    @property
    def chunks(self) -> int:
        """PerChunk that were recorded in each run."""
        return len(self.starts[0]) - 1


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an allocation was made.

    Attributes:
        operation: that asked for it.
        run: which run of its loop; 0 outside of loops over chunks.
        time: which of those that the operation makes for a chunk, or in all outside of loops.
        chunk: number of the chunk among those of the run; 0 outside of loops.
        loop: the loop; None outside.
    """

    operation: str
    run: int
    time: int
    chunk: int = 0
    loop: Loop | None = None

    @property
    def stream(self) -> tuple[str, int, int]:
        """The same for all chunks of a run, which let go of what they have in common in order."""
        return self.operation, self.run, self.time

    @property
    def key(self) -> tuple[str, int]:
        """The same where the same is asked for."""
        return self.operation, self.time


def loops_and_origins(
    recorded: Sequence[Recorded], examples_per_chunk: Sequence[Sequence[int]]
) -> list[tuple[dict[str, Loop], tuple[Origin, ...]]]:
    """Find the loops over chunks that all recordings have, and where each allocation was made.

    Args:
        recorded: of one model and one lever setting.
        examples_per_chunk: for each recording the most examples of a chunk, for every policy in
            use that has chunks.

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
    """Examples of a chunk, as `finetune.model.chunks` shares them out."""
    return (chunk + 1) * batch // chunks - chunk * batch // chunks


def _find_loops(
    recorded: Recorded,
    loop_names: Mapping[str, tuple[str, str]],
    examples_per_chunk: Sequence[int],
) -> dict[tuple[str, int, int], Loop]:
    """Find loops whose body allocates as often as there are chunks, by their operations' names.

    A chunk begins where the loop's condition has been asked.

    Returns:
        Loops by name, policy and number of runs; one that may be of several policies several times.
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
    """Keep the loops that are in all recordings, under their names.

    A loop over something else may have a fitting number of rounds now and then.
    """
    keys = functools.reduce(lambda a, b: a & b, (set(loops) for loops in found))
    return [{key[0]: loops[key] for key in sorted(keys, reverse=True)} for loops in found]


def _most_usual(recording: Recording, starts: Sequence[int]) -> int:
    """Find the chunk after the first that is most like the others.

    Now and then a loop's counter is let go of only when the next chunk has begun. A chunk that is
    repeated with that, or without it, would leave counters behind.
    """
    later = range(1, len(starts) - 1)
    chunks = {
        number: [
            (event >= 0, recording.operations[max(event, ~event)])
            for event in recording.events[starts[number] : starts[number + 1]]
        ]
        for number in later
    }

    def left_over(number: int) -> int:
        more: collections.Counter[str] = collections.Counter()
        for begins, name in chunks[number]:
            more[name] += 1 if begins else -1
        return sum(map(abs, more.values()))

    def like_it(number: int) -> int:
        return sum(chunk == chunks[number] for chunk in chunks.values())

    return min(later, key=lambda number: (left_over(number), -like_it(number)), default=0)


def _origins(
    recording: Recording,
    loops: Mapping[str, Loop],
    loop_names: Mapping[str, tuple[str, str]],
) -> tuple[Origin, ...]:
    """Origins of all allocations."""
    made: dict[tuple[str, int, int], int] = collections.Counter()
    result: list[Origin] = []
    for position, number in enumerate(recording.events):
        if number < 0:
            continue
        name = recording.operations[number]
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
