"""`bertbench devices`: what is attached."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from bertbench.cli.options.common import CONTEXT, json_option, write_json
from bertbench.core.terminal import terminal
from bertbench.core.units import format_bytes
from bertbench.devices.device import default_budget_bytes
from bertbench.devices.discover import list_devices
from finetune.errors import InputError


@click.command(context_settings=CONTEXT)
@json_option
def command(json_file: Path | None) -> None:
    """What is attached, how much memory it has, and who holds it.

    `a trial may use` is the default of --memory.

    \b
    Example:
      bertbench devices --json devices.json
    """
    devices = list_devices()
    rows = []
    for device in devices:
        try:
            usable_bytes = default_budget_bytes(device)
        except InputError:
            usable_bytes = 0
        rows.append({**device.to_json(), "usable_bytes": usable_bytes})
    if json_file is not None:
        write_json(json_file, {"devices": rows})
    if str(json_file) == "-":
        return
    table = Table(box=None, pad_edge=False)
    for title in ("device", "name", "total", "free", "a trial may use", "held by"):
        table.add_column(
            title, justify="left" if title in ("device", "name", "held by") else "right"
        )
    for device, row in zip(devices, rows, strict=True):
        held = ", ".join(
            f"{name} ({pid}) {format_bytes(size)}" for pid, name, size in device.held_by
        )
        table.add_row(
            device.label,
            device.name,
            format_bytes(device.total_bytes),
            format_bytes(device.free_bytes),
            format_bytes(row["usable_bytes"]),
            held,
        )
    terminal().print(table)
