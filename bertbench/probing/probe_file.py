"""Files of `bertbench probe --json`, as `probe --check` and `report --compare` read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertbench.core.workload import (
    MAX_BATCH,
    Setup,
    levers_from_json,
    published_workload,
)
from bertbench.hardware.device import Device, device_from_json
from bertbench.trials.trial import Trial, trial_from_json
from finetune.errors import InputError
from finetune.storage.json_files import MAX_WHOLE, get_whole, load_object

_HINT = "give a file of `bertbench probe --json`"


@dataclasses.dataclass(frozen=True)
class CellRecord:
    """What a file says of one cell.

    Attributes:
        setup: workload and levers.
        trials: all that were made for it.
        certificate: trials of the batch that fits, None if none does, and of the one that runs
            out of memory; None without a certificate.
    """

    setup: Setup
    trials: tuple[Trial, ...]
    certificate: tuple[Trial | None, Trial] | None


@dataclasses.dataclass(frozen=True)
class ProbeFile:
    """What a file says.

    Attributes:
        device: as it was then.
        budget_bytes: of it.
        versions: of what decides a trial's outcome, by name.
        cells: in the file's order.
    """

    device: Device
    budget_bytes: int
    versions: Mapping[str, str]
    cells: tuple[CellRecord, ...]


def read_probe_file(path: Path) -> ProbeFile:
    """Read a file that `bertbench probe --json` wrote.

    Raises:
        InputError: it cannot be read, is not such a file, or has a model or lever that this version
            does not know.
    """
    values = load_object(path, what="a probe's result", hint=_HINT)
    device, cells, versions = (values.get(name) for name in ("device", "cells", "versions"))
    if not (isinstance(device, dict) and isinstance(cells, list)):
        raise InputError("not a probe's result", path=path, hint=_HINT)
    try:
        return ProbeFile(
            device_from_json(device),
            get_whole(device, "budget_bytes", 1, MAX_WHOLE),
            {str(name): str(text) for name, text in _object(versions or {}).items()},
            tuple(map(_cell, cells)),
        )
    except InputError as error:
        raise InputError(f"not a probe's result ({error})", path=path, hint=_HINT) from error


def _cell(raw: object) -> CellRecord:
    values = _object(raw)
    workload = published_workload(
        str(values.get("model")),
        get_whole(values, "seq_len", 1, MAX_WHOLE),
        str(values.get("head")),
    )
    trials = values.get("trials") or []
    if not isinstance(trials, list):
        raise InputError("'trials' is no list")
    return CellRecord(
        Setup(workload, levers_from_json(_object(values.get("levers")))),
        tuple(_trial(trial) for trial in trials),
        _certificate(values.get("certificate")),
    )


def _certificate(raw: object) -> tuple[Trial | None, Trial] | None:
    if raw is None:
        return None
    values = _object(raw)
    fits, oom = values.get("fits"), values.get("oom")
    return None if fits is None else _trial(fits), _trial(oom)


def _trial(raw: object) -> Trial:
    values = _object(raw)
    get_whole(values, "batch", 1, MAX_BATCH)
    return trial_from_json(values)


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{str(value)[:40]!r} is no object")
    return value
