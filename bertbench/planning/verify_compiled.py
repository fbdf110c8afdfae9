"""Compile a plan's step for its product before it is believed, and plan anew if it is too large."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bertbench.compiling.compilation import FAILED, Compilation, Compile
from bertbench.compiling.target import CompileTarget
from bertbench.core.errors import WorkError
from bertbench.core.workload import TrainingStep
from bertbench.ledger.compilations import (
    compiled_question,
    find_compilations,
    record_compilation,
)
from bertbench.ledger.database import Ledger
from bertbench.memory.compiled import compiled_fits
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.planning.planner import Plan

_PLANS = 8


def verify_by_compiler(
    make: Callable[[], Plan],
    target: CompileTarget,
    ledger: Ledger,
    compile_: Compile,
    *,
    on_attempt: Callable[[Plan], None] = lambda plan: None,
) -> tuple[Plan, Compilation, list[Compilation]]:
    """Compile the step of a plan; plan anew with what was learned if it does not fit.

    Args:
        make: makes a plan with what the ledger knows by now.
        target: what is compiled for.
        ledger: gets the compilations, and those in it are not repeated.
        compile_: compiles, as `bertbench.compiling.compilation.compile_step` does.
        on_attempt: called before every compilation.

    Returns:
        The plan whose step fits, its compilation, and those of the plans that did not fit.

    Raises:
        InputError: nothing fits, or the compiler is not installed.
        WorkError: a compilation failed, or plan after plan was too large.
    """
    refuted: list[Compilation] = []
    for _ in range(_PLANS):
        plan = make()
        step = compiled_step(plan.chosen.step)
        question = compiled_question(target, step.setup)
        known = {one.micro_batch: one for one in find_compilations(ledger, question)}
        compilation = known.get(step.micro_batch)
        if compilation is None:
            on_attempt(plan)
            compilation = compile_(step, target)
            if compilation.outcome == FAILED:
                raise WorkError(f"the plan's step did not compile: {compilation.message}")
            record_compilation(ledger, question, compilation)
        memory = compilation.memory
        # The budget of a TPU may be less than what its compiler gives to a program.
        if memory is not None and compiled_fits(step, memory, target.kind, plan.budget_bytes):
            return _with_compiled_memory(plan, compilation), compilation, refuted
        refuted.append(compilation)
    raise WorkError(f"{_PLANS} plans were too large for {target.name} when they were compiled")


def _with_compiled_memory(plan: Plan, compilation: Compilation) -> Plan:
    """Let a plan say what its step needs by its compiler."""
    chosen, step = plan.chosen, compiled_step(plan.chosen.step)
    said = {step.setup: {step.micro_batch: compilation.memory}}
    room = Room(plan.device_kind, plan.budget_bytes, replicas=chosen.replicas, compiled=said)
    footprint = predict_memory(step.setup, room).footprint(step.micro_batch)
    return dataclasses.replace(plan, chosen=dataclasses.replace(chosen, footprint=footprint))


def compiled_step(step: TrainingStep) -> TrainingStep:
    """A step as XLA compiles it, which on a TPU it does unasked."""
    levers = dataclasses.replace(step.levers, xla=True)
    setup = dataclasses.replace(step.setup, levers=levers)
    return dataclasses.replace(step, setup=setup)
