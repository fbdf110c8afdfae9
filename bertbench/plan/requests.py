"""What is asked of the planner, as values: workloads, a target, levers, and a device or many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers, Workload
from bertbench.devices.accelerators import ACCELERATORS, Accelerator, check_levers
from bertbench.devices.device import Budget, Device
from bertbench.devices.step_time import Rates, device_rates, gpu_rates
from bertbench.plan.calibration import experience_of
from bertbench.plan.min_memory import MinMemory, find_min_memory
from bertbench.plan.planner import Plan, make_plan
from finetune.errors import InputError
from finetune.spec.checkpointing import Checkpointing


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What a plan must reach, and what it may choose from.

    Attributes:
        target_batch: effective batch.
        policies: checkpointing policies to choose from; None for all.
        allowed: the other levers to choose from.
        offload_if_needed: whether the optimizer's state of a single GPU may be kept in the host's
            memory if nothing fits otherwise.
        ledger_file: ledger with trials that plans for an attached device learn from; None takes
            the user's.
    """

    target_batch: int
    policies: Sequence[Checkpointing] | None = None
    allowed: Sequence[Levers] = (Levers(),)
    offload_if_needed: bool = True
    ledger_file: Path | None = None


@dataclasses.dataclass(frozen=True)
class PlannedDevice:
    """A device that is planned for, attached or not.

    Attributes:
        name: name of the product.
        kind: `cpu`, `gpu` or `tpu`.
        budget_bytes: what the allocator of each replica may use.
        rates: speed of one replica, as predicted.
        replicas: devices that share the effective batch.
        attached: the device of this machine; None for an accelerator of the catalogue.
    """

    name: str
    kind: str
    budget_bytes: int
    rates: Rates
    replicas: int
    attached: Device | None = None


@dataclasses.dataclass(frozen=True)
class NoPlan:
    """A workload that nothing fits for.

    Attributes:
        workload: what was to be trained.
        why: the reason, in one line.
    """

    workload: Workload
    why: str

    def to_json(self) -> dict[str, Any]:
        """Values for JSON, under the keys of a plan file where there are any."""
        return {
            "model": self.workload.model,
            "seq_len": self.workload.seq_len,
            "chosen": None,
            "why": self.why,
        }


def attached_device(budget: Budget, replicas: int | None = None) -> PlannedDevice:
    """Plan for a device of this machine.

    Args:
        budget: the device and its budget.
        replicas: devices like it that share the batch; None for the device and its peers.

    Raises:
        InputError: the device has peers, and not this number of them.
    """
    device = budget.device
    if replicas is not None and device.peers and replicas != device.replicas:
        raise InputError(
            f"--device {device.label} names {device.replicas} GPUs, not {replicas}",
            hint="leave --replicas out",
        )
    return PlannedDevice(
        device.name,
        device.kind,
        budget.budget_bytes,
        device_rates(device),
        replicas or device.replicas,
        device,
    )


def catalogue_device(
    accelerator: Accelerator, budget_bytes: int | None = None, replicas: int | None = None
) -> PlannedDevice:
    """Plan for an accelerator of the catalogue.

    Args:
        accelerator: a row of the catalogue.
        budget_bytes: what the allocator may use; None takes all usable memory.
        replicas: GPUs that share the batch; None for one GPU, or the cores of a TPU.

    Raises:
        InputError: the budget is larger than the memory, or the number of a TPU's cores is named.
    """
    if budget_bytes is not None and budget_bytes > accelerator.memory_bytes:
        raise InputError(
            f"--memory {format_bytes(budget_bytes)} is more than the "
            f"{format_bytes(accelerator.memory_bytes)} of {accelerator.name}"
        )
    if replicas is not None and accelerator.kind == "tpu":
        raise InputError(
            f"{accelerator.name} has {accelerator.replicas} devices",
            hint="leave --replicas out",
        )
    return PlannedDevice(
        accelerator.name,
        accelerator.kind,
        accelerator.usable_bytes if budget_bytes is None else budget_bytes,
        gpu_rates(accelerator),
        replicas or accelerator.replicas,
    )


def check_request(request: PlanRequest, device: PlannedDevice) -> None:
    """Check that a device supports all levers that a plan may choose.

    Raises:
        InputError: the device does not support a lever.
    """
    for levers in request.allowed:
        check_levers(device.kind, device.name, levers, device.replicas)


def plan_workload(
    request: PlanRequest, workload: Workload, device: PlannedDevice, spare_bytes: int = 0
) -> Plan:
    """Plan one workload.

    Args:
        request: what the plan must reach, and what it may choose from.
        workload: what is trained.
        device: the device that it is trained on.
        spare_bytes: part of the budget to leave free.

    Raises:
        InputError: nothing fits, or the device does not support a lever.
    """
    check_request(request, device)
    experience = None
    if device.attached is not None:
        experience = experience_of(device.attached, workload, device.rates, request.ledger_file)
    return make_plan(
        workload,
        request.target_batch,
        device.budget_bytes,
        device.rates,
        device=device.name,
        device_kind=device.kind,
        policies=request.policies,
        allowed=request.allowed,
        host_if_needed=request.offload_if_needed,
        spare_bytes=spare_bytes,
        replicas=device.replicas,
        experience=experience,
    )


def plan_or_reason(
    request: PlanRequest, workload: Workload, device: PlannedDevice
) -> Plan | NoPlan:
    """Plan one workload of several; return the reason if that is not possible."""
    try:
        return plan_workload(request, workload, device)
    except InputError as error:
        return NoPlan(workload, str(error))


def plan_accelerators(
    request: PlanRequest,
    workload: Workload,
    budget_bytes: int | None = None,
    replicas: int | None = None,
) -> dict[Accelerator, Plan | NoPlan]:
    """Plan one workload for each accelerator of the catalogue, the smallest memory first.

    Args:
        request: what the plans must reach, and what they may choose from.
        workload: what is trained.
        budget_bytes: what the allocator may use; accelerators with less memory are left out. None
            takes all usable memory of each.
        replicas: GPUs that share the batch; TPUs are left out then. None for one GPU, or the cores
            of a TPU.
    """
    return {
        accelerator: plan_or_reason(
            request, workload, catalogue_device(accelerator, budget_bytes, replicas)
        )
        for accelerator in sorted(ACCELERATORS.values(), key=lambda a: a.memory_bytes)
        if (budget_bytes is None or budget_bytes <= accelerator.memory_bytes)
        and (replicas is None or accelerator.kind == "gpu")
    }


def min_memories(
    request: PlanRequest, workloads: Iterable[Workload], device_kind: str, replicas: int
) -> Iterator[MinMemory]:
    """Find the smallest memory in which each workload reaches the target.

    Args:
        request: what a plan must reach, and what it may choose from.
        workloads: what is trained.
        device_kind: `cpu`, `gpu` or `tpu`.
        replicas: devices that share the effective batch; the memory is that of each.

    Yields:
        The answer for each workload, as soon as it is found.
    """
    for workload in workloads:
        yield find_min_memory(
            workload,
            request.target_batch,
            request.policies,
            request.allowed,
            device_kind,
            replicas=replicas,
        )
