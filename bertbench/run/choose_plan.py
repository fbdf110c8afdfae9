"""The setting that a run trains with: from a plan file, from the flags, or from a plan made now."""

from __future__ import annotations

import dataclasses
import functools

from bertbench.core.terminal import say
from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers, Workload, check_layers
from bertbench.devices.accelerators import check_levers
from bertbench.devices.device import Budget
from bertbench.devices.step_time import device_rates
from bertbench.plan.calibration import Experience, experience_of
from bertbench.plan.plan_file import read_plan
from bertbench.plan.planner import Plan, describe_entry, make_plan
from bertbench.run.settings import RunSettings
from finetune.errors import InputError
from finetune.spec.checkpointing import Checkpointing
from finetune.spec.optimizers import EXACT_OPTIMIZER
from finetune.spec.precisions import EXACT_PRECISION


def choose_levers(workload: Workload, settings: RunSettings, budget: Budget) -> tuple[int, Levers]:
    """Take micro-batch and levers from the plan file, the flags, or a plan made now.

    Raises:
        InputError: the plan file is unusable or for another batch, or nothing fits.
    """
    replicas = budget.device.replicas
    check = functools.partial(
        check_levers, budget.device.kind, budget.device.name, replicas=replicas
    )
    for levers in settings.allowed:
        check(levers)
    if settings.checkpointing is not None:
        check_layers(workload, settings.checkpointing)
    if settings.plan_file is not None:
        planned = read_plan(settings.plan_file)
        if settings.micro_batch is not None:
            raise InputError(
                "--micro_batch does not go with --plan, which has one", hint="leave one of them out"
            )
        batch = settings.train_batch_size
        if planned.target_batch != batch:
            raise InputError(
                f"the plan is for an effective batch of {planned.target_batch}, not {batch}",
                path=settings.plan_file,
                hint=f"make one with `bertbench plan --target-batch {batch}`",
            )
        if planned.replicas != replicas:
            raise InputError(
                f"the plan is for {planned.replicas} replicas, not {replicas}",
                path=settings.plan_file,
                hint=f"give --num_tpu_cores {planned.replicas}, or another plan"
                if budget.device.tpu is not None
                else f"name {planned.replicas} GPUs, as in --device gpu:0,gpu:1, or give "
                "--use_tpu, or another plan",
            )
        check(planned.levers)
        _check_insisted(settings, planned.levers)
        return planned.micro_batch, planned.levers
    if settings.micro_batch is not None:
        share = -(-settings.train_batch_size // replicas)
        micro_batch = min(settings.micro_batch, share)
        steps = -(-share // micro_batch)
        policy = settings.checkpointing or Checkpointing()
        return micro_batch, dataclasses.replace(
            settings.allowed[0], checkpointing=policy, accumulation_steps=steps
        )
    plan = plan_run(workload, settings, budget)
    say(
        f"plan: {describe_entry(plan.chosen)}, predicted peak "
        f"{format_bytes(plan.chosen.footprint.peak_bytes)} of {format_bytes(budget.budget_bytes)}"
    )
    return plan.chosen.micro_batch, plan.chosen.levers


def plan_run(
    workload: Workload,
    settings: RunSettings,
    budget: Budget,
    experience: Experience | None = None,
    below_bytes: int | None = None,
) -> Plan:
    """Plan what the settings leave open.

    Args:
        workload: what is trained.
        settings: what is asked for.
        budget: the device.
        experience: of the workload on the device; None asks the user's ledger.
        below_bytes: see `bertbench.plan.planner.make_plan`.

    Raises:
        InputError: nothing fits.
    """
    rates = device_rates(budget.device)
    if experience is None:
        experience = experience_of(budget.device, workload, rates)
    return make_plan(
        workload,
        settings.train_batch_size,
        budget.budget_bytes,
        rates,
        device=budget.device.name,
        device_kind=budget.device.kind,
        policies=None if settings.checkpointing is None else [settings.checkpointing],
        allowed=settings.allowed,
        host_if_needed=not settings.insist_placement,
        replicas=budget.device.replicas,
        experience=experience,
        below_bytes=below_bytes,
    )


def _check_insisted(settings: RunSettings, planned: Levers) -> None:
    """See whether a plan file has what the flags insist on.

    Raises:
        InputError: it has not.
    """
    for name, default in (("precision", EXACT_PRECISION), ("optimizer", EXACT_OPTIMIZER)):
        wanted = {getattr(levers, name) for levers in settings.allowed}
        if wanted != {default} and getattr(planned, name) not in wanted:
            raise InputError(
                f"the plan has {name} {getattr(planned, name)}, the flags say {min(wanted)}",
                path=settings.plan_file,
                hint=f"make one with `bertbench plan --{name} {min(wanted)}`",
            )
    if settings.insist_placement and planned.placement != settings.allowed[0].placement:
        raise InputError(
            f"the plan has the optimizer's state on the {planned.placement}, the flags on the "
            f"{settings.allowed[0].placement}",
            path=settings.plan_file,
            hint="make one with `bertbench plan --placement`",
        )
