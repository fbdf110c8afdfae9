"""The largest batch of a device that need not be here, by the word of its compiler."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from bertbench.compiling.compilation import FAILED, NO_ROOM, Compilation
from bertbench.compiling.target import CompileTarget
from bertbench.core.bisection import largest_passing
from bertbench.core.workload import MAX_BATCH, Setup, TrainingStep
from bertbench.ledger.compilations import (
    CompiledQuestion,
    find_compilations,
    record_compilation,
)
from bertbench.ledger.database import Ledger
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES
from bertbench.memory.allocator.budget import memory_of
from bertbench.memory.compiled import replay_compiled
from bertbench.memory.prediction import FormulaPrediction, Room
from bertbench.probing.search import next_guess

_APART = 0.05
"""Part of a batch by which two points must differ to give a slope: what a program needs rises in
steps."""

Compile = Callable[[TrainingStep, CompileTarget], Compilation]


@dataclasses.dataclass(frozen=True)
class CompiledCell:
    """A setup, and the largest batch of each device that fits, by its compiler.

    Attributes:
        setup: workload and levers.
        budget_bytes: what the program may use of each device.
        max_batch: the largest micro-batch that fits; 0 if 1 does not; None if a compilation failed.
        fits: compilation of that micro-batch.
        exceeds: compilation of one example more; None if all up to the bound that was asked for
            fit.
        compilations: all that were used, by rising micro-batch.
        compiled: how many of them were made now.
        seconds: time that it took now.
        message: why a compilation failed.
    """

    setup: Setup
    budget_bytes: int
    max_batch: int | None
    fits: Compilation | None
    exceeds: Compilation | None
    compilations: tuple[Compilation, ...]
    compiled: int
    seconds: float
    message: str = ""

    @property
    def evidence(self) -> str:
        """`compiled` with both sides of the limit; else `not the limit` or `failed`."""
        if self.max_batch is None:
            return FAILED
        return "compiled" if self.exceeds is not None else "not the limit"

    def to_json(self) -> dict[str, Any]:
        """Values under the keys of a file of `probe --gpu --json`."""
        workload = self.setup.workload
        return {
            "model": workload.model,
            "head": workload.head,
            "seq_len": workload.seq_len,
            "levers": self.setup.levers.to_json(),
            "max_batch": self.max_batch,
            "evidence": self.evidence,
            "fits": None if self.fits is None else self.fits.to_json(),
            "exceeds": None if self.exceeds is None else self.exceeds.to_json(),
            "compilations": [one.to_json() for one in self.compilations],
            "compiled": self.compiled,
            "seconds": round(self.seconds, 3),
            "message": self.message,
        }


def compiled_fits(
    step: TrainingStep, compilation: Compilation, kind: str, budget_bytes: int
) -> bool:
    """Whether a step that was compiled fits in a budget.

    A TPU's compiler lays the program out in the memory of the device, and refuses what has no room
    there: what compiled fits, and the budget says nothing more. On a GPU TensorFlow's allocator has
    to find room for the model and for one buffer, see
    `bertbench.memory.compiled.replay_compiled`.

    Args:
        step: the step.
        compilation: that did not fail.
        kind: of the device.
        budget_bytes: of each device; not used for a TPU.
    """
    memory = compilation.memory
    if compilation.outcome == NO_ROOM or memory is None:
        return False
    if kind == "tpu":
        return True
    return replay_compiled(step, memory, memory_of(kind, budget_bytes)).fits


def probe_compiled(
    ledger: Ledger,
    question: CompiledQuestion,
    budget_bytes: int,
    compile_: Compile,
    *,
    max_batch: int = MAX_BATCH,
    ignore_ledger: bool = False,
    on_attempt: Callable[[int], None] = lambda batch: None,
) -> CompiledCell:
    """Find the largest micro-batch that compiles to a program that fits, and one that does not.

    What a program needs is close to a line in the batch, so two compilations tell where the limit
    is, and two more show both sides of it. It is no line where XLA computes activations again to
    save memory, near the memory of a GPU: then it takes up to ten.

    Args:
        ledger: open; gets the compilations, and those in it are not repeated.
        question: target, workload and levers.
        budget_bytes: what the program may use of each device.
        compile_: compiles, as `bertbench.compiling.compilation.compile_step` does.
        max_batch: largest micro-batch of interest.
        ignore_ledger: compile again what the ledger knows.
        on_attempt: called with each micro-batch before it is compiled.
    """
    began, setup, kind = time.monotonic(), question.setup, question.target.kind
    known = {
        one.micro_batch: one
        for one in ([] if ignore_ledger else find_compilations(ledger, question))
        if one.micro_batch <= max_batch
    }
    fitting = {
        batch: compiled_fits(setup.step(batch), one, kind, budget_bytes)
        for batch, one in known.items()
    }
    before, guesses = len(known), list[str]()
    formula = FormulaPrediction(setup, Room(kind, budget_bytes))
    first = max(1, formula.max_micro_batch(max_batch))

    def answer(max_fitting: int | None, message: str = "") -> CompiledCell:
        return CompiledCell(
            setup,
            budget_bytes,
            max_fitting,
            known.get(max_fitting or 0),
            None if max_fitting is None else known.get(max_fitting + 1),
            tuple(one for _, one in sorted(known.items())),
            len(known) - before,
            time.monotonic() - began,
            message,
        )

    while True:
        high = min((batch for batch, fits in fitting.items() if not fits), default=None)
        low = max((b for b, fits in fitting.items() if fits and b < (high or b + 1)), default=0)
        if low + 1 == high or low == max_batch:
            return answer(low)
        estimate = _estimate(setup, kind, list(known.values()), budget_bytes) if known else first
        # The first two make the line, and tell nothing of how good it is.
        guess = next_guess(low, high, max_batch, estimate, guesses[2:])
        on_attempt(guess)
        compilation = compile_(setup.step(guess), question.target)
        if compilation.outcome == FAILED:
            return answer(None, compilation.message)
        record_compilation(ledger, question, compilation)
        known[guess] = compilation
        fitting[guess] = compiled_fits(setup.step(guess), compilation, kind, budget_bytes)
        guesses.append("fits" if fitting[guess] else "oom")


def _estimate(
    setup: Setup, kind: str, known: Sequence[Compilation], budget_bytes: int
) -> int | None:
    """Where the limit should be, by a line through what compiled; None if nothing tells.

    Args:
        setup: workload and levers.
        kind: of the device.
        known: compilations.
        budget_bytes: what a program may use.
    """
    points = [
        (
            one.micro_batch,
            one.memory.temporary_bytes,
            _missing_bytes(setup, one, kind, budget_bytes),
        )
        for one in known
        if one.memory is not None
    ]
    if not points:
        return None
    points.sort(key=lambda point: abs(point[2]))
    batch, temporary_bytes, missing_bytes = points[0]
    # What grows with the batch is at most what is temporary.
    rise = temporary_bytes / batch
    for other_batch, _, other_bytes in points[1:]:
        if abs(other_batch - batch) >= _APART * batch:
            rise = (missing_bytes - other_bytes) / (batch - other_batch)
            break
    if rise <= 0:
        return 2 * batch
    estimate = batch - missing_bytes / rise
    # A line is not believed far away.
    return int(min(max(estimate, batch / 4), 4 * batch))


@functools.lru_cache(maxsize=256)  # a search asks of all that is known before each guess
def _missing_bytes(setup: Setup, one: Compilation, kind: str, budget_bytes: int) -> int:
    """By how much a compiled step is too large for a budget; negative by how much it may grow."""
    memory = one.memory
    assert memory is not None
    if kind == "tpu":
        return memory.device_bytes - budget_bytes
    step, allocator = setup.step(one.micro_batch), memory_of(kind, budget_bytes)

    def fits(units: int) -> bool:
        larger = dataclasses.replace(memory, temporary_bytes=units * MIN_ALLOCATION_BYTES)
        return replay_compiled(step, larger, allocator).fits

    room = largest_passing(fits, 0, budget_bytes // MIN_ALLOCATION_BYTES) * MIN_ALLOCATION_BYTES
    return memory.temporary_bytes - room
