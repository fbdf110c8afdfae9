"""Samples: recordings of small models, prepared to make step traces of them."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re

from bertbench.core.workload import TrainingStep
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.traces.loops import Recorded, loops_and_origins
from bertbench.memory.traces.step_requests import state_requests
from finetune.spec.checkpointing import examples_per_chunk


class UnlikeError(ValueError):
    """Recordings are not alike enough to make a trace of them."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A recording of a training step.

    Attributes:
        step: the step, of a small model. All samples of a trace have the same levers.
        recording: what a trial of the step asked of the allocator.
    """

    step: TrainingStep
    recording: Recording


class Steps:
    """Events of a sample's optimizer steps.

    Left out are requests that the small pieces serve, and those for the model and the optimizer's
    state, which come before the steps.

    Attributes:
        events: n for the n-th allocation, ~n for the release of it. Releases that follow each other
            are put in order of their allocations, the newest first: for an allocator the order of
            releases makes no difference.
        sizes: requested bytes of each allocation.
        operations: name of the operation that made each allocation, without numbers.
        loops: of each loop over chunks the policy, the number of the event that begins each chunk,
            and the number of the event after the last chunk.
        made_at: number of the event that made each allocation.
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
        at_border = {index for _, its in self.loops for index in its}
        self.events: list[int] = []
        part: list[int] = []
        for index, (_, event) in enumerate(kept[first:]):
            if event >= 0 or index in at_border:
                self.events += sorted(part)
                part = []
            if event >= 0:
                self.events.append(event)
            else:
                part.append(event)
        self.events += sorted(part)
        self.made_at = {event: index for index, event in enumerate(self.events) if event >= 0}

    def token(self, index: int) -> tuple[bool, str, int]:
        """Describe an event so that the same event of every layer has the same token."""
        event = self.events[index]
        allocation = max(event, ~event)
        return event >= 0, self.operations[allocation], self.sizes[allocation]

    @staticmethod
    def _borders(sample: Sample) -> list[tuple[str, tuple[int, ...]]]:
        """Policy of each loop, and where its chunks begin among the recording's events."""
        step = sample.step
        layers = step.workload.config.num_hidden_layers
        policies = step.levers.checkpointing.chunked_policies(layers)
        if not policies:
            return []
        length, batch = step.workload.seq_len, step.micro_batch
        most = [examples_per_chunk(policy, length) or batch for policy in policies]
        recorded = Recorded(length, batch, sample.recording)
        ((loops, _),) = loops_and_origins([recorded], [most])
        return [
            (policies[loop.policy], starts) for loop in loops.values() for starts in loop.starts
        ]


@dataclasses.dataclass(frozen=True)
class StepItem:
    """Part of a step: one event, all chunks of a loop, or the release of what all chunks kept.

    Attributes:
        token: the same for the same item of every layer.
        events: numbers of its events.
        policy: policy of the loop; None if the item is no loop.
        length: events of one chunk; 1 if the item is no loop.
    """

    token: tuple[object, ...]
    events: tuple[int, ...]
    policy: str | None = None
    length: int = 1


def step_items(steps: Steps) -> list[StepItem]:
    """Cut the events of a step into items.

    Raises:
        UnlikeError: the chunks of a loop differ from each other.
    """
    inside: dict[int, tuple[int, int]] = {}
    loop_at: dict[int, tuple[str, tuple[int, ...]]] = {}
    for number, (policy, borders) in enumerate(steps.loops):
        bodies = {tuple(map(steps.token, range(a, b))) for a, b in itertools.pairwise(borders)}
        if len(bodies) != 1:
            raise UnlikeError(f"chunks of loop {number} are not alike")
        length = borders[1] - borders[0]
        loop_at[borders[0]] = policy, borders
        for index in range(borders[0], borders[-1]):
            inside[index] = number, (index - borders[0]) % length

    def kept_by_chunk(index: int) -> tuple[int, int] | None:
        """Loop of what an event releases, and where in a chunk it was made."""
        event = steps.events[index] if index < len(steps.events) else 0
        return None if event >= 0 else inside.get(steps.made_at.get(~event, -1))

    items: list[StepItem] = []
    index = 0
    while index < len(steps.events):
        if index in loop_at:
            policy, borders = loop_at[index]
            length = borders[1] - borders[0]
            body = tuple(map(steps.token, range(index, index + length)))
            events = tuple(range(borders[0], borders[-1]))
            items.append(StepItem(("chunks", policy, body), events, policy, length))
            index = borders[-1]
            continue
        end, source = index + 1, kept_by_chunk(index)
        while source is not None and kept_by_chunk(end) == source:
            end += 1
        token = ("all" if source else "one", *steps.token(index))
        items.append(StepItem(token, tuple(range(index, end))))
        index = end
    return items
