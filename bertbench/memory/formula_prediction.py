"""Predicts the memory of a step by the formula alone, where nothing better is known."""

from __future__ import annotations

import dataclasses
import sys
from typing import ClassVar

from bertbench.core.bisection import largest_passing
from bertbench.core.workload import Setup, TrainingStep
from bertbench.memory.footprint import Footprint, all_reduce_footprint, predict_footprint
from bertbench.memory.room import Room


@dataclasses.dataclass(frozen=True)
class FormulaPrediction:
    """A `MemoryPrediction` by the formula.

    Attributes:
        setup: workload and levers.
        room: what the steps have to fit in.
        margin: part of a peak to add before it is compared with the budget.
    """

    source: ClassVar[str] = "formula"

    setup: Setup
    room: Room
    margin: float = 0.0

    @property
    def usable_bytes(self) -> int:
        """See `MemoryPrediction`."""
        return self.room.usable_bytes(self.margin)

    def peak_bytes(self, micro_batch: int) -> int:
        """See `MemoryPrediction`."""
        return self.footprint(micro_batch).peak_bytes

    def footprint(self, micro_batch: int, *, replayed: bool = True) -> Footprint:
        """See `MemoryPrediction`; the formula does not know what the allocator loses."""
        step = self.setup.step(micro_batch)
        footprint = predict_footprint(step)
        return or_all_reduce(footprint, step, self.room)

    def fits(self, micro_batch: int) -> bool:
        """See `MemoryPrediction`."""
        return self.peak_bytes(micro_batch) <= self.usable_bytes

    def max_micro_batch(self, at_most: int = sys.maxsize, fitting: int = 0) -> int:
        """See `MemoryPrediction`."""
        return largest_passing(self.fits, fitting, at_most)


def all_reduce(step: TrainingStep, room: Room) -> Footprint:
    """What is alive while the replicas of a step add up their gradients."""
    return all_reduce_footprint(step, device_kind=room.device_kind)


def or_all_reduce(footprint: Footprint, step: TrainingStep, room: Room) -> Footprint:
    """The larger of a step's footprint and, with several replicas, that of their sum."""
    if room.replicas == 1:
        return footprint
    return max(footprint, all_reduce(step, room), key=lambda one: one.peak_bytes)
