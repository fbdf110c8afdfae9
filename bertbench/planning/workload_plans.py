"""Plans for one workload and device, or for many, with what the ledger tells of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from bertbench.core.workload import Workload
from bertbench.hardware.accelerators import ACCELERATORS, Accelerator
from bertbench.planning.calibration import Calibration, read_calibration
from bertbench.planning.compiled_evidence import with_compiled_steps
from bertbench.planning.min_memory import MinMemory, find_min_memory
from bertbench.planning.planner import Plan, make_plan
from bertbench.planning.requests import PlannedDevice, PlanRequest, catalogue_device, check_request
from finetune.errors import InputError


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


def plan_workload(request: PlanRequest, workload: Workload, device: PlannedDevice) -> Plan:
    """Plan one workload, with what trials on the device, or its compiler, have shown.

    Args:
        request: what the plan must reach, and what it may choose from.
        workload: what is trained.
        device: the device that it is trained on.

    Raises:
        InputError: nothing fits, or the device does not support a lever.
    """
    check_request(request, device)
    device = with_compiled_steps(device, workload, request)
    calibration = Calibration()
    if device.attached is not None:
        calibration = read_calibration(device.attached, workload, device.rates, request.ledger_file)
    return make_plan(request, workload, device, calibration)


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
        yield find_min_memory(request, workload, device_kind, replicas=replicas)
