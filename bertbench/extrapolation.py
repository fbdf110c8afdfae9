"""Which batch fits, worked out from what two smaller ones asked of the allocator.

On a capped CPU a step asks for memory in an order that does not depend on its batch
(`finetune.ordering`), and every request is a number of bytes that grows by the same amount with
every example. Two recorded batches tell by which, and a replay of the requests of a third
(`bertbench.allocations`) tells whether it fits.

Layers that are computed in blocks of examples ask more often, not for more, when the batch grows.
Their recorded requests have as many like parts as there are blocks; for a larger batch one of them
is repeated, with the sizes of that batch's blocks.

All that is still a prediction. It tells which batch to try, and a trial decides.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from bertbench.allocations import Recording, Replay, replay

_SMALL_BYTES = 1024
"""Counters, shapes and the like, which need not be found in both recordings."""

_FEWEST_BLOCKS = 4
"""The first and the last block are not like the others, and of the others one is chosen."""

_LOOKED_AT = 8
"""Batches below a limit that might not fit either."""

_LOOP_RE = re.compile(r"(.*while(?:_\d+)?)/(body|cond)/_\d+/")


@dataclasses.dataclass(frozen=True)
class _Loop:
    """A loop over blocks of examples, as recorded.

    Attributes:
        examples_per_block: most examples of a block.
        starts: for each run of the loop, the positions among the events at which its blocks begin,
            and at which the last one ends.
        repeated: for each run, the block that stands for more of them.
    """

    examples_per_block: int
    starts: tuple[tuple[int, ...], ...]
    repeated: tuple[int, ...]

    def blocks(self, batch: int) -> int:
        """Blocks of a batch."""
        return -(-batch // self.examples_per_block)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an allocation was made.

    Attributes:
        operation: that asked for it.
        run: which run of its loop; 0 outside of loops over blocks.
        time: which of those that the operation makes for a block, or in all outside of loops.
        block: number of the block among those of the run; 0 outside of loops.
        loop: the loop; None outside.
    """

    operation: str
    run: int
    time: int
    block: int = 0
    loop: _Loop | None = None

    @property
    def stream(self) -> tuple[str, int, int]:
        """The same for all blocks of a run, which let go of what they have in common in order."""
        return self.operation, self.run, self.time

    @property
    def key(self) -> tuple[str, int]:
        """The same where the same is asked for."""
        return self.operation, self.time


@dataclasses.dataclass(frozen=True)
class _Size:
    """Bytes of an allocation, by the examples of the batch or of the block.

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
        recording: of the larger of the two batches.
        batch: that batch.
        places: of its allocations.
        sizes: of its allocations, for any batch.
    """

    recording: Recording
    batch: int
    places: tuple[_Place, ...]
    sizes: tuple[_Size, ...]

    def replay(self, batch: int, region_bytes: Sequence[int]) -> Replay:
        """Replay the requests of a batch."""
        return replay(*self.requests(batch), region_bytes)

    def requests(self, batch: int) -> tuple[list[int], list[int]]:
        """Events and sizes of a batch; more blocks are added, but none are taken away."""
        events: list[int] = []
        sizes: list[int] = []
        # What is alive of each stream, oldest first.
        alive: dict[tuple[str, int, int], collections.deque[int]] = {
            place.stream: collections.deque() for place in self.places
        }
        ends = collections.Counter(self.places[~e].stream for e in self.recording.events if e < 0)

        def allocate(event: int, blocks_before: int) -> None:
            place = self.places[event]
            examples = batch
            if place.loop is not None:
                blocks = place.loop.blocks(batch)
                examples = _examples(batch, blocks, min(place.block + blocks_before, blocks - 1))
            alive[place.stream].append(len(sizes))
            events.append(len(sizes))
            sizes.append(self.sizes[event].size_bytes(examples))

        additions = self._additions(batch)
        for position, event in enumerate(self.recording.events):
            if position in additions:
                block, times = additions[position]
                for time in range(1, times + 1):
                    for again in block:
                        if again >= 0:
                            allocate(again, time)
                        elif alive[self.places[~again].stream]:
                            events.append(~alive[self.places[~again].stream].popleft())
            if event >= 0:
                place = self.places[event]
                later = place.loop is not None and place.block > place.loop.repeated[place.run]
                allocate(event, self._added(place.loop, batch) if later else 0)
                continue
            stream = self.places[~event].stream
            ends[stream] -= 1
            # What was never let go of by a block ends with the last of its stream.
            while alive[stream]:
                events.append(~alive[stream].popleft())
                if ends[stream]:
                    break
        return events, sizes

    def _added(self, loop: _Loop | None, batch: int) -> int:
        return max(loop.blocks(batch) - loop.blocks(self.batch), 0) if loop else 0

    def _additions(self, batch: int) -> dict[int, tuple[tuple[int, ...], int]]:
        """Events of the block to repeat, and how often, by the position that they go before."""
        events = self.recording.events
        loops = {id(place.loop): place.loop for place in self.places if place.loop}
        return {
            starts[number + 1]: (events[starts[number] : starts[number + 1]], added)
            for loop in loops.values()
            if (added := self._added(loop, batch))
            for starts, number in zip(loop.starts, loop.repeated, strict=True)
        }


def extrapolate(
    small: Recording,
    small_batch: int,
    large: Recording,
    large_batch: int,
    *,
    examples_per_block: Sequence[int] = (),
) -> Extrapolation | None:
    """Work out what any batch would ask for from recordings of two.

    Args:
        small: recording of the smaller batch.
        small_batch: examples of it.
        large: recording of the larger batch.
        large_batch: examples of it. For layers in blocks at least four blocks.
        examples_per_block: most examples of a block, for every policy in use that has blocks.

    Returns:
        None where the recordings do not match.
    """
    if not small_batch < large_batch:
        return None
    matches = {name: _LOOP_RE.match(name) for name in {*small.operations, *large.operations}}
    loop_names = {name: (match[1], match[2]) for name, match in matches.items() if match}
    of_small = _find_loops(small, small_batch, loop_names, examples_per_block)
    loops = {
        name: loop
        for name, loop in _find_loops(large, large_batch, loop_names, examples_per_block).items()
        # A loop over something else may have a fitting number of rounds, but always that number.
        if name in of_small and len(of_small[name].starts) == len(loop.starts)
    }
    if any(len(starts) <= _FEWEST_BLOCKS for loop in loops.values() for starts in loop.starts):
        return None
    places = _places(large, loops, loop_names)
    of_large = _bytes_by_examples(large, large_batch, places)
    known = _bytes_by_examples(
        small, small_batch, _places(small, {name: of_small[name] for name in loops}, loop_names)
    )
    for key in of_large.keys() ^ known.keys():
        # Something that happens not as often in both.
        if max(of_large.get(key, known.get(key, {})).values()) > _SMALL_BYTES:
            return None
    sizes = {key: _size({**known.get(key, {}), **found}) for key, found in of_large.items()}
    return Extrapolation(large, large_batch, places, tuple(sizes[place.key] for place in places))


def largest_batch(extrapolation: Extrapolation, region_bytes: Sequence[int], at_most: int) -> int:
    """Largest batch up to `at_most` that fits, as all smaller ones do; 0 if none.

    Near the limit the pieces that memory is in may be too small for one batch and not for the next.
    Some batches below the first limit that is found are looked at too.
    """

    def fits(batch: int) -> bool:
        return extrapolation.replay(batch, region_bytes).fits

    low, high, batch = 0, at_most + 1, min(extrapolation.batch, at_most)
    while high - low > 1:
        if fits(batch):
            low = batch
        else:
            high = batch
        batch = min(2 * low, at_most) if high > at_most else (low + high) // 2
    for batch in range(low - 1, max(low - _LOOKED_AT, extrapolation.batch), -1):
        if not fits(batch):
            low = batch - 1
    return low


def _find_loops(
    recording: Recording,
    batch: int,
    loop_names: Mapping[str, tuple[str, str]],
    examples_per_block: Sequence[int],
) -> dict[str, _Loop]:
    """Find loops whose body allocates as often as there are blocks, by their operations' names.

    A block begins where the loop's condition has been asked.
    """
    bodies: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    conditions: dict[str, dict[str, list[int]]] = collections.defaultdict(dict)
    for position, event in enumerate(recording.events):
        if event < 0 or recording.operations[event] not in loop_names:
            continue
        name = recording.operations[event]
        loop, part = loop_names[name]
        if part == "cond":
            conditions[loop].setdefault(name, []).append(position)
        elif recording.sizes[event] > _SMALL_BYTES:
            bodies[loop][name] += 1
    loops: dict[str, _Loop] = {}
    for loop, counts in bodies.items():
        asked = max(conditions[loop].values(), key=len, default=[])
        for most in examples_per_block:
            blocks = -(-batch // most)
            runs, rest = divmod(min(counts.values()), blocks)
            if runs and not rest and len(asked) == runs * (blocks + 1):
                by_run = [asked[n : n + blocks + 1] for n in range(0, len(asked), blocks + 1)]
                repeated = tuple(_most_usual(recording, starts) for starts in by_run)
                loops[loop] = _Loop(most, tuple(map(tuple, by_run)), repeated)
                break
    return loops


def _most_usual(recording: Recording, starts: Sequence[int]) -> int:
    """Find the block in the middle that is most like the others.

    Now and then a loop's counter is let go of only when the next block has begun. A block that is
    repeated with that, or without it, would leave counters behind.
    """
    middle = range(1, len(starts) - 2)
    blocks = {
        number: [
            (event >= 0, recording.operations[max(event, ~event)])
            for event in recording.events[starts[number] : starts[number + 1]]
        ]
        for number in middle
    }

    def left_over(number: int) -> int:
        more: collections.Counter[str] = collections.Counter()
        for begins, name in blocks[number]:
            more[name] += 1 if begins else -1
        return sum(map(abs, more.values()))

    def like_it(number: int) -> int:
        return sum(block == blocks[number] for block in blocks.values())

    return min(middle, key=lambda number: (left_over(number), -like_it(number)), default=0)


def _places(
    recording: Recording,
    loops: Mapping[str, _Loop],
    loop_names: Mapping[str, tuple[str, str]],
) -> tuple[_Place, ...]:
    """Places of all allocations."""
    made: dict[tuple[str, int, int], int] = collections.Counter()
    result: list[_Place] = []
    for position, number in enumerate(recording.events):
        if number < 0:
            continue
        name = recording.operations[number]
        loop = loops.get(loop_names[name][0]) if name in loop_names else None
        run = block = 0
        if loop is not None:
            first = [starts[0] for starts in loop.starts]
            run = max(bisect.bisect_right(first, position) - 1, 0)
            block = max(bisect.bisect_right(loop.starts[run][:-1], position) - 1, 0)
        result.append(_Place(name, run, made[name, run, block], block, loop))
        made[name, run, block] += 1
    return tuple(result)


def _bytes_by_examples(
    recording: Recording, batch: int, places: Sequence[_Place]
) -> dict[tuple[str, int], dict[int, int]]:
    """Bytes of the allocations of each key, by examples of the batch or of the block."""
    result: dict[tuple[str, int], dict[int, int]] = collections.defaultdict(dict)
    for place, size_bytes in zip(places, recording.sizes, strict=True):
        examples = batch
        if place.loop is not None:
            examples = _examples(batch, place.loop.blocks(batch), place.block)
        result[place.key][examples] = size_bytes
    return result


def _examples(batch: int, blocks: int, block: int) -> int:
    """Examples of a block, as `finetune.blocks` shares them out."""
    return (block + 1) * batch // blocks - block * batch // blocks


def _size(bytes_by_examples: Mapping[int, int]) -> _Size:
    """Draw a line through the bytes for the fewest and the most examples."""
    low, high = min(bytes_by_examples), max(bytes_by_examples)
    low_bytes, high_bytes = bytes_by_examples[low], bytes_by_examples[high]
    if low < high:
        growth = (high_bytes - low_bytes) / (high - low)
    elif high_bytes > _SMALL_BYTES and high_bytes % high == 0:
        # What is a multiple of the only number of examples is taken to grow with it.
        growth = high_bytes / high
    else:
        growth = 0.0
    return _Size(low_bytes - growth * low, growth)
