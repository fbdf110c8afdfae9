"""Recordings of small models, as material for step traces: without what is small, by blocks."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re

from bertbench.core.workload import TrainingStep
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.traces.loops import Recorded, loops_and_places
from bertbench.memory.traces.step import state_requests
from finetune.spec.checkpointing import examples_per_chunk


class UnlikeError(ValueError):
    """Recordings that are not alike enough to make a trace of them."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A recording, and of what.

    Attributes:
        step: of a small model; the levers are the same for all samples of a trace.
        recording: what a trial asked for.
    """

    step: TrainingStep
    recording: Recording


class Steps:
    """What a sample's steps ask for, without what is small and what comes before them.

    Attributes:
        events: n for the n-th allocation, ~n for its end. Ends that follow each other are in
            order of their allocations, the newest first: nothing tells them apart for an allocator.
        sizes: of the allocations.
        operations: that made them, without numbers.
        loops: policy and, among the events, where each block begins and the last one ends.
    """

    def __init__(self, sample: Sample) -> None:
        recording = sample.recording
        _, state_sizes = state_requests(sample.step.workload, sample.step.levers.optimizer)
        state = sum(size > MIN_ALLOCATION_BYTES for size in state_sizes)
        borders = self._borders(sample)
        number: dict[int, int] = {}
        kept: list[tuple[int, int]] = []
        self.sizes: list[int] = []
        self.operations: list[str] = []
        for position, event in enumerate(recording.events):
            allocation = max(event, ~event)
            if recording.sizes[allocation] <= MIN_ALLOCATION_BYTES:
                continue
            if event >= 0:
                number[allocation] = len(self.sizes)
                self.sizes.append(recording.sizes[allocation])
                self.operations.append(re.sub(r"_?\d+", "", recording.operations[allocation]))
            kept.append((position, number[allocation] if event >= 0 else ~number[allocation]))
        first = next(i for i, (_, event) in enumerate(kept) if event >= state)
        positions = [position for position, _ in kept[first:]]
        self.loops = [
            (policy, tuple(bisect.bisect_left(positions, border) for border in its))
            for policy, its in borders
        ]
        at_border = {place for _, its in self.loops for place in its}
        self.events: list[int] = []
        part: list[int] = []
        for place, (_, event) in enumerate(kept[first:]):
            if event >= 0 or place in at_border:
                self.events += sorted(part)
                part = []
            if event >= 0:
                self.events.append(event)
            else:
                part.append(event)
        self.events += sorted(part)
        self.made_at = {event: place for place, event in enumerate(self.events) if event >= 0}

    def token(self, place: int) -> tuple[bool, str, int]:
        """What happens at a place, the same for all layers."""
        event = self.events[place]
        allocation = max(event, ~event)
        return event >= 0, self.operations[allocation], self.sizes[allocation]

    @staticmethod
    def _borders(sample: Sample) -> list[tuple[str, tuple[int, ...]]]:
        step = sample.step
        layers = step.workload.config.num_hidden_layers
        policies = step.levers.checkpointing.chunked_policies(layers)
        if not policies:
            return []
        length, batch = step.workload.seq_len, step.micro_batch
        most = [examples_per_chunk(policy, length) or batch for policy in policies]
        recorded = Recorded(length, batch, sample.recording)
        ((loops, _),) = loops_and_places([recorded], [most])
        return [
            (policies[loop.policy], starts) for loop in loops.values() for starts in loop.starts
        ]


@dataclasses.dataclass(frozen=True)
class StepItem:
    """What happens outside of blocks, or all blocks of a loop.

    Attributes:
        token: equal for what is equal in every layer.
        places: of the events: of one, of the ends of one thing for every block, or of all blocks.
        policy: of the loop, or None.
        length: events of a block.
    """

    token: tuple[object, ...]
    places: tuple[int, ...]
    policy: str | None = None
    length: int = 1


def step_items(steps: Steps) -> list[StepItem]:
    """Put the blocks of a loop together, and the ends of what each block has left."""
    inside: dict[int, tuple[int, int]] = {}
    loop_at: dict[int, tuple[str, tuple[int, ...]]] = {}
    for number, (policy, borders) in enumerate(steps.loops):
        bodies = {tuple(map(steps.token, range(a, b))) for a, b in itertools.pairwise(borders)}
        if len(bodies) != 1:
            raise UnlikeError(f"blocks of loop {number} are not alike")
        length = borders[1] - borders[0]
        loop_at[borders[0]] = policy, borders
        for place in range(borders[0], borders[-1]):
            inside[place] = number, (place - borders[0]) % length

    def left_by_block(place: int) -> tuple[int, int] | None:
        event = steps.events[place] if place < len(steps.events) else 0
        return None if event >= 0 else inside.get(steps.made_at.get(~event, -1))

    items: list[StepItem] = []
    place = 0
    while place < len(steps.events):
        if place in loop_at:
            policy, borders = loop_at[place]
            length = borders[1] - borders[0]
            body = tuple(map(steps.token, range(place, place + length)))
            places = tuple(range(borders[0], borders[-1]))
            items.append(StepItem(("blocks", policy, body), places, policy, length))
            place = borders[-1]
            continue
        end, source = place + 1, left_by_block(place)
        while source is not None and left_by_block(end) == source:
            end += 1
        token = ("all" if source else "one", *steps.token(place))
        items.append(StepItem(token, tuple(range(place, end))))
        place = end
    return items
