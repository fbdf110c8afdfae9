"""`bertbench devices`: the devices of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
from rich.table import Table

from bertbench.cli.options.common import CONTEXT, json_option, write_json
from bertbench.core.terminal import terminal
from bertbench.core.units import format_bytes
from bertbench.hardware.device import Device, budget_bytes_if_free
from bertbench.hardware.discover import list_devices


@click.command(context_settings=CONTEXT)
@json_option
def command(json_file: Path | None) -> None:
    """Show the devices of this machine, their memory, and the processes that hold it.

    `a trial may use` is the default of --memory.

    \b
    Example:
      bertbench devices --json devices.json
    """
    devices = {device: budget_bytes_if_free(device) for device in list_devices()}
    if json_file is not None:
        rows = [{**d.to_json(), "usable_bytes": usable} for d, usable in devices.items()]
        write_json(json_file, {"devices": rows})
    if str(json_file) != "-":
        terminal().print(_table(devices))


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
