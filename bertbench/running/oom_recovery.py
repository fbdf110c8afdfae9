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
from datetime import datetime, timezone
from typing import NoReturn

from bertbench.core.errors import OutOfMemoryError, SteppedDownError, WorkError
from bertbench.core.units import format_bytes
from bertbench.core.workload import TrainingStep
from bertbench.hardware.step_time import device_rates
from bertbench.planning.calibration import note_out_of_memory, read_calibration
from bertbench.planning.planner import PlannedStep, describe_setting
from bertbench.running.choose_plan import plan_run
from bertbench.running.output.run_record import add_step_down
from bertbench.running.output.steps_down import StepDown, predicted_peak_bytes, read_steps_down
from bertbench.running.settings import RunRequest
from finetune.errors import InputError

_FIRST_REDUCTION = 0.01
_MAX_REDUCTION = 0.1
"""The part by which the predicted peak of the next step is to be smaller. After the first
out-of-memory any smaller peak will do. After the second it is the first reduction, which doubles
with each further one up to the largest. Where no step needs so much less, any smaller peak will
do again."""


def step_down(request: RunRequest, failed: TrainingStep, error: OutOfMemoryError) -> NoReturn:
    """Record which smaller training step comes next, and end with an error that says so.

    The user's ledger gets the training step that failed, unless the host's memory ran out.

    Args:
        request: what was asked for; names the output folder.
        failed: the training step that ran out of memory.
        error: what happened.

    Raises:
        SteppedDownError: the run can continue in a fresh process.
        WorkError: it cannot: the user insists on the micro-batch, or no training step needs less.
    """
    settings, budget = request.settings, request.budget
    if error.of_device:
        note_out_of_memory(failed, budget, str(error))
    if settings.micro_batch is not None:
        raise WorkError(
            f"{error}; step {error.step} is saved: give a smaller --micro_batch, or none, and the "
            "same command continues"
        ) from error
    planned = _next_planned_step(request, failed)
    if planned is None:
        raise WorkError(
            f"{error}, and no setting needs less; step {error.step} is saved: with more memory the "
            "same command continues"
        ) from error
    smaller = planned.step
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
        f"{error}; continuing from step {error.step} with "
        f"{describe_setting(smaller)}, predicted peak "
        f"{format_bytes(planned.footprint.peak_bytes)}",
        settings.output_dir,
    ) from error


def _next_planned_step(request: RunRequest, failed: TrainingStep) -> PlannedStep | None:
    """The fastest setting that needs less and is not known to fail; None if there is none."""
    settings, budget, workload = request.settings, request.budget, failed.workload
    # The update must stay the same one, so only the levers that do not change it are free.
    same_update = dataclasses.replace(
        request, settings=dataclasses.replace(settings, allowed=(failed.levers,))
    )
    # Trials that fitted had the device to themselves; those that failed may fail again.
    failures = read_calibration(budget.device, workload, device_rates(budget.device)).failures()
    failed_bytes = predicted_peak_bytes(failed, budget)
    recorded = read_steps_down(settings, workload)
    earlier = [down for down in recorded if down.applies_to(failed, request)]
    reduction = 0.0
    if earlier:
        reduction = min(_FIRST_REDUCTION * 2 ** (len(earlier) - 1), _MAX_REDUCTION)
    for below_bytes in dict.fromkeys((int((1 - reduction) * failed_bytes), failed_bytes)):
        try:
            return plan_run(same_update, workload, failures, below_bytes).chosen
        except InputError:
            continue
    return None
