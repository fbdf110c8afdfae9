"""Whether a step fits in a budget, predicted: by a replay of its trace, or by its footprint.

A replay of what the step asks for is exact on a CPU, down to the pieces that memory is in. Where
there is no trace, the margin is the largest error that was measured of the formula; on devices that
no trace was recorded on, a margin covers what is different there.
"""

from __future__ import annotations

import dataclasses

from bertbench.core.bisection import largest_passing
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload
from bertbench.memory.allocator.bfc import Memory
from bertbench.memory.allocator.limit import memory_of
from bertbench.memory.footprint import (
    COMPILED_MARGIN,
    FORMULA_MARGIN,
    SAFETY_MARGIN,
    Footprint,
    all_reduce_footprint,
    inference_bytes,
    predict_footprint,
)
from bertbench.memory.traced_footprint import traced_footprint
from bertbench.memory.traces.peaks import traced_peak_bytes
from bertbench.memory.traces.step import left_out_bytes, replay_step, trace_of

_RECORDED_MULTIPLES, _OTHER_LENGTHS_MARGIN = 16, 0.005
"""Traces were recorded of sequence lengths that are multiples of 16. Of others TensorFlow copies
some rows, and matrix products take more workspace: the largest error that was measured of lengths
50 and 100, one policy with chunks and one without, was 0.13 %."""


@dataclasses.dataclass(frozen=True)
class Room:
    """What a step has to fit in.

    Attributes:
        device_kind: `cpu`, `gpu` or `tpu`.
        budget_bytes: what the allocator of one device may use.
        spare_bytes: what is to be left free of it.
        replicas: devices that share the effective batch, and so add up their gradients.
        margin: part of a prediction with a trace to add, where one is kept; None takes
            `SAFETY_MARGIN`.
    """

    device_kind: str
    budget_bytes: int
    spare_bytes: int = 0
    replicas: int = 1
    margin: float | None = None

    def memory(self) -> Memory:
        """The allocator's memory."""
        return memory_of(self.device_kind, self.usable_bytes())

    def usable_bytes(self, margin: float = 0.0) -> int:
        """What a prediction may reach that has an error."""
        return int((self.budget_bytes - self.spare_bytes) / (1 + margin))


def margin_for(workload: Workload, levers: Levers, room: Room) -> float:
    """Part of a prediction to add before it is compared with a budget."""
    if not has_trace(workload, levers, room.device_kind):
        compiled = levers.xla or room.device_kind == "tpu"
        return COMPILED_MARGIN if compiled else FORMULA_MARGIN
    if room.device_kind == "cpu":
        return _OTHER_LENGTHS_MARGIN if workload.seq_len % _RECORDED_MULTIPLES else 0.0
    return SAFETY_MARGIN if room.margin is None else room.margin


def least_peak_bytes(workload: Workload, levers: Levers, micro_batch: int, room: Room) -> int:
    """Predicted peak, in a fraction of a millisecond: never more than what a replay finds.

    What the allocator loses in chunks that it hands out whole, if there is a trace, is not in it.
    """
    together_bytes = 0
    if room.replicas > 1:
        together_bytes = _all_reduce(workload, levers, micro_batch, room).peak_bytes
    traced = None
    if has_trace(workload, levers, room.device_kind):
        traced = traced_peak_bytes(Setup(workload, levers).step(micro_batch))
    if traced is None:
        predicted = predict_footprint(
            Setup(workload, levers).step(micro_batch), device_kind=room.device_kind
        )
        return max(predicted.peak_bytes, together_bytes)
    return max(traced + room.memory().held_bytes, together_bytes)


def usable_bytes(workload: Workload, levers: Levers, room: Room) -> int:
    """What a prediction may reach."""
    usable = room.usable_bytes(margin_for(workload, levers, room))
    if has_trace(workload, levers, room.device_kind):
        usable -= left_out_bytes(Setup(workload, levers))
    return usable


def fits(workload: Workload, levers: Levers, micro_batch: int, room: Room) -> bool:
    """Whether a step fits, as far as can be told without running it."""
    least_bytes = least_peak_bytes(workload, levers, micro_batch, room)
    if least_bytes > usable_bytes(workload, levers, room):
        return False
    if not has_trace(workload, levers, room.device_kind):
        return True
    memory = _traced_memory(workload, levers, room)
    return replay_step(Setup(workload, levers).step(micro_batch), memory).fits


def inference_batch(setup: Setup, budget_bytes: int, at_most: int) -> int:
    """How many examples a model can answer at a time while it is trained, at least 1.

    It may be fewer than a micro-batch that fits: with `nested` a training step computes a layer for
    a few examples at a time, inference for all of them.

    Args:
        setup: of the training.
        budget_bytes: what the allocator of one device may use.
        at_most: examples.
    """
    usable_bytes = int(budget_bytes / (1 + FORMULA_MARGIN))

    def fits_in(examples: int) -> bool:
        return examples <= at_most and (
            examples == 1 or inference_bytes(setup, examples) <= usable_bytes
        )

    return largest_passing(fits_in)


def footprint_in(
    workload: Workload, levers: Levers, micro_batch: int, room: Room, *, replayed: bool
) -> Footprint:
    """Predicted peak by part; with `replayed`, and with a trace, what the allocator loses too."""
    footprint = None
    if has_trace(workload, levers, room.device_kind):
        memory = _traced_memory(workload, levers, room)
        footprint = traced_footprint(
            Setup(workload, levers).step(micro_batch), memory, replayed=replayed
        )
    if footprint is None:
        footprint = predict_footprint(
            Setup(workload, levers).step(micro_batch), device_kind=room.device_kind
        )
    if room.replicas > 1:
        together = _all_reduce(workload, levers, micro_batch, room)
        if together.peak_bytes > footprint.peak_bytes:
            return together
    return footprint


def _traced_memory(workload: Workload, levers: Levers, room: Room) -> Memory:
    """What the allocator has for what a trace tells of."""
    return memory_of(room.device_kind, max(usable_bytes(workload, levers, room), 0))


def has_trace(workload: Workload, levers: Levers, device_kind: str) -> bool:
    """Whether a step's requests are known; those of XLA, as for a TPU, are in another order."""
    return device_kind != "tpu" and trace_of(Setup(workload, levers)) is not None


def _all_reduce(workload: Workload, levers: Levers, micro_batch: int, room: Room) -> Footprint:
    return all_reduce_footprint(
        Setup(workload, levers).step(micro_batch), device_kind=room.device_kind
    )


def least_budget_bytes(
    workload: Workload, levers: Levers, micro_batch: int, device_kind: str, *, replicas: int = 1
) -> int:
    """The smallest budget, in whole MiB, in which a step fits.

    A little more memory may be in pieces that are too small again: below this nothing fits, and
    from here to 10 % above it not every budget has been looked at.
    """

    def room(mebibytes: int) -> Room:
        return Room(device_kind, mebibytes * MIB_BYTES, replicas=replicas)

    low = least_peak_bytes(workload, levers, micro_batch, room(1)) // MIB_BYTES - 1
    step = 1
    while not fits(workload, levers, micro_batch, room(low + step)):
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        if fits(workload, levers, micro_batch, room(middle)):
            high = middle
        else:
            low = middle
    return high * MIB_BYTES
