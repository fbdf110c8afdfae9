"""Try a plan before it is believed: one trial of it, and another plan if it does not fit."""

from __future__ import annotations

from collections.abc import Callable

from bertbench.core.errors import WorkError
from bertbench.core.workload import TrainingStep
from bertbench.hardware.device import Budget
from bertbench.ledger.database import Ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import record
from bertbench.planning.planner import Plan
from bertbench.trials.measure import TrialSettings, measure_step
from bertbench.trials.trial import Trial

_PLANS = 4
_STEP_SHARE = 0.02
"""Part of the budget that the next plan leaves free, on top of what the last one did."""


def verify_plan(
    make: Callable[[int], Plan],
    budget: Budget,
    ledger: Ledger,
    *,
    on_attempt: Callable[[Plan], None] = lambda plan: None,
    measure: Callable[[TrainingStep, Budget, TrialSettings], Trial] = measure_step,
) -> tuple[Plan, Trial, list[Trial]]:
    """Run two optimizer steps of a plan in a process of its own; plan smaller if they do not fit.

    Args:
        make: makes a plan that leaves a number of bytes of the budget free.
        budget: the device, and what may be used of it.
        ledger: gets the trials.
        on_attempt: called before every trial.
        measure: makes a trial.

    Returns:
        The plan that fits, its trial, and those of the plans that did not.

    Raises:
        InputError: no plan that leaves so much free fits.
        WorkError: a trial failed for another reason than memory, or plan after plan ran out.
    """
    spare_bytes = 0
    refuted: list[Trial] = []
    for _ in range(_PLANS):
        plan = make(spare_bytes)
        on_attempt(plan)
        chosen = plan.chosen
        trial = measure(chosen.step, budget, TrialSettings(steps=2))
        record(ledger, Question(budget, chosen.step.setup), trial)
        if trial.outcome == "fits":
            return plan, trial, refuted
        if trial.outcome == "failed":
            raise WorkError(f"the plan's trial failed: {trial.message}")
        refuted.append(trial)
        free_bytes = budget.budget_bytes - chosen.footprint.peak_bytes
        spare_bytes = max(spare_bytes, free_bytes) + int(_STEP_SHARE * budget.budget_bytes)
    raise WorkError(
        f"{_PLANS} plans ran out of memory, the last one leaving {free_bytes:,} bytes free: "
        "something else uses the device"
    )
