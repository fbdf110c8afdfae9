"""The largest batch of a device that need not be here, by the word of its compiler."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from bertbench.compiling.compilation import FAILED, Compilation, Compile
from bertbench.core.workload import MAX_BATCH, Setup
from bertbench.ledger.compilations import (
    CompiledQuestion,
    find_compilations,
    record_compilation,
)
from bertbench.ledger.database import Ledger
from bertbench.memory.compiled_prediction import CompiledPrediction
from bertbench.memory.room import Room
from bertbench.probing.search import next_guess

_SMALLER = 0.9
"""Part of a refused micro-batch to try next."""


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

    What a program needs is close to what the formula says (see
    `bertbench.memory.compiled_prediction`). So one compilation tells how far it is off, and two or
    three more show both sides of the limit.

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
        batch: one.fits_in(setup.step(batch), kind, budget_bytes) for batch, one in known.items()
    }
    before, guesses = len(known), list[str]()

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
        said = {setup: {batch: one.memory for batch, one in known.items()}}
        prediction = CompiledPrediction(setup, Room(kind, budget_bytes, compiled=said))
        estimate = max(1, prediction.expected_micro_batch(max_batch))
        if high is not None and not any(one.memory for one in known.values()):
            # A TPU's compiler has refused it, and nothing tells by how much it is too large.
            estimate = min(estimate, int(_SMALLER * high))
        # The first two correct the formula, and tell nothing of how good it is.
        guess = next_guess(low, high, max_batch, estimate, guesses[2:])
        on_attempt(guess)
        compilation = compile_(setup.step(guess), question.target)
        if compilation.outcome == FAILED:
            return answer(None, compilation.message)
        record_compilation(ledger, question, compilation)
        known[guess] = compilation
        fitting[guess] = compilation.fits_in(setup.step(guess), kind, budget_bytes)
        guesses.append("fits" if fitting[guess] else "oom")
