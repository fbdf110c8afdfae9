"""Where trials were run: a device, a budget and versions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from bertbench.core.units import MIB_BYTES, format_bytes
from bertbench.devices.device import Device
from bertbench.ledger.records import LedgerRow
from finetune.storage.json_files import parse_json


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where, and with what, trials were run that may be compared with each other.

    Attributes:
        device: name.
        budget_bytes: what the allocator could use.
        kind: `cpu`, `gpu` or `tpu`.
        driver: of a GPU; empty for others.
        zone: and project of a TPU; empty for others.
        versions: as the ledger has them.
    """

    device: str
    budget_bytes: int
    kind: str
    driver: str
    zone: str
    versions: str

    def as_device(self) -> Device:
        """The device, as large as the budget."""
        size = self.budget_bytes
        return Device(self.kind, 0, self.device, None, size, size, driver=self.driver or None)

    @property
    def name(self) -> str:
        """Budget and device for people; other places may have the same."""
        return f"{format_bytes(self.budget_bytes)} on {self.device}"

    @functools.cached_property
    def details(self) -> dict[str, str]:
        """What else it is made of, by name."""
        versions = _versions(self.versions)
        return {"driver": self.driver, "zone": self.zone, **versions, "kind": self.kind}


def name_places(places: Iterable[Place]) -> dict[Place, str]:
    """Name places so that no two have the same name: with the details in which they differ."""
    groups: dict[str, list[Place]] = {}
    rounded: dict[str, set[int]] = {}
    different = sorted(set(places))
    for place in different:
        rounded.setdefault(place.name, set()).add(place.budget_bytes)
    for place in different:
        name = place.name
        if len(rounded[name]) > 1:  # GPUs have seldom the same number of MiB free
            name = f"{place.budget_bytes / MIB_BYTES:,.6g} MiB on {place.device}"
        groups.setdefault(name, []).append(place)
    names = {}
    for name, group in groups.items():
        details = {detail: None for place in group for detail in place.details}
        differing = [d for d in details if len({place.details.get(d, "") for place in group}) > 1]
        for place in group:
            told = [f"{d} {place.details[d]}" for d in differing if place.details.get(d)]
            names[place] = ", ".join([name, *told])
    return names


def place_of(row: LedgerRow) -> Place:
    """Where a trial was run."""
    return _place(row.device, row.budget_bytes, *row.question[:2])


@functools.lru_cache(maxsize=1024)
def _place(device: str, budget_bytes: int, budget_key: str, versions: str) -> Place:
    try:
        values = parse_json(budget_key)
        kind, driver = str(values["kind"]), str(values.get("driver") or "")
        zone = " ".join(w for w in str(values.get("tpu") or "").split() if w != "None")
    except (ValueError, KeyError, TypeError, AttributeError):
        kind, driver, zone = "cpu", "", ""
    return Place(device, budget_bytes, kind, driver, zone, versions)


def _versions(text: str) -> dict[str, str]:
    try:
        return {str(name): str(version) for name, version in parse_json(text).items()}
    except (ValueError, AttributeError):
        return {}
