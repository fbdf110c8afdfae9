"""Environments in which trials were run: a device, its budget and the versions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from bertbench.core.units import MIB_BYTES, format_bytes
from bertbench.hardware.device import Device
from bertbench.ledger.records import LedgerRow
from finetune.storage.json_files import parse_json


@dataclasses.dataclass(frozen=True, order=True)
class Environment:
    """What trials have in common that can be compared: device, budget and versions.

    Attributes:
        device: name of the device.
        budget_bytes: what the allocator could use.
        kind: `cpu`, `gpu` or `tpu`.
        driver: version of a GPU's driver; empty for other kinds.
        zone: zone and project of a TPU; empty for other kinds.
        versions: JSON of the versions of TensorFlow, Python and bertbench.
    """

    device: str
    budget_bytes: int
    kind: str
    driver: str
    zone: str
    versions: str

    def as_device(self) -> Device:
        """Return the device, with the budget as its memory."""
        size = self.budget_bytes
        return Device(self.kind, 0, self.device, None, size, size, driver=self.driver or None)

    @property
    def name(self) -> str:
        """Budget and device in words; other environments may have the same name."""
        return f"{format_bytes(self.budget_bytes)} on {self.device}"

    @functools.cached_property
    def details(self) -> dict[str, str]:
        """Driver, zone, versions and kind: by these, environments of one name are told apart."""
        versions = _versions(self.versions)
        return {"driver": self.driver, "zone": self.zone, **versions, "kind": self.kind}


def name_environments(environments: Iterable[Environment]) -> dict[Environment, str]:
    """Name environments so that no two names are equal.

    Where budget and device are equal, the name has the details that differ, such as a version.
    """
    groups: dict[str, list[Environment]] = {}
    rounded: dict[str, set[int]] = {}
    different = sorted(set(environments))
    for environment in different:
        rounded.setdefault(environment.name, set()).add(environment.budget_bytes)
    for environment in different:
        name = environment.name
        if len(rounded[name]) > 1:  # two GPUs seldom have the same number of MiB free
            name = f"{environment.budget_bytes / MIB_BYTES:,.6g} MiB on {environment.device}"
        groups.setdefault(name, []).append(environment)
    names = {}
    for name, group in groups.items():
        details = {detail: None for environment in group for detail in environment.details}
        differing = [
            d for d in details if len({environment.details.get(d, "") for environment in group}) > 1
        ]
        for environment in group:
            told = [
                f"{d} {environment.details[d]}" for d in differing if environment.details.get(d)
            ]
            names[environment] = ", ".join([name, *told])
    return names


def environment_of(row: LedgerRow) -> Environment:
    """Return the environment that a trial was run in."""
    return _place(row.device, row.budget_bytes, row.question.budget, row.question.versions)


@functools.lru_cache(maxsize=1024)
def _place(device: str, budget_bytes: int, budget_key: str, versions: str) -> Environment:
    try:
        values = parse_json(budget_key)
        kind, driver = str(values["kind"]), str(values.get("driver") or "")
        zone = " ".join(w for w in str(values.get("tpu") or "").split() if w != "None")
    except (ValueError, KeyError, TypeError, AttributeError):
        kind, driver, zone = "cpu", "", ""
    return Environment(device, budget_bytes, kind, driver, zone, versions)


def _versions(text: str) -> dict[str, str]:
    try:
        return {str(name): str(version) for name, version in parse_json(text).items()}
    except (ValueError, AttributeError):
        return {}
