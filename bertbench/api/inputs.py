"""What the functions take: a workload by name, and a device by name."""

from __future__ import annotations

import re

from bertbench.core.units import parse_bytes
from bertbench.core.workload import Workload, published_workload
from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.device import Budget, Device, make_budget
from bertbench.hardware.discover import resolve_devices
from bertbench.planning.requests import PlannedDevice, attached_device, catalogue_device
from finetune.errors import InputError


def find_workload(model: str | Workload, seq_len: int | None) -> Workload:
    """Return the workload that a name and a length stand for.

    Raises:
        InputError: the model is unknown, the length is missing, or it is not the workload's.
    """
    if isinstance(model, Workload):
        if seq_len not in (None, model.seq_len):
            raise InputError(f"the workload has sequence length {model.seq_len}, not {seq_len}")
        return model
    if seq_len is None:
        raise InputError(f"{model}: the sequence length is missing", hint="give seq_len")
    return published_workload(model, seq_len)


def find_probed_device(on: str | Budget, memory: str | int | None) -> tuple[Device, int | None]:
    """Return the device to probe, and the bytes of its budget if they are named.

    Args:
        on: a budget, or a device's name as `--device` takes it.
        memory: bytes, or text such as "12GiB".

    Raises:
        InputError: there is no such device, there are several, or memory is named twice.
    """
    budget_bytes: int | None
    if isinstance(on, Budget):
        _check_no_memory(memory)
        device, budget_bytes = on.device, on.budget_bytes
    else:
        device, budget_bytes = resolve_devices(on), _bytes(memory)
    if device.peers:
        raise InputError(
            f"{device.label}: a limit is that of one device", hint="probe one of them alone"
        )
    if device.tpu is not None and memory is not None:
        raise InputError(
            f"{device.label}: a TPU is probed with all memory of a core", hint="leave memory out"
        )
    return device, budget_bytes


def find_planned_device(on: str | Budget, memory: str | int | None) -> PlannedDevice:
    """Return the device to plan for: an attached one, or one of the catalogue.

    Args:
        on: a budget, a device's name as `--device` takes it, or a product as `--gpu` takes it.
        memory: bytes, or text such as "12GiB"; None takes what is free, or usable.

    Raises:
        InputError: there is no such device, it has less memory, or memory is named twice.
    """
    if isinstance(on, Budget):
        _check_no_memory(memory)
        return attached_device(on)
    if re.split("[:,]", on.lower())[0] not in ("auto", "cpu", "gpu"):
        return catalogue_device(find_accelerator(on), _bytes(memory))
    return attached_device(make_budget(resolve_devices(on), _bytes(memory)))


def _check_no_memory(memory: str | int | None) -> None:
    if memory is not None:
        raise InputError("a budget says its memory already", hint="leave memory out")


def _bytes(memory: str | int | None) -> int | None:
    return None if memory is None else parse_bytes(str(memory))
