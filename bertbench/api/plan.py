"""`bertbench.plan()`: the fastest setting that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertbench.api.inputs import find_planned_device, find_workload
from bertbench.api.results import Result
from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers, Workload
from bertbench.hardware.device import Budget
from bertbench.planning.planner import Plan, describe_planned_step
from bertbench.planning.requests import PlanRequest
from bertbench.planning.workload_plans import plan_workload
from finetune.errors import InputError


@dataclasses.dataclass(frozen=True)
class PlanResult(Result):
    """A plan; its rows are the chosen setting and the slower ones that need less memory.

    Attributes:
        plan: the setting that was chosen, alternatives, and what was rejected.
    """

    plan: Plan

    def describe(self) -> str:
        """Describe the result in one line."""
        plan, chosen = self.plan, self.plan.chosen
        return (
            f"{plan.workload.model}, sequence length {plan.workload.seq_len}, effective batch "
            f"{plan.target_batch}, in {format_bytes(plan.budget_bytes)} on {plan.device}: "
            f"{describe_planned_step(chosen)}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each setting, the fastest first."""
        return [
            {
                "chosen": planned is self.plan.chosen,
                "micro_batch": planned.step.micro_batch,
                **planned.step.levers.to_json(),
                "predicted_peak_bytes": planned.footprint.peak_bytes,
                "predicted_step_seconds": planned.predicted_step_seconds,
            }
            for planned in (self.plan.chosen, *self.plan.alternatives)
        ]


def plan(
    model: str | Workload,
    seq_len: int | None = None,
    target_batch: int = 32,
    *,
    on: str | Budget = "auto",
    memory: str | int | None = None,
    allowed: Sequence[Levers] = (Levers(),),
    ledger: str | Path | None = None,
) -> PlanResult:
    """Choose the fastest micro-batch, accumulation and checkpointing that fit.

    Example:
        >>> import bertbench
        >>> found = bertbench.plan("bert-large", 384, 24, on="rtx-3060")
        >>> chosen = found.plan.chosen
        >>> chosen.step.micro_batch * chosen.step.levers.accumulation_steps >= 24
        True
        >>> chosen.footprint.peak_bytes < found.plan.budget_bytes
        True

    Args:
        model: a published model such as "bert-large", or a workload.
        seq_len: tokens of an example; not needed for a workload.
        target_batch: effective batch.
        on: a budget, an attached device ("auto", "gpu:0", "cpu"), or a product of the catalogue
            ("rtx-3060", "t4", "tpu-v3-8").
        memory: bytes that the allocator may use, or text such as "12GiB".
        allowed: levers beside micro-batch and checkpointing to choose from; by default those of
            the published recipe.
        ledger: record of trials that the plan learns from; None takes the user's.

    Returns:
        The plan.

    Raises:
        finetune.errors.InputError: nothing fits, or the model, the device or a lever is unknown.
    """
    if not allowed:
        raise InputError("no levers are allowed", hint="leave allowed out, or name one at least")
    ledger_file = None if ledger is None else Path(ledger)
    request = PlanRequest(target_batch, allowed=tuple(allowed), ledger_file=ledger_file)
    workload = find_workload(model, seq_len)
    return PlanResult(plan_workload(request, workload, find_planned_device(on, memory)))
