"""What a plan for a product knows from its compiler: the shipped table, and the user's ledger."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from bertbench.compiling.installed import has_compiler
from bertbench.compiling.shipped import shipped_steps
from bertbench.compiling.target import CompileTarget, compile_target
from bertbench.core.terminal import say
from bertbench.core.workload import Setup, Workload
from bertbench.ledger.compilations import read_compiled_steps
from bertbench.ledger.database import default_ledger_path, ledger_exists, read_ledger
from bertbench.memory.compiled import CompiledMemory, CompiledSteps
from bertbench.planning.requests import PlannedDevice, PlanRequest
from finetune.errors import InputError


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

    Raises:
        InputError: the ledger that the request names cannot be read.
    """
    target = planned_target(device)
    compiles = device.kind == "tpu" or any(levers.xla for levers in request.allowed)
    if target is None or not compiles:
        return device
    steps: dict[Setup, dict[int, CompiledMemory | None]] = {
        setup: dict(memories)
        for setup, memories in shipped_steps(target.name, target.replicas, workload).items()
    }
    for setup, memories in _of_ledger(target, workload, request.ledger_file).items():
        steps.setdefault(setup, {}).update(memories)
    return dataclasses.replace(device, compiled=steps)


def _of_ledger(
    target: CompileTarget, workload: Workload, ledger_file: Path | None
) -> CompiledSteps:
    """What a ledger knows; nothing if it is the user's and cannot be read.

    Raises:
        InputError: the file that was named cannot be read.
    """
    try:
        path = ledger_file or default_ledger_path()
        if not has_compiler(target.kind) or not ledger_exists(path):
            return {}
        with read_ledger(path) as ledger:
            return read_compiled_steps(ledger, target, workload)
    except InputError as error:
        if ledger_file is not None:
            raise
        _warn(f"warning: {error}; planning without it")
        return {}


@functools.cache
def _warn(text: str) -> None:
    """Say something once, however many workloads are planned."""
    say(text)
