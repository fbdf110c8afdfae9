"""The training step of a run: from a plan file, from the flags, or from a plan made now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bertbench.core.terminal import say
from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers, Setup, TrainingStep, Workload, check_layers
from bertbench.hardware.accelerators import check_levers
from bertbench.hardware.device import Device
from bertbench.planning.calibration import Calibration, read_calibration
from bertbench.planning.plan_file import read_plan
from bertbench.planning.planner import Plan, describe_planned_step, make_plan
from bertbench.planning.requests import PlanRequest, attached_device
from bertbench.running.output.steps_down import apply_steps_down
from bertbench.running.settings import RunRequest, RunSettings
from finetune.errors import InputError
from finetune.spec.checkpointing import Checkpointing
from finetune.spec.optimizers import EXACT_OPTIMIZER
from finetune.spec.precisions import EXACT_PRECISION


def choose_step(request: RunRequest, workload: Workload) -> TrainingStep:
    """Take the training step from the plan file, from the flags, or from a plan made now.

    If the run has already run out of memory with a step that needs as much or less, the step is
    replaced by the smaller one that the run continued with.

    Args:
        request: what is asked for, and the device.
        workload: what is trained.

    Raises:
        InputError: the device or the model cannot train with what the flags allow, the plan file
            is unusable or for another batch, nothing fits, or the run's record cannot be read.
    """
    return apply_steps_down(request, _first_choice(request, workload))


def _first_choice(request: RunRequest, workload: Workload) -> TrainingStep:
    """The training step of the plan file, of the flags, or of a plan made now."""
    settings = request.settings
    for levers in settings.allowed:
        _check_levers(request, levers)
    if settings.checkpointing is not None:
        check_layers(workload, settings.checkpointing)
    if settings.plan_file is not None:
        return _planned_step(request, workload, settings.plan_file)
    if settings.micro_batch is not None:
        return _insisted_step(request, workload, settings.micro_batch)
    chosen = plan_run(request, workload).chosen
    say(
        f"plan: {describe_planned_step(chosen)}, predicted peak "
        f"{format_bytes(chosen.footprint.peak_bytes)} of "
        f"{format_bytes(request.budget.budget_bytes)}"
    )
    return chosen.step


def plan_run(
    request: RunRequest,
    workload: Workload,
    calibration: Calibration | None = None,
    below_bytes: int | None = None,
) -> Plan:
    """Plan what the settings leave open.

    Args:
        request: what is asked for, and the device.
        workload: what is trained.
        calibration: of the workload on the device; None asks the user's ledger.
        below_bytes: see `bertbench.planning.planner.make_plan`.

    Raises:
        InputError: nothing fits.
    """
    settings, device = request.settings, attached_device(request.budget)
    if calibration is None:
        calibration = read_calibration(request.budget.device, workload, device.rates)
    wanted = PlanRequest(
        settings.train_batch_size,
        None if settings.checkpointing is None else [settings.checkpointing],
        settings.allowed,
        host_if_needed=not settings.insist_placement,
    )
    return make_plan(wanted, workload, device, calibration, below_bytes=below_bytes)


def _planned_step(request: RunRequest, workload: Workload, plan_file: Path) -> TrainingStep:
    """The training step of a plan file, which must be for this batch and this device.

    Raises:
        InputError: it is for another one, or is not what the flags insist on.
    """
    settings, device = request.settings, request.budget.device
    planned = read_plan(plan_file)
    if settings.micro_batch is not None:
        raise InputError(
            "--micro_batch does not go with --plan, which has one", hint="leave one of them out"
        )
    batch = settings.train_batch_size
    if planned.target_batch != batch:
        raise InputError(
            f"the plan is for an effective batch of {planned.target_batch}, not {batch}",
            path=plan_file,
            hint=f"make one with `bertbench plan --target-batch {batch}`",
        )
    if planned.replicas != device.replicas:
        raise InputError(
            f"the plan is for {planned.replicas} replicas, not {device.replicas}",
            path=plan_file,
            hint=f"give --num_tpu_cores {planned.replicas}, or another plan"
            if device.tpu is not None
            else f"name {planned.replicas} GPUs, as in --device gpu:0,gpu:1, or give "
            "--use_tpu, or another plan",
        )
    _check_levers(request, planned.levers)
    _check_insisted(settings, planned.levers, device)
    return Setup(workload, planned.levers).step(planned.micro_batch)


def _insisted_step(request: RunRequest, workload: Workload, micro_batch: int) -> TrainingStep:
    """The training step with the micro-batch of the flags, and as many of them as needed."""
    settings = request.settings
    share = -(-settings.train_batch_size // request.budget.device.replicas)
    micro_batch = min(micro_batch, share)
    levers = dataclasses.replace(
        settings.allowed[0],
        checkpointing=settings.checkpointing or Checkpointing(),
        accumulation_steps=-(-share // micro_batch),
    )
    return Setup(workload, levers).step(micro_batch)


def _check_levers(request: RunRequest, levers: Levers) -> None:
    """Refuse levers that the device cannot be trained on with.

    Raises:
        InputError: says which, and why.
    """
    device = request.budget.device
    check_levers(device.kind, device.name, levers, replicas=device.replicas)


def _check_insisted(settings: RunSettings, planned: Levers, device: Device) -> None:
    """Refuse a plan file that does not have what the flags insist on.

    Raises:
        InputError: says what differs.
    """
    for name, default in (("precision", EXACT_PRECISION), ("optimizer", EXACT_OPTIMIZER)):
        wanted = {getattr(levers, name) for levers in settings.allowed}
        if wanted != {default} and getattr(planned, name) not in wanted:
            raise InputError(
                f"the plan has {name} {getattr(planned, name)}, the flags say {min(wanted)}",
                path=settings.plan_file,
                hint=f"make one with `bertbench plan --{name} {min(wanted)}`",
            )
    compiles = any(levers.xla for levers in settings.allowed) and device.kind != "tpu"
    if compiles and not planned.xla:
        raise InputError(
            "the plan is for TensorFlow's own kernels, the flags say --xla",
            path=settings.plan_file,
            hint="make one with `bertbench plan --xla`",
        )
    if settings.insist_placement and planned.placement != settings.allowed[0].placement:
        raise InputError(
            f"the plan has the optimizer's state on the {planned.placement}, the flags on the "
            f"{settings.allowed[0].placement}",
            path=settings.plan_file,
            hint="make one with `bertbench plan --placement`",
        )
