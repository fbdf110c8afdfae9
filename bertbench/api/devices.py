"""`bertbench.devices()`: what is attached to this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bertbench.api.results import Result
from bertbench.hardware.device import Device, budget_bytes_if_free
from bertbench.hardware.discover import list_devices
from bertbench.hardware.tensorflow_support import Software, device_support, find_software


@dataclasses.dataclass(frozen=True)
class Devices(Result):
    """The devices of a machine; iterate over it for each.

    Attributes:
        devices: GPUs in the driver's order, then the CPU.
        software: what is installed, by which TensorFlow can use them or not.
    """

    devices: tuple[Device, ...]
    software: Software

    def __iter__(self) -> Iterator[Device]:
        return iter(self.devices)

    def __len__(self) -> int:
        return len(self.devices)

    def describe(self) -> str:
        """Describe the result in one line."""
        return ", ".join(f"{device.label}: {device.name}" for device in self.devices)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each device."""
        return [
            {
                "device": device.label,
                "name": device.name,
                "total_bytes": device.total_bytes,
                "free_bytes": device.free_bytes,
                "default_budget_bytes": budget_bytes_if_free(device) or None,
                "driver": device.driver,
                "compute_capability": device.compute_capability,
                "tensorflow": self._support(device),
            }
            for device in self.devices
        ]

    def _support(self, device: Device) -> str | None:
        support = device_support(device, self.software)
        return None if support is None else support.describe()


def devices() -> Devices:
    """Find what is attached to this machine.

    Example:
        >>> import bertbench
        >>> found = bertbench.devices()
        >>> found.devices[-1].label
        'cpu'
        >>> list(found.to_frame().columns[:3])
        ['device', 'name', 'total_bytes']

    Returns:
        The devices. A machine without a GPU, or without its driver, has only the CPU.
    """
    return Devices(tuple(list_devices()), find_software())
