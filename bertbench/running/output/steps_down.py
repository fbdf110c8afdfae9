"""The steps down in a run's record: training steps that ran out of memory, and what came next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bertbench.core.terminal import say
from bertbench.core.workload import MAX_BATCH, Setup, TrainingStep, Workload, levers_from_json
from bertbench.hardware.device import Budget
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import room_of
from bertbench.planning.planner import describe_setting
from bertbench.running.output.run_record import recorded_steps_down
from bertbench.running.settings import RunRequest, RunSettings
from finetune.errors import InputError
from finetune.storage.json_files import MAX_WHOLE, get_whole

_SAME_BUDGET = 1.05
"""With a budget larger by more than this factor, a step that failed is tried again."""


@dataclasses.dataclass(frozen=True)
class StepDown:
    """A training step that ran out of memory, and the smaller one that the run continues with.

    Attributes:
        at: date and time.
        device: name of the device.
        steps_done: optimizer steps that were done and saved.
        budget_bytes: what the allocator could use.
        failed: what ran out of memory.
        smaller: what comes next.
        message: the error.
    """

    at: str
    device: str
    steps_done: int
    budget_bytes: int
    failed: TrainingStep
    smaller: TrainingStep
    message: str

    def to_json(self) -> dict[str, Any]:
        """Values for `run.json`."""
        return {
            "at": self.at,
            "device": self.device,
            "step": self.steps_done,
            "budget_bytes": self.budget_bytes,
            "from": _step_to_json(self.failed),
            "to": _step_to_json(self.smaller),
            "message": self.message,
        }

    def applies_to(self, step: TrainingStep, request: RunRequest) -> bool:
        """Whether the failure counts for a training step that is chosen now.

        The device and the update must be the same, and the budget about as large. The flags must
        allow the smaller step.
        """
        settings, budget = request.settings, request.budget
        failed, smaller = self.failed.levers, self.smaller.levers
        return (
            budget.device.name == self.device
            and budget.budget_bytes <= _SAME_BUDGET * self.budget_bytes
            and step.levers.inexact == failed.inexact
            and (budget.device.kind == "tpu" or step.levers.xla == failed.xla)
            and settings.checkpointing in (None, smaller.checkpointing)
            and (not settings.insist_placement or smaller.placement == failed.placement)
        )


def step_down_from_json(values: Mapping[str, Any], workload: Workload) -> StepDown:
    """Read what `StepDown.to_json` wrote.

    Args:
        values: from `run.json`.
        workload: of the run.

    Raises:
        InputError: it is something else.
    """
    return StepDown(
        str(values.get("at")),
        str(values.get("device")),
        get_whole(values, "step", 0, MAX_WHOLE),
        get_whole(values, "budget_bytes", 1, MAX_WHOLE),
        _step_from_json(values.get("from"), workload),
        _step_from_json(values.get("to"), workload),
        str(values.get("message")),
    )


def _step_to_json(step: TrainingStep) -> dict[str, Any]:
    return {"micro_batch": step.micro_batch, **step.levers.to_json()}


def _step_from_json(values: Any, workload: Workload) -> TrainingStep:
    if not isinstance(values, dict):
        raise InputError("a step down has no settings")
    micro_batch = get_whole(values, "micro_batch", 1, MAX_BATCH)
    return Setup(workload, levers_from_json(values)).step(micro_batch)


def apply_steps_down(request: RunRequest, chosen: TrainingStep) -> TrainingStep:
    """Replace a training step that needs as much as one that has run out of memory in this run.

    Args:
        request: names the output folder, and the budget of now.
        chosen: the training step of the plan or the flags.

    Returns:
        The step to train with: the chosen one unless the run's record says that it does not fit.

    Raises:
        InputError: the folder's record cannot be read.
    """
    settings = request.settings
    if settings.overwrite or settings.micro_batch is not None:
        return chosen
    step = chosen
    for down in read_steps_down(settings, chosen.workload):
        if down.applies_to(step, request):
            failed_bytes = predicted_peak_bytes(down.failed, request.budget)
            if predicted_peak_bytes(step, request.budget) >= failed_bytes:
                step = down.smaller
    if step != chosen:
        before, now = map(describe_setting, (chosen, step))
        say(f"{before}, or what needs no more, ran out of memory before: continuing with {now}")
    return step


def read_steps_down(settings: RunSettings, workload: Workload) -> list[StepDown]:
    """The steps down of the run in the output folder, oldest first.

    Raises:
        InputError: the folder's record cannot be read.
    """
    try:
        recorded = recorded_steps_down(settings.output_dir)
        return [step_down_from_json(values, workload) for values in recorded]
    except InputError as error:
        raise InputError(
            f"not the record of a run ({error})",
            path=settings.output_dir,
            hint="choose another --output_dir, or --overwrite_output_dir to start again",
        ) from error


def predicted_peak_bytes(step: TrainingStep, budget: Budget) -> int:
    """Predicted peak of a training step on one of the run's devices."""
    return predict_memory(step.setup, room_of(budget)).peak_bytes(step.micro_batch)
