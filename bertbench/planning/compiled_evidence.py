"""What a plan for a product knows from its compiler: the shipped table, and the user's ledger."""

from __future__ import annotations

import dataclasses

from bertbench.compiling.installed import has_compiler
from bertbench.compiling.shipped import shipped_steps
from bertbench.compiling.target import CompileTarget, compile_target
from bertbench.core.workload import Workload
from bertbench.ledger.compilations import read_compiled_steps
from bertbench.ledger.database import default_ledger_path, ledger_exists, read_ledger
from bertbench.memory.compiled import CompiledMemory
from bertbench.planning.requests import PlannedDevice, PlanRequest


def planned_target(device: PlannedDevice) -> CompileTarget | None:
    """What steps of a plan are compiled for; None if the device is no product of the catalogue."""
    if device.accelerator is None:
        return None
    if device.kind == "gpu" and device.replicas > 1:
        return None  # XLA does not compile a step of several GPUs.
    return compile_target(device.accelerator, device.replicas)


def with_compiled_steps(
    device: PlannedDevice, workload: Workload, request: PlanRequest
) -> PlannedDevice:
    """Add to a device what its compiler has said of a workload.

    What the ledger has was said by the compiler that is installed, so it counts more than the
    table.

    Args:
        device: a product of the catalogue, or an attached device, which is returned unchanged.
        workload: what is planned.
        request: tells where the ledger is, and whether XLA is to compile.
    """
    target = planned_target(device)
    compiles = device.kind == "tpu" or any(levers.xla for levers in request.allowed)
    if target is None or not compiles:
        return device
    steps: dict = {
        setup: dict(memories)
        for setup, memories in shipped_steps(target.name, target.replicas, workload).items()
    }
    path = request.ledger_file or default_ledger_path()
    if has_compiler(device.kind) and ledger_exists(path):
        with read_ledger(path) as ledger:
            known = read_compiled_steps(ledger, target, workload)
        for setup, memories in known.items():
            own: dict[int, CompiledMemory | None] = steps.setdefault(setup, {})
            own.update(memories)
    return dataclasses.replace(device, compiled=steps)
