"""Predicts the memory of a step that XLA compiles, by what its compiler has said of others.

Where the compiler was asked about the very step, its word is taken. Else the formula of
`bertbench.memory.footprint` predicts what is temporary, corrected by what the compiler said of the
nearest micro-batches of the same workload and policy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar

from bertbench.core.bisection import largest_passing
from bertbench.core.workload import Setup
from bertbench.memory.compiled import CompiledMemory, compiled_fits
from bertbench.memory.footprint import Footprint
from bertbench.memory.formula_prediction import FormulaPrediction
from bertbench.memory.room import Room

COMPILED_MARGINS = {"cpu": 0.4, "gpu": 0.04, "tpu": 0.51}
"""Part of a prediction to add where the compiler was not asked about the very step, by kind of
device. They make up for the largest errors that were measured in December 2026:

| compiled for | settings | error of the formula |
| --- | --- | --- |
| Titan X, A100, H100 | 96, BERT-Small | -1.3 % to +6.4 % |
| A100 | 16, BERT-Base, half of them with `bf16` | -2.6 % to +2.7 % |
| a CPU | 39, BERT-Tiny to BERT-Small | -27.7 % to +5.6 % |
| a core of a TPU v2 | 10, BERT-Small | -33.5 % to +17.2 % |

On a CPU XLA takes barriers out before it looks for what is computed twice. On a TPU tensors are
padded, and the program, which is not counted here, is in its memory as well.
"""

_REACH = 0.25
"""How far away a step that was compiled corrects the formula, see `CompiledPrediction`."""

_APART = 0.05
"""Part of a micro-batch by which another must differ to give a slope, because what a program needs
rises in steps."""

_ARGUMENTS = ("weights", "optimizer_state", "inputs")
"""Parts of the formula that are a compiled step's arguments; the others are temporary."""


@dataclasses.dataclass(frozen=True)
class CompiledPrediction:
    """A `bertbench.memory.prediction.MemoryPrediction` by the word of a device's compiler.

    Attributes:
        setup: workload and levers.
        room: what the steps have to fit in, with what the compiler has said.
        reach: how far away a step that was compiled corrects the formula: a part of its micro-batch
            for one step, a multiple of their difference for two.
    """

    source: ClassVar[str] = "compiled"

    setup: Setup
    room: Room
    reach: float = _REACH

    @property
    def margin(self) -> float:
        """See `MemoryPrediction`; nothing is added to what the compiler said of the step itself."""
        return COMPILED_MARGINS[self.room.device_kind]

    @property
    def usable_bytes(self) -> int:
        """See `MemoryPrediction`."""
        return self.room.usable_bytes(self.margin)

    def peak_bytes(self, micro_batch: int) -> int:
        """See `MemoryPrediction`."""
        return self._memory(micro_batch).device_bytes

    def footprint(self, micro_batch: int, *, replayed: bool = True) -> Footprint:
        """See `MemoryPrediction`; the parts are the formula's, as large together as predicted."""
        footprint, memory = self._formula.footprint(micro_batch), self._memory(micro_batch)
        parts = _scaled(footprint.parts, _ARGUMENTS, memory.argument_bytes)
        temporary = [name for name in footprint.parts if name not in _ARGUMENTS]
        parts |= _scaled(footprint.parts, temporary, memory.temporary_bytes)
        others = {"program": memory.program_bytes, "results": memory.output_bytes}
        parts |= {name: size for name, size in others.items() if size}
        return dataclasses.replace(footprint, parts=parts)

    def fits(self, micro_batch: int) -> bool:
        """See `MemoryPrediction`."""
        return self._fits(micro_batch, self.margin)

    def max_micro_batch(self, at_most: int = sys.maxsize, fitting: int = 0) -> int:
        """See `MemoryPrediction`."""
        return largest_passing(self.fits, fitting, at_most)

    def expected_micro_batch(self, at_most: int) -> int:
        """The largest micro-batch that fits as far as a search can guess, without a margin."""
        guess = dataclasses.replace(self, reach=math.inf)
        return largest_passing(lambda batch: guess._fits(batch, 0.0), 0, at_most)

    def _fits(self, micro_batch: int, margin: float) -> bool:
        memory = self._memory(micro_batch)
        if micro_batch in self._own:
            if self._own[micro_batch] is None:
                return False
        else:
            larger_bytes = int(memory.temporary_bytes + margin * memory.device_bytes)
            memory = dataclasses.replace(memory, temporary_bytes=larger_bytes)
        step, kind = self.setup.step(micro_batch), self.room.device_kind
        return compiled_fits(step, memory, kind, self.room.usable_bytes())

    @property
    def _formula(self) -> FormulaPrediction:
        return FormulaPrediction(self.setup, self.room)

    @functools.cached_property
    def _own(self) -> dict[int, CompiledMemory | None]:
        """What the compiler has said of this setup, by micro-batch."""
        return dict(self.room.compiled.get(self.setup, {}))

    @functools.cached_property
    def _near(self) -> _Points | None:
        """What the compiler has said of this setup, or of the like one nearest to it."""
        steps = self.setup.levers.accumulation_steps
        for other in sorted(
            self._like, key=lambda other: abs(other.levers.accumulation_steps - steps)
        ):
            known = sorted(self.room.compiled[other].items())
            points = [(batch, memory.temporary_bytes) for batch, memory in known if memory]
            if points:
                return _Points(FormulaPrediction(other, self.room), points)
        return None

    @functools.cached_property
    def _like(self) -> list[Setup]:
        """Compiled setups that differ in nothing but the number of micro-batches."""
        wanted = _one_micro_batch(self.setup)
        return [other for other in self.room.compiled if _one_micro_batch(other) == wanted]

    def _memory(self, micro_batch: int) -> CompiledMemory:
        """What the compiler has said, or would be expected to say, of a micro-batch."""
        known = self._own.get(micro_batch)
        if known is not None:
            return known
        footprint = self._formula.footprint(micro_batch)
        arguments = sum(footprint.parts[name] for name in _ARGUMENTS)
        temporary = footprint.peak_bytes - arguments
        if self._near is not None:
            temporary += self._near.correction(micro_batch, self.reach)
        return CompiledMemory(arguments, 0, max(temporary, 0), self._program_bytes())

    def _program_bytes(self) -> int:
        """Bytes of the program on a TPU: those of the largest one that was compiled."""
        known = [
            memory.program_bytes
            for other in self._like
            for memory in self.room.compiled[other].values()
            if memory is not None
        ]
        return max(known, default=0)


@dataclasses.dataclass(frozen=True)
class _Points:
    """Temporary bytes of a setup's steps, as its compiler has said.

    Attributes:
        formula: of the setup.
        points: pairs of a micro-batch and its temporary bytes, the smallest micro-batch first.
    """

    formula: FormulaPrediction
    points: list[tuple[int, int]]

    def correction(self, micro_batch: int, reach: float) -> int:
        """By how much the temporary bytes are more than the formula says.

        Between two points, and near them, the bytes are on a line through both. Near a single point
        the formula is as wrong as for that point.

        Args:
            micro_batch: of the step that is predicted.
            reach: see `CompiledPrediction`.
        """
        formula_bytes = _temporary_bytes(self.formula, micro_batch)
        ordered = sorted(self.points, key=lambda point: abs(point[0] - micro_batch))
        nearest, nearest_bytes = ordered[0]
        for other, other_bytes in ordered[1:]:
            apart = abs(other - nearest)
            between = (micro_batch - nearest) * (micro_batch - other) <= 0
            near = between or abs(micro_batch - nearest) <= reach * apart
            if apart >= _APART * nearest and near:
                slope = (other_bytes - nearest_bytes) / (other - nearest)
                return int(nearest_bytes + slope * (micro_batch - nearest)) - formula_bytes
        if abs(micro_batch - nearest) > reach * nearest:
            return 0
        return nearest_bytes - _temporary_bytes(self.formula, nearest)


def _one_micro_batch(setup: Setup) -> Setup:
    levers = dataclasses.replace(setup.levers, accumulation_steps=1)
    return dataclasses.replace(setup, levers=levers)


def _temporary_bytes(formula: FormulaPrediction, micro_batch: int) -> int:
    parts = formula.footprint(micro_batch).parts
    return sum(size for name, size in parts.items() if name not in _ARGUMENTS)


def _scaled(parts: Mapping[str, int], names: Sequence[str], total_bytes: int) -> dict[str, int]:
    """Scale some parts so that they are `total_bytes` together, to the byte."""
    left_bytes, left, scaled = total_bytes, sum(parts[name] for name in names), {}
    for name in names:
        scaled[name] = left_bytes * parts[name] // left if left else left_bytes
        left_bytes, left = left_bytes - scaled[name], left - parts[name]
    return scaled
