"""What is asked of the planner, as values: what a plan must reach, and for which device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers
from bertbench.hardware.accelerators import Accelerator, check_levers
from bertbench.hardware.device import Budget, Device
from bertbench.hardware.step_time import Rates, device_rates, gpu_rates
from bertbench.memory.compiled import CompiledSteps
from bertbench.memory.room import Room
from finetune.errors import InputError
from finetune.spec.checkpointing import Checkpointing


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What a plan must reach, and what it may choose from.

    Attributes:
        target_batch: effective batch, at least 1.
        policies: checkpointing policies to choose from; None for all.
        allowed: the other levers to choose from, which the device must support, see
            `check_request`; by default only levers that leave the update unchanged.
        host_if_needed: whether the optimizer's state of a single GPU may be kept in the host's
            memory if nothing fits otherwise.
        ledger_file: ledger with trials that plans for an attached device learn from; None takes
            the user's.
        alternatives: whether slower settings that need less memory are wanted as well. To find
            them takes longer than all else, because the memory of all settings is predicted.
    """

    target_batch: int
    policies: Sequence[Checkpointing] | None = None
    allowed: Sequence[Levers] = (Levers(),)
    host_if_needed: bool = True
    ledger_file: Path | None = None
    alternatives: bool = True


@dataclasses.dataclass(frozen=True)
class PlannedDevice:
    """A device that is planned for, attached or not.

    Attributes:
        name: name of the product.
        kind: `cpu`, `gpu` or `tpu`.
        budget_bytes: what the allocator of each replica may use.
        rates: speed of one replica, as predicted.
        replicas: devices that share the effective batch; each has its part of it, and the last may
            have padding.
        attached: the device of this machine; None for an accelerator of the catalogue.
        spare_bytes: part of the budget to leave free.
        accelerator: the product, if it is one of the catalogue that need not be attached.
        compiled: what the product's compiler has said of the workload that is planned.
    """

    name: str
    kind: str
    budget_bytes: int
    rates: Rates
    replicas: int = 1
    attached: Device | None = None
    spare_bytes: int = 0
    accelerator: Accelerator | None = None
    compiled: CompiledSteps = dataclasses.field(default_factory=dict, compare=False)

    @property
    def available_bytes(self) -> int:
        """What a plan may use of the budget."""
        return self.budget_bytes - self.spare_bytes

    def room(self, margin: float | None = None) -> Room:
        """What a training step has to fit in; see `bertbench.memory.room.Room`."""
        return Room(
            self.kind, self.budget_bytes, self.spare_bytes, self.replicas, margin, self.compiled
        )


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
        accelerator=accelerator,
    )


def check_request(request: PlanRequest, device: PlannedDevice) -> None:
    """Check that a device supports all levers that a plan may choose.

    Raises:
        InputError: the device does not support a lever.
    """
    for levers in request.allowed:
        check_levers(device.kind, device.name, levers, device.replicas)
