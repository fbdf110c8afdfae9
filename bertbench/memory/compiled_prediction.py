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
from bertbench.memory.footprint import ACTIVATION_PARTS, Footprint, predict_footprint
from bertbench.memory.formula_prediction import FormulaPrediction, or_all_reduce
from bertbench.memory.room import Room
from finetune.spec.precisions import EXACT_PRECISION, compute_bytes

COMPILED_MARGINS = {"cpu": 0.9, "gpu": 0.05, "tpu": 1.2}
"""Part of the temporary bytes that a prediction adds where the compiler was not asked about the
very step, by kind of device; on a TPU of activations, as gradients are no larger there.
They make up for the largest errors that were measured in December 2026, of the temporary bytes that
the compiler named against those of the formula:

| compiled for | settings | more than the formula |
| --- | --- | --- |
| Titan X, T4, A100, H100 | 128, BERT-Small and BERT-Base | -19 % to +3 % |
| A100, `bf16` | 8, BERT-Base | -8 % to +4 % |
| several GPUs, `bf16` | 7, BERT-Mini to BERT-Base, random plans | up to +16 %, with `full` |
| a CPU | 39, BERT-Tiny to BERT-Small | -12 % to +90 % |
| a core of a TPU v2 | 11, BERT-Small | -22 % to +118 % |

On a CPU XLA takes barriers out before it looks for what is computed twice. On a TPU tensors are
padded.
"""

_HALF_MARGIN = 0.2
"""The same for a GPU with 16-bit activations."""

_TPU_PROGRAM_BYTES = 60_000_000
"""Bytes of the program on a TPU for a layer of the model, where none was compiled. 21 to 90 MB were
measured (BERT-Tiny and BERT-Small on a TPU v2), the more the larger the micro-batch."""

_REACH = 0.25
"""How far away a step that was compiled corrects the formula, as a part of its micro-batch."""

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
        guess: predict what is most likely. There is no margin then, and a step that was compiled
            corrects the formula however far away it is.
    """

    source: ClassVar[str] = "compiled"

    setup: Setup
    room: Room
    guess: bool = False

    @property
    def margin(self) -> float:
        """See `MemoryPrediction`; it is in the peak already, as it is one of a part of it."""
        return 0.0

    @property
    def usable_bytes(self) -> int:
        """See `MemoryPrediction`."""
        return self.room.usable_bytes()

    def peak_bytes(self, micro_batch: int) -> int:
        """See `MemoryPrediction`."""
        return self._memory(micro_batch).device_bytes

    def footprint(self, micro_batch: int, *, replayed: bool = True) -> Footprint:
        """See `MemoryPrediction`; the parts are the formula's, as large together as predicted."""
        footprint, memory = self._by_formula(micro_batch), self._memory(micro_batch)
        parts = _scaled(footprint.parts, _ARGUMENTS, memory.argument_bytes)
        # Of what is temporary, that which follows from the variables alone is known.
        activations = [name for name in footprint.parts if name in ACTIVATION_PARTS]
        state = [n for n in footprint.parts if n not in (*_ARGUMENTS, *activations)]
        state_bytes = memory.temporary_bytes
        if activations:
            state_bytes = min(state_bytes, _sum_of(footprint.parts, state))
        parts |= _scaled(footprint.parts, state, state_bytes)
        parts |= _scaled(footprint.parts, activations, memory.temporary_bytes - state_bytes)
        others = {"program": memory.program_bytes, "results": memory.output_bytes}
        parts |= {name: size for name, size in others.items() if size}
        return dataclasses.replace(footprint, parts=parts)

    def fits(self, micro_batch: int) -> bool:
        """See `MemoryPrediction`."""
        if any(memory is None and micro_batch >= batch for batch, memory in self._own.items()):
            return False  # The compiler has refused it, or a smaller one.
        step, kind = self.setup.step(micro_batch), self.room.device_kind
        return compiled_fits(step, self._memory(micro_batch), kind, self.room.usable_bytes())

    def max_micro_batch(self, at_most: int = sys.maxsize, fitting: int = 0) -> int:
        """See `MemoryPrediction`."""
        return largest_passing(self.fits, fitting, at_most)

    def expected_micro_batch(self, at_most: int) -> int:
        """The largest micro-batch that fits as far as a search can guess."""
        return dataclasses.replace(self, guess=True).max_micro_batch(at_most)

    @property
    def _added(self) -> float:
        """Part of the temporary bytes that is added."""
        added = COMPILED_MARGINS[self.room.device_kind]
        half = compute_bytes(self.setup.levers.precision) < compute_bytes(EXACT_PRECISION)
        return max(added, _HALF_MARGIN) if half else added

    def _by_formula(self, micro_batch: int) -> Footprint:
        """The parts by the formula alone, on a TPU with the margin of activations."""
        step, factor = self.setup.step(micro_batch), 1.0
        if self.room.device_kind == "tpu" and not self.guess:
            # Before the highest moment is chosen: another one may have more activations.
            factor += self._added
        footprint = predict_footprint(step, activation_factor=factor)
        return or_all_reduce(footprint, step, self.room)

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
        footprint = self._by_formula(micro_batch)
        arguments = _sum_of(footprint.parts, _ARGUMENTS)
        temporary = footprint.peak_bytes - arguments
        if self._near is not None:
            temporary += self._near.correction(micro_batch, math.inf if self.guess else _REACH)
        if not self.guess:
            temporary += 0 if self.room.device_kind == "tpu" else int(temporary * self._added)
            # A larger step needs no less, and a smaller one no more.
            said = [(b, m.temporary_bytes) for b, m in self._own.items() if m is not None]
            most = min((size for batch, size in said if batch > micro_batch), default=temporary)
            least = max((size for batch, size in said if batch < micro_batch), default=0)
            temporary = max(min(temporary, most), least)
        return CompiledMemory(arguments, 0, max(temporary, 0), self._program_bytes())

    def _program_bytes(self) -> int:
        """Bytes of the program on a TPU: those of the largest one that was compiled, or a guess."""
        known = [
            memory.program_bytes
            for other in self._like
            for memory in self.room.compiled[other].values()
            if memory is not None
        ]
        if self.room.device_kind != "tpu":
            return 0
        layers = self.setup.workload.config.num_hidden_layers
        return max(known, default=layers * _TPU_PROGRAM_BYTES)


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
            reach: how far away a point is believed: as a part of its micro-batch, or for two of
                them of their difference.
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


def _sum_of(parts: Mapping[str, int], names: Sequence[str]) -> int:
    return sum(parts.get(name, 0) for name in names)


def _scaled(parts: Mapping[str, int], names: Sequence[str], total_bytes: int) -> dict[str, int]:
    """Scale some parts so that they are `total_bytes` together, to the byte."""
    left_bytes, left, scaled = total_bytes, sum(parts[name] for name in names), {}
    for name in names:
        scaled[name] = left_bytes * parts[name] // left if left else left_bytes
        left_bytes, left = left_bytes - scaled[name], left - parts[name]
    return scaled
