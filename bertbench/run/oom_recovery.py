"""A run whose training step runs out of memory continues with a step that needs less.

A prediction may be wrong, and another process may take memory of the same device. The run then
writes a step down into `run.json`: which training step failed, and which smaller one comes next.
After such an error the free memory is in pieces, so the run begins again in a fresh process. That
process plans again, and so does every later run of the same command. If the plan needs as much as
a step that failed under the same budget, the recorded smaller step is taken instead. The failure
also goes into the user's ledger, so that plans for other folders learn from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NoReturn

from bertbench.core.errors import OutOfMemoryError, SteppedDownError, WorkError
from bertbench.core.terminal import say
from bertbench.core.units import format_bytes
from bertbench.core.workload import MOST_BATCH, Setup, TrainingStep, Workload, levers_from_json
from bertbench.devices.device import Budget
from bertbench.devices.step_time import device_rates
from bertbench.memory.fit import Room, least_peak_bytes
from bertbench.plan.calibration import experience_of, note_out_of_memory
from bertbench.plan.planner import PlanEntry, describe_setting
from bertbench.run.choose_plan import plan_run
from bertbench.run.output.run_record import add_step_down, recorded_steps_down
from bertbench.run.settings import RunRequest, RunSettings
from finetune.errors import InputError
from finetune.storage.json_files import MOST_WHOLE, get_whole

_FIRST_REDUCTION = 0.01
_LARGEST_REDUCTION = 0.1
"""The part by which the predicted peak of the next step is to be smaller. After the first
out-of-memory any smaller peak will do. After the second it is the first reduction, which doubles
with each further one up to the largest. Where no step needs so much less, any smaller peak will
do again."""

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
        get_whole(values, "step", 0, MOST_WHOLE),
        get_whole(values, "budget_bytes", 1, MOST_WHOLE),
        _step_from_json(values.get("from"), workload),
        _step_from_json(values.get("to"), workload),
        str(values.get("message")),
    )


def _step_to_json(step: TrainingStep) -> dict[str, Any]:
    return {"micro_batch": step.micro_batch, **step.levers.to_json()}


def _step_from_json(values: Any, workload: Workload) -> TrainingStep:
    if not isinstance(values, dict):
        raise InputError("a step down has no settings")
    micro_batch = get_whole(values, "micro_batch", 1, MOST_BATCH)
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
    for down in _steps_down(settings, chosen.workload):
        if _applies(down, step, request):
            failed_bytes = _peak_bytes(down.failed, request.budget)
            if _peak_bytes(step, request.budget) >= failed_bytes:
                step = down.smaller
    if step != chosen:
        say(
            f"{_describe(chosen)}, or what needs no more, ran out of memory before: going on with "
            f"{_describe(step)}"
        )
    return step


def step_down(request: RunRequest, failed: TrainingStep, error: OutOfMemoryError) -> NoReturn:
    """Write into the run's record which smaller training step comes next.

    The user's ledger gets the step that failed.

    Args:
        request: what was asked for; names the output folder.
        failed: the training step that ran out of memory.
        error: what happened.

    Raises:
        SteppedDownError: always, unless
        WorkError: the user insists on the micro-batch, or no step needs less.
    """
    settings, budget = request.settings, request.budget
    note_out_of_memory(budget, failed.workload, failed.levers, failed.micro_batch, str(error))
    if settings.micro_batch is not None:
        raise WorkError(
            f"{error}; step {error.step} is saved: give a smaller --micro_batch, or none, and the "
            "same command goes on"
        ) from error
    entry = _next_entry(request, failed)
    if entry is None:
        raise WorkError(
            f"{error}, and no setting needs less; step {error.step} is saved: with more memory the "
            "same command goes on"
        ) from error
    smaller = Setup(failed.workload, entry.levers).step(entry.micro_batch)
    down = StepDown(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        budget.device.name,
        error.step,
        budget.budget_bytes,
        failed,
        smaller,
        str(error),
    )
    add_step_down(settings.output_dir, down.to_json())
    raise SteppedDownError(
        f"{error}; going on from step {error.step} with {_describe(smaller)}, predicted peak "
        f"{format_bytes(entry.footprint.peak_bytes)}",
        settings.output_dir,
    ) from error


def _next_entry(request: RunRequest, failed: TrainingStep) -> PlanEntry | None:
    """The fastest setting that needs less and is not known to fail; None if there is none."""
    settings, budget, workload = request.settings, request.budget, failed.workload
    # The update must stay the same one, so only the levers that do not change it are free.
    same_update = dataclasses.replace(
        request, settings=dataclasses.replace(settings, allowed=(failed.levers,))
    )
    # Trials that fitted had the device to themselves; those that failed may fail again.
    failures = experience_of(budget.device, workload, device_rates(budget.device)).failures()
    failed_bytes = _peak_bytes(failed, budget)
    earlier = [one for one in _steps_down(settings, workload) if _applies(one, failed, request)]
    reduction = 0.0
    if earlier:
        reduction = min(_FIRST_REDUCTION * 2 ** (len(earlier) - 1), _LARGEST_REDUCTION)
    for below_bytes in dict.fromkeys((int((1 - reduction) * failed_bytes), failed_bytes)):
        try:
            return plan_run(same_update, workload, failures, below_bytes).chosen
        except InputError:
            continue
    return None


def _steps_down(settings: RunSettings, workload: Workload) -> list[StepDown]:
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


def _applies(down: StepDown, step: TrainingStep, request: RunRequest) -> bool:
    """Whether a step down still holds: same device, budget and update, and the flags allow it."""
    settings, budget = request.settings, request.budget
    failed, smaller = down.failed.levers, down.smaller.levers
    return (
        budget.device.name == down.device
        and budget.budget_bytes <= _SAME_BUDGET * down.budget_bytes
        and step.levers.inexact == failed.inexact
        and settings.checkpointing in (None, smaller.checkpointing)
        and (not settings.insist_placement or smaller.placement == failed.placement)
    )


def _peak_bytes(step: TrainingStep, budget: Budget) -> int:
    """Predicted peak of a training step on one of the run's devices."""
    room = Room(budget.device.kind, budget.budget_bytes, replicas=budget.device.replicas)
    return least_peak_bytes(step.workload, step.levers, step.micro_batch, room)


def _describe(step: TrainingStep) -> str:
    return describe_setting(step.micro_batch, step.levers)
