"""`bertbench devices`: the devices of this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from bertbench.cli.options.common import CONTEXT, json_option, write_json
from bertbench.core.terminal import terminal
from bertbench.core.units import format_bytes
from bertbench.hardware.device import Device, budget_bytes_if_free
from bertbench.hardware.discover import list_devices
from bertbench.hardware.tensorflow_support import (
    Software,
    device_support,
    find_software,
    tpu_support,
)


@click.command(context_settings=CONTEXT)
@json_option
def command(json_file: Path | None) -> None:
    """Show the devices of this machine, and whether TensorFlow can use them.

    With their memory and the processes that hold it; `a trial may use` is the
    default of --memory. If TensorFlow cannot use a GPU or a TPU, a line says why,
    and what to install.

    \b
    Example:
      bertbench devices --json devices.json
    """
    devices = {device: budget_bytes_if_free(device) for device in list_devices()}
    software = find_software()
    if json_file is not None:
        rows = [
            {**d.to_json(), "usable_bytes": usable, "tensorflow": _support_json(d, software)}
            for d, usable in devices.items()
        ]
        write_json(json_file, {"devices": rows, "tpu": _tpu_json(software)})
    if str(json_file) != "-":
        console = terminal()
        console.print(_table(devices))
        for line in support_lines(list(devices), software):
            console.print(line, soft_wrap=True)


def support_lines(devices: Sequence[Device], software: Software) -> list[str]:
    """Say of each GPU, and of a TPU if there is one, whether TensorFlow can use it.

    Args:
        devices: what is attached.
        software: what is installed.
    """
    lines = []
    for device in devices:
        support = device_support(device, software)
        if support is not None:
            lines.append(f"{device.label}: {support.describe()}")
    if software.tpu_chips or software.for_tpu:
        chips = software.tpu_chips
        found = f"{chips} chip{'' if chips == 1 else 's'} of this machine. " if chips else ""
        lines.append(f"tpu: {found}{tpu_support(software).describe()}")
    return lines


def _support_json(device: Device, software: Software) -> dict[str, Any] | None:
    support = device_support(device, software)
    return None if support is None else dataclasses.asdict(support)


def _tpu_json(software: Software) -> dict[str, Any]:
    return {"chips": software.tpu_chips, **dataclasses.asdict(tpu_support(software))}


def _table(devices: Mapping[Device, int]) -> Table:
    """A row for each device.

    Args:
        devices: the devices, with the bytes that a trial may use of each.
    """
    table = Table(box=None, pad_edge=False)
    for title in ("device", "name", "total", "free", "a trial may use", "held by"):
        left = title in ("device", "name", "held by")
        table.add_column(title, justify="left" if left else "right")
    for device, usable_bytes in devices.items():
        held = [f"{name} ({pid}) {format_bytes(size)}" for pid, name, size in device.held_by]
        table.add_row(
            device.label,
            device.name,
            format_bytes(device.total_bytes),
            format_bytes(device.free_bytes),
            format_bytes(usable_bytes),
            ", ".join(held),
        )
    return table
