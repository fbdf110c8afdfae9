"""A run that runs out of memory goes on with a plan that needs less.

A prediction may be wrong, and another process may take memory of the same device. The run then
notes in `run.json` what did not fit and what is tried next, and begins again in a fresh process,
because memory is in pieces after such an error. Whatever chooses a setting again under the same
budget that needs as much, there or in a later run of the same command, is led to the next one. The
user's ledger learns of it too, so that plans for other folders do not choose it either.

This module does not import TensorFlow.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from bertbench.core.errors import OutOfMemoryError, SteppedDownError, WorkError
from bertbench.core.terminal import say
from bertbench.core.units import format_bytes
from bertbench.core.workload import MOST_BATCH, Levers, Workload, levers_from_json
from bertbench.devices.device import Budget
from bertbench.devices.step_time import device_rates
from bertbench.memory.fit import Room, least_peak_bytes
from bertbench.plan.calibration import experience_of, note_out_of_memory
from bertbench.plan.planner import PlanEntry, describe_setting
from bertbench.run.choose_plan import plan_run
from bertbench.run.output.run_folder import add_step_down, recorded_steps_down
from bertbench.run.settings import RunSettings
from finetune.errors import InputError
from finetune.storage.json_files import MOST_WHOLE, get_whole

_LESS_EACH_TIME = 0.01
_MOST_LESS = 0.1
"""How much less, as a part, the next plan is predicted to need: after the first out-of-memory any
bit less, after the second this much, after each one more twice as much up to the most. Where
nothing needs so much less, any bit less again."""

_SAME_BUDGET = 1.05
"""A budget larger by more than this is worth another try of what did not fit."""


@dataclasses.dataclass(frozen=True)
class StepDown:
    """One setting that did not fit, and the one after it.

    Attributes:
        at: date and time.
        device: name of the device.
        step: optimizer steps that were done and saved.
        budget_bytes: what the allocator could use.
        micro_batch: of what did not fit.
        levers: likewise.
        next_micro_batch: of what comes after it.
        next_levers: likewise.
        message: what happened.
    """

    at: str
    device: str
    step: int
    budget_bytes: int
    micro_batch: int
    levers: Levers
    next_micro_batch: int
    next_levers: Levers
    message: str

    def to_json(self) -> dict[str, Any]:
        """Values for `run.json`."""
        return {
            "at": self.at,
            "device": self.device,
            "step": self.step,
            "budget_bytes": self.budget_bytes,
            "from": {"micro_batch": self.micro_batch, **self.levers.to_json()},
            "to": {"micro_batch": self.next_micro_batch, **self.next_levers.to_json()},
            "message": self.message,
        }


def step_down_from_json(values: dict[str, Any]) -> StepDown:
    """Read what `StepDown.to_json` wrote.

    Raises:
        InputError: it is something else.
    """
    before, after = (values.get(name) for name in ("from", "to"))
    if not isinstance(before, dict) or not isinstance(after, dict):
        raise InputError("a step down has no settings")
    return StepDown(
        str(values.get("at")),
        str(values.get("device")),
        get_whole(values, "step", 0, MOST_WHOLE),
        get_whole(values, "budget_bytes", 1, MOST_WHOLE),
        get_whole(before, "micro_batch", 1, MOST_BATCH),
        levers_from_json(before),
        get_whole(after, "micro_batch", 1, MOST_BATCH),
        levers_from_json(after),
        str(values.get("message")),
    )


def follow(
    workload: Workload, settings: RunSettings, budget: Budget, micro_batch: int, levers: Levers
) -> tuple[int, Levers]:
    """Replace a setting that needs as much as one that the run could not go on with.

    Args:
        workload: what is trained.
        settings: name the folder.
        budget: of now.
        micro_batch: of what has been chosen.
        levers: likewise.

    Returns:
        Micro-batch and levers to go on with: those chosen unless they are known not to fit.

    Raises:
        InputError: the folder's record cannot be read.
    """
    if settings.overwrite or settings.micro_batch is not None:
        return micro_batch, levers
    chosen = micro_batch, levers
    room = _room(budget)
    for down in _steps_down(settings):
        if _applies(down, levers, settings, budget):
            failed_bytes = least_peak_bytes(workload, down.levers, down.micro_batch, room)
            if least_peak_bytes(workload, levers, micro_batch, room) >= failed_bytes:
                micro_batch, levers = down.next_micro_batch, down.next_levers
    if (micro_batch, levers) != chosen:
        say(
            f"{describe_setting(*chosen)}, or what needs no more, ran out of memory before: going "
            f"on with {describe_setting(micro_batch, levers)}"
        )
    return micro_batch, levers


def _steps_down(settings: RunSettings) -> list[StepDown]:
    """What the run in the output folder could not go on with, in the order of time.

    Raises:
        InputError: the folder's record cannot be read.
    """
    try:
        return [step_down_from_json(one) for one in recorded_steps_down(settings.output_dir)]
    except InputError as error:
        raise InputError(
            f"not the record of a run ({error})",
            path=settings.output_dir,
            hint="choose another --output_dir, or --overwrite_output_dir to start again",
        ) from error


def _applies(down: StepDown, levers: Levers, settings: RunSettings, budget: Budget) -> bool:
    """Whether nothing has changed that is worth another try, or that forbids what came next."""
    return (
        budget.device.name == down.device
        and budget.budget_bytes <= _SAME_BUDGET * down.budget_bytes
        and levers.inexact == down.levers.inexact
        and settings.checkpointing in (None, down.next_levers.checkpointing)
        and (not settings.insist_placement or down.next_levers.placement == down.levers.placement)
    )


def step_down(
    workload: Workload,
    settings: RunSettings,
    budget: Budget,
    micro_batch: int,
    levers: Levers,
    error: OutOfMemoryError,
) -> NoReturn:
    """Note in the run's record what is tried next, and in the user's ledger what did not fit.

    Args:
        workload: what is trained.
        settings: what was asked for; name the folder.
        budget: what the run had.
        micro_batch: of what did not fit.
        levers: likewise.
        error: what happened.

    Raises:
        SteppedDownError: always, unless
        WorkError: the user insists on the micro-batch, or nothing needs less.
    """
    note_out_of_memory(budget, workload, levers, micro_batch, str(error))
    if settings.micro_batch is not None:
        raise WorkError(
            f"{error}; step {error.step} is saved: give a smaller --micro_batch, or none, and the "
            "same command goes on"
        ) from error
    after = _next_plan(workload, settings, budget, micro_batch, levers)
    if after is None:
        raise WorkError(
            f"{error}, and no setting needs less; step {error.step} is saved: with more memory the "
            "same command goes on"
        ) from error
    down = StepDown(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        budget.device.name,
        error.step,
        budget.budget_bytes,
        micro_batch,
        levers,
        after.micro_batch,
        after.levers,
        str(error),
    )
    add_step_down(settings, down.to_json())
    raise SteppedDownError(
        f"{error}; going on from step {error.step} with "
        f"{describe_setting(after.micro_batch, after.levers)}, predicted peak "
        f"{format_bytes(after.footprint.peak_bytes)}",
        Path(settings.output_dir),
    ) from error


def _next_plan(
    workload: Workload, settings: RunSettings, budget: Budget, micro_batch: int, levers: Levers
) -> PlanEntry | None:
    """The fastest setting that needs less and is not known to fail; None if there is none."""
    # The update must stay the same one, so only the levers that do not change it are free.
    kept = dataclasses.replace(settings, allowed=(levers,))
    # What has fitted in a trial was on a device that nobody else used; what has failed may again.
    known = experience_of(budget.device, workload, device_rates(budget.device)).failures()
    failed_bytes = least_peak_bytes(workload, levers, micro_batch, _room(budget))
    before = [one for one in _steps_down(settings) if _applies(one, levers, settings, budget)]
    less = min(_LESS_EACH_TIME * 2 ** (len(before) - 1), _MOST_LESS) if before else 0.0
    for most_bytes in dict.fromkeys((int((1 - less) * failed_bytes), failed_bytes)):
        try:
            return plan_run(workload, kept, budget, known, below_bytes=most_bytes).chosen
        except InputError:
            continue
    return None


def _room(budget: Budget) -> Room:
    return Room(budget.device.kind, budget.budget_bytes, replicas=budget.device.replicas)
