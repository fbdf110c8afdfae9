"""What `measure.py` measures: the cells and settings of each part, and what is known of them.

Nothing here starts a trial: a part is a list of timings, whose trials are in ledgers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NoReturn

from bertbench.core.published import PAPER_MODELS, PAPER_SEQ_LENS
from bertbench.core.units import GIB_BYTES, MIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.hardware.accelerators import check_levers
from bertbench.hardware.device import Budget, make_budget
from bertbench.ledger.database import Ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import find
from bertbench.memory.allocator.budget import empty_memory
from bertbench.memory.prediction import TracePrediction, predict_memory
from bertbench.memory.room import Room
from bertbench.memory.traced_footprint import traced_footprint
from bertbench.memory.traces.step_requests import trace_of
from bertbench.planning.planner import Plan, make_plan
from bertbench.planning.requests import PlanRequest, attached_device
from bertbench.probing.search import MAX_PROBED_BATCH, SearchResult, find_max_batch
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import POLICIES, Checkpointing

_NEAR_THE_LIMIT = 0.97
"""Part of a budget up to which a setting is timed: where the limit is, is what `cells` is for."""
_RIVALS = 3

Cell = tuple[Workload, Levers]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured.

    Attributes:
        memory_mib: budget of all parts but `plans`, unless another is asked for.
        cells: workloads of `cells`.
        policies: of `cells` and `speed`.
        timed: workloads of `speed`, `choice`, `peer` and `xla`.
        batches: micro-batches of `speed` and `peer`.
        precisions: of `speed`.
        compiled: policies of `xla`, and the micro-batch of each.
        planned: workload of `plans` and `placement`.
        targets: effective batches of `plans`; `placement` has the first, `choice` the last.
        budgets_bytes: of `plans`.
    """

    memory_mib: int
    cells: tuple[Workload, ...]
    policies: tuple[str, ...]
    timed: tuple[Workload, ...]
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    compiled: tuple[tuple[str, int], ...]
    planned: Workload
    targets: tuple[int, ...]
    budgets_bytes: tuple[int, ...]


FULL = Scale(
    memory_mib=11_430,  # What TensorFlow gets of the paper's GPU, a Titan X with 12 GiB.
    cells=tuple(published_workload(m, s) for m in PAPER_MODELS for s in PAPER_SEQ_LENS),
    policies=POLICIES,
    timed=(
        published_workload("bert-base", 128),
        published_workload("bert-base", 384),
        published_workload("bert-large", 384),
    ),
    batches=(1, 2, 4, 8, 16, 32),
    precisions=("float32", "tf32", "bf16"),
    compiled=(("none", 4), ("nested", 8)),
    planned=published_workload("bert-large", 384),
    targets=(24, 32),
    budgets_bytes=tuple(gib * GIB_BYTES for gib in (4, 6, 8, 12, 16)),
)
QUICK = Scale(
    memory_mib=128,
    cells=(published_workload("bert-tiny", 64), published_workload("bert-tiny", 128)),
    policies=("none", "nested"),
    timed=(published_workload("bert-tiny", 128),),
    batches=(1, 8),
    precisions=("float32", "bf16"),
    compiled=(("none", 8),),
    planned=published_workload("bert-mini", 128),
    targets=(12, 16),
    budgets_bytes=tuple(mib * MIB_BYTES for mib in (160, 192, 256)),
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Micro-batches of a setup to be timed under a budget, in one process."""

    setup: Setup
    budget: Budget
    batches: tuple[int, ...]

    def answers(self, ledger: Ledger) -> dict[int, Trial]:
        """The newest trial of each micro-batch that was tried."""
        trials = find(ledger, Question(self.budget, self.setup))
        return {trial.batch: trial for trial in trials if trial.batch in self.batches}

    def open_batches(self, ledger: Ledger) -> tuple[int, ...]:
        """Micro-batches that are still to be tried; none above one that ran out of memory."""
        answers = self.answers(ledger)
        if any(trial.outcome == "oom" for trial in answers.values()):
            return ()
        return tuple(batch for batch in self.batches if batch not in answers)


def cells_of(scale: Scale) -> list[Cell]:
    """Cells of the part `cells`."""
    return [(w, Levers(Checkpointing(policy))) for policy in scale.policies for w in scale.cells]


def limit_on_capped_cpu(budget: Budget, workload: Workload, levers: Levers) -> int | None:
    """Largest batch that a capped CPU with one region of memory would hold, by the step's trace.

    What is left is the device's own: other kernels with other workspaces.
    """
    setup = Setup(workload, levers)
    if trace_of(setup) is None:
        return None
    room = Room(budget.device.kind, budget.budget_bytes)
    return TracePrediction(setup, room).max_micro_batch(MAX_PROBED_BATCH)


def peak_on_capped_cpu(
    budget: Budget, workload: Workload, levers: Levers, batch: int
) -> int | None:
    """Peak bytes of a batch there, by the trace; None if there is none, or it does not fit."""
    footprint = traced_footprint(Setup(workload, levers).step(batch), empty_memory(budget))
    return None if footprint is None else footprint.peak_bytes


def settled(trials: Sequence[Trial], budget: Budget) -> SearchResult | None:
    """What trials prove; None while a probe would make more."""

    def more(batches: Sequence[int], fresh: bool) -> NoReturn:
        raise LookupError(batches)

    try:
        return find_max_batch(more, known=trials, budget_bytes=budget.budget_bytes)
    except LookupError:
        return None


def speed_timings(scale: Scale, budget: Budget) -> list[Timing]:
    """Every policy in every precision at rising micro-batches."""
    return _timings(
        scale,
        budget,
        [
            (Levers(Checkpointing(policy), precision=precision), scale.batches)
            for precision in scale.precisions
            for policy in scale.policies
        ],
    )


def xla_timings(scale: Scale, budget: Budget) -> list[Timing]:
    """Some of that compiled by XLA, in the first precision and in the last."""
    return _timings(
        scale,
        budget,
        [
            (Levers(Checkpointing(policy), precision=precision, xla=True), (batch,))
            for precision in (scale.precisions[0], scale.precisions[-1])
            for policy, batch in scale.compiled
        ],
    )


def _timings(
    scale: Scale, budget: Budget, settings: Sequence[tuple[Levers, tuple[int, ...]]]
) -> list[Timing]:
    return [
        timing
        for levers, batches in settings
        for workload in scale.timed
        if (timing := _timing(workload, levers, budget, batches)) is not None
    ]


def _timing(
    workload: Workload, levers: Levers, budget: Budget, batches: Sequence[int]
) -> Timing | None:
    """A timing of the micro-batches that the device is predicted to hold; None without any."""
    device = budget.device
    try:
        check_levers(device.kind, device.name, levers)
    except InputError:
        return None
    room = Room(device.kind, int(budget.budget_bytes * _NEAR_THE_LIMIT))
    setup = Setup(workload, levers)
    predicted = predict_memory(setup, room)
    held = [batch for batch in batches if predicted.peak_bytes(batch) <= room.budget_bytes]
    return Timing(setup, budget, tuple(held)) if held else None


def plan_for(workload: Workload, target: int, budget: Budget) -> Plan | None:
    """The plan that a user gets who has measured nothing; None if nothing fits."""
    try:
        return make_plan(PlanRequest(target), workload, attached_device(budget))
    except InputError:
        return None


def plan_timing(plan: Plan, budget: Budget) -> Timing:
    """The step of a plan."""
    return Timing(plan.chosen.step.setup, budget, (plan.chosen.step.micro_batch,))


def plans_of(scale: Scale, budget: Budget) -> list[tuple[int, Budget, Plan | None]]:
    """Target, budget and plan of each row of `plans`, but for budgets that the device has not."""
    rows = []
    for target in scale.targets:
        for budget_bytes in scale.budgets_bytes:
            if budget_bytes > budget.device.free_bytes:
                continue
            its_budget = make_budget(budget.device, budget_bytes)
            rows.append((target, its_budget, plan_for(scale.planned, target, its_budget)))
    return rows


def plan_timings(scale: Scale, budget: Budget) -> list[Timing]:
    """The steps of `plans`."""
    return [plan_timing(plan, its) for _, its, plan in plans_of(scale, budget) if plan]


def placement_timings(scale: Scale, budget: Budget) -> list[Timing]:
    """The plan of `placement` with the optimizer's state on the device, and on the host."""
    plan = plan_for(scale.planned, scale.targets[0], budget)
    if plan is None or budget.device.kind != "gpu":
        return []
    timing = plan_timing(plan, budget)
    return [
        dataclasses.replace(timing, setup=Setup(plan.workload, levers))
        for levers in (
            dataclasses.replace(plan.chosen.step.levers, placement=placement)
            for placement in ("device", "host")
        )
    ]


def choice_timings(
    scale: Scale, budget: Budget, workload: Workload, ledger: Ledger
) -> list[Timing]:
    """The planner's choice, and the settings that `speed` says are fastest; the choice first.

    All that was timed with one micro-batch is a guess at a step of several.
    """
    target = scale.targets[-1]
    plan = plan_for(workload, target, budget)
    if plan is None:
        return []
    guesses: list[tuple[float, Timing]] = []
    for timing in speed_timings(scale, budget):
        if timing.setup.workload != workload or not timing.setup.levers.exact:
            continue
        for batch, trial in timing.answers(ledger).items():
            if trial.step_seconds is not None and batch <= target:
                steps = math.ceil(target / batch)
                levers = dataclasses.replace(timing.setup.levers, accumulation_steps=steps)
                guesses.append(
                    (steps * trial.step_seconds, Timing(Setup(workload, levers), budget, (batch,)))
                )
    chosen = plan_timing(plan, budget)
    rivals = [rival for _, rival in sorted(guesses, key=lambda pair: pair[0]) if rival != chosen]
    return [chosen, *rivals[:_RIVALS]]
