"""What the functions take: a workload by name, and a device by name."""

from __future__ import annotations

from bertbench.core.units import parse_bytes
from bertbench.core.workload import Workload, published_workload
from bertbench.hardware.accelerators import ACCELERATORS
from bertbench.hardware.device import Budget, make_budget
from bertbench.hardware.discover import resolve_devices
from bertbench.planning.requests import PlannedDevice, attached_device, catalogue_device
from finetune.errors import InputError


def find_workload(model: str | Workload, seq_len: int | None) -> Workload:
    """Return the workload that a name and a length stand for.

    Raises:
        InputError: the model is unknown, or a length is missing or given twice.
    """
    if isinstance(model, Workload):
        if seq_len not in (None, model.seq_len):
            raise InputError(f"the workload has sequence length {model.seq_len}, not {seq_len}")
        return model
    if seq_len is None:
        raise InputError(
            f"{model}: the sequence length is missing", hint="as in ('bert-base', 128)"
        )
    return published_workload(model, seq_len)


def find_budget(on: str | Budget, memory: str | int | None) -> Budget:
    """Return the budget on an attached device.

    Args:
        on: a budget, or a device's name as `--device` takes it.
        memory: bytes, or text such as "12GiB"; None takes what is free.

    Raises:
        InputError: there is no such device, or it has less memory.
    """
    if isinstance(on, Budget):
        if memory is not None:
            raise InputError("a budget says its memory already", hint="leave memory out")
        return on
    return make_budget(resolve_devices(on), _bytes(memory))


def find_planned_device(on: str | Budget, memory: str | int | None) -> PlannedDevice:
    """Return the device to plan for: an attached one, or one of the catalogue.

    Args:
        on: a budget, a device's name as `--device` takes it, or a product as `--gpu` takes it.
        memory: bytes, or text such as "12GiB"; None takes what is free, or usable.

    Raises:
        InputError: there is no such device, or it has less memory.
    """
    if isinstance(on, str) and on.lower() in ACCELERATORS:
        return catalogue_device(ACCELERATORS[on.lower()], _bytes(memory))
    return attached_device(find_budget(on, memory))


def _bytes(memory: str | int | None) -> int | None:
    return parse_bytes(memory) if isinstance(memory, str) else memory
