"""Memory during one optimizer step, from what the step allocates and frees."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bertbench.core.workload import Levers, Setup, TrainingStep, Workload
from bertbench.memory.traces.step_requests import (
    allocated_bytes,
    chunks_of,
    layers_of,
    sizes_of,
    state_bytes,
    trace_of,
)
from bertbench.memory.traces.trace import PerLayer, StepTrace
from bertbench.memory.traces.unroll import Unrolled

FORWARD, BACKWARD, UPDATE = "forward pass", "backward pass", "update"
BOTH_PASSES = "forward and backward pass"
"""Name of both passes where a model has too few layers to separate them in a trace."""

_MORE_LAYERS = 4
_DRAWN = 600


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step.

    Attributes:
        name: name of the phase, one of the constants of this module.
        start: number of its first event.
        end: number of the first event after it.
    """

    name: str
    start: int
    end: int

    def extended(self, start: int, end: int) -> Phase:
        """Return this phase, extended by a later part of it; either may be empty."""
        if start == end:
            return self
        return Phase(self.name, start if self.start == self.end else self.start, end)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Bytes in use after each allocate and each free event of one step.

    Attributes:
        state_bytes: weights and optimizer state, which live during the whole step.
        gradient_bytes: live bytes of gradients, their sums over micro-batches and their update.
        activation_bytes: live bytes of all that grows with the micro-batch.
        phases: the phases in order, without gaps.
        micro_batches: how many of the step's micro-batches are shown.
    """

    state_bytes: int
    gradient_bytes: npt.NDArray[np.int64]
    activation_bytes: npt.NDArray[np.int64]
    phases: tuple[Phase, ...]
    micro_batches: int

    @property
    def events(self) -> int:
        """Number of allocate and free events."""
        return len(self.gradient_bytes)

    @functools.cached_property
    def sampled(self) -> list[int]:
        """Events to draw: the first and the highest one of each interval."""
        total = self.gradient_bytes + self.activation_bytes
        width = -(-self.events // _DRAWN)
        highest = (n + int(total[n : n + width].argmax()) for n in range(0, self.events, width))
        return sorted({*range(0, self.events, width), *highest, self.events - 1})

    @property
    def peak_bytes(self) -> int:
        """Peak of the live bytes, without what the allocator loses to fragmentation."""
        return self.state_bytes + int((self.gradient_bytes + self.activation_bytes).max())


_Bytes = npt.NDArray[np.int64]
_Runs = dict[int, tuple[int, int]]
"""First event of a repeated item, and the first after it, by the item's number."""


def step_timeline(workload: Workload, levers: Levers, micro_batch: int) -> Timeline | None:
    """Unroll the second step of a trace.

    Two micro-batches are shown; all others are like the second.

    Returns:
        None if there is no trace.
    """
    setup = Setup(workload, levers)
    step, trace = setup.step(micro_batch), trace_of(setup)
    if trace is None:
        return None
    layers = layers_of(setup)
    _, gradients, activations, runs = _written(trace, step, layers)
    more = {over: count + _MORE_LAYERS * (count > 0) for over, count in layers.items()}
    names = _directions(*_written(trace, step, more))
    start = _between_steps(gradients + activations)
    passes: list[Phase] = []
    for item, name in names.items():
        its_start, its_end = runs.get(item, (0, 0))
        if its_end and its_start < start:
            passes = []
        elif name == UPDATE:
            # Also sums of micro-batches' gradients; the last one is the update.
            update = its_start, its_end
        elif passes and passes[-1].name == name:
            passes[-1] = passes[-1].extended(its_start, its_end)
        else:
            passes.append(Phase(name, its_start, its_end))
    passes = [*_merged(passes), Phase(UPDATE, *update)]
    borders = [start]
    for before, after in itertools.pairwise(passes):
        # Events between two passes belong to the first pass. Only those at the beginning of a
        # new micro-batch belong to the next.
        new = after.name in (FORWARD, BOTH_PASSES)
        borders.append(_lowest(activations, before.end, after.start) if new else after.start)
    borders.append(len(gradients))
    phases = tuple(
        Phase(one.name, low - start, high - start)
        for one, (low, high) in zip(passes, itertools.pairwise(borders), strict=True)
    )
    return Timeline(
        state_bytes(workload, levers.optimizer),
        gradients[start:],
        activations[start:],
        phases,
        sum(phase.name in (FORWARD, BOTH_PASSES) for phase in phases),
    )


def _between_steps(total: _Bytes) -> int:
    """Return the event that begins the second step; before it, only the state is live."""
    middle = len(total) // 3
    return _lowest(total, middle, 2 * middle)


def _written(
    trace: StepTrace, step: TrainingStep, layers: Mapping[str, int]
) -> tuple[StepTrace, _Bytes, _Bytes, _Runs]:
    """Bytes of gradients and of activations after every event, and where layers are repeated."""
    sizes = sizes_of(trace, step)
    chunks = chunks_of(trace.policies, step.workload.seq_len, step.micro_batch)
    grows = [size.of_examples for size in trace.sizes]
    written = Unrolled(
        trace,
        layers,
        {policy: len(its) for policy, its in chunks.items()},
        lambda policy, chunk: list(
            zip(sizes(chunks[policy][chunk] if policy else 0), grows, strict=True)
        ),
    )
    changes = np.zeros((2, len(written.events)), np.int64)
    for number, event in enumerate(written.events):
        its_bytes, of_examples = written.sizes[max(event, ~event)]
        changes[int(of_examples), number] = allocated_bytes(its_bytes) * (1 if event >= 0 else -1)
    gradients, activations = changes.cumsum(axis=1)
    ends = [section.event for section in written.sections[1:]] + [len(written.events)]
    runs: _Runs = {}
    for section, end in zip(written.sections, ends, strict=True):
        if isinstance(trace.items[section.item], PerLayer):
            runs[section.item] = (runs.get(section.item, (section.event, 0))[0], end)
    return trace, gradients, activations, runs


def _directions(
    trace: StepTrace, gradients: _Bytes, activations: _Bytes, runs: _Runs
) -> dict[int, str]:
    """For each repeated part, its pass: forward if activations become more, backward if fewer."""
    names = {}
    for item, (start, end) in sorted(runs.items()):
        change = activations[end - 1] - (activations[start - 1] if start else 0)
        names[item] = FORWARD if change > 0 else BACKWARD if change < 0 else UPDATE
    return names


def _merged(passes: Sequence[Phase]) -> list[Phase]:
    """Make one phase of a forward and a backward pass of which one has no repeated layer."""
    merged: list[Phase] = []
    for one in passes:
        before = merged[-1] if merged else None
        if one.name == BACKWARD and before is not None and before.name == FORWARD:
            known = [phase for phase in (before, one) if phase.start < phase.end]
            if len(known) < 2:
                start, end = (known[0].start, known[0].end) if known else (before.start, one.end)
                merged[-1] = Phase(BOTH_PASSES, start, end)
                continue
        merged.append(one)
    return merged


def _lowest(values: _Bytes, start: int, end: int) -> int:
    """Return the event after the one with the fewest live bytes."""
    return start + int(values[start:end].argmin()) + 1 if end > start else start
