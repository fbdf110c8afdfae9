"""`run.json`, a run's record: what was trained with what, how often it was begun, what came out."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bertbench.core.errors import WorkError
from bertbench.hardware.tensorflow_support import tensorflow_version
from bertbench.running.output.cloud_storage import RemoteFolder
from bertbench.running.settings import RunSettings
from finetune.errors import InputError
from finetune.model_files.model_folder import RUN_FILE
from finetune.spec.checkpointing import Checkpointing
from finetune.storage.array_cache import hash_file
from finetune.storage.files import write_atomically
from finetune.storage.json_files import json_text, load_object, parse_json

_T = TypeVar("_T")

_MASKS = "dropout_masks"

_OF_TRAINING = (
    "task", "global_step", "train_loss", "train_seconds", "best_step", "stopped_early",
    "micro_batch", "levers",
)  # fmt: skip
"""Results that do not depend on what is predicted afterwards."""

_START_AGAIN = "choose another --output_dir, or --overwrite_output_dir to start again"


@dataclasses.dataclass(frozen=True)
class RunDescription:
    """What a run writes into its record when it begins or continues.

    Attributes:
        identity: what decides the result: data, model, batch, schedule, seed. A run is continued
            only with the same.
        plan: how the result is computed this time: micro-batch, levers, device. It may differ,
            because it does not change the result.
        details: what else is worth knowing.
    """

    identity: Mapping[str, Any]
    plan: Mapping[str, Any]
    details: Mapping[str, Any]


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named arrays, names and shapes included."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        # No copy: the array may be a memory map larger than memory.
        digest.update(np.ascontiguousarray(arrays[name]).data.cast("B"))
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a file that a run read."""
    return {"path": str(path), "sha256": hash_file(path)}


def settings_json(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass of settings, as JSON holds them."""

    def plain(value: Any) -> Any:
        if isinstance(value, (Checkpointing, Path, RemoteFolder)):
            return str(value)
        if dataclasses.is_dataclass(value):
            return settings_json(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return value

    return {f.name: plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a run has recorded about itself.

    Raises:
        InputError: there is no record, or it is damaged.
    """
    hint = "give an --output_dir of `bertbench run`, and for a new run one without a record"
    # Scores of earlier versions may be NaN.
    return load_object(folder / RUN_FILE, what="the record of a run", hint=hint, finite=False)


def check_same_run(earlier: Mapping[str, Any], description: RunDescription, folder: Path) -> None:
    """Refuse to continue a run whose result would be another one.

    Args:
        earlier: the record of the run in the folder.
        description: of the run that is asked for.
        folder: for the message.

    Raises:
        InputError: says what differs.
    """
    before = _part(earlier, "identity", dict)
    identity = description.identity
    changed = [key for key in identity if before.get(key) != identity[key]]
    if changed:
        raise InputError(
            f"the output folder holds a run that differs in {', '.join(sorted(changed))}",
            path=folder,
            hint=_START_AGAIN,
        )
    if _has_masks_of_xla(earlier):
        raise InputError(
            "the output folder holds a run of an earlier version of bertbench, for which XLA "
            "drew other dropout masks",
            path=folder,
            hint=_START_AGAIN,
        )
    now, then = description.details.get("evaluation"), earlier.get("evaluation")
    if now and then and now != then:
        raise InputError(
            "the output folder holds a run that was evaluated on other data",
            path=folder,
            hint="use the same data, or --overwrite_output_dir to start again",
        )


def begin_record(
    folder: Path, earlier: Mapping[str, Any], settings: RunSettings, description: RunDescription
) -> dict[str, Any]:
    """Write the record of a run that begins or continues.

    Args:
        folder: the output folder.
        earlier: the record of the same run before; empty for a new run.
        settings: of the run.
        description: of the run.

    Returns:
        The record as it was written.
    """
    begun = {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        _MASKS: "Philox's integers",
        **description.plan,
    }
    record = {
        "identity": dict(description.identity),
        "settings": settings_json(settings),
        **description.details,
        "invocations": [*_part(earlier, "invocations", list), begun],
        "steps_down": _part(earlier, "steps_down", list),
    }
    results = _results_that_hold(earlier, record)
    if results:
        record["results"] = results
    _write_record(folder, record)
    return record


def add_results(folder: Path, results: Mapping[str, Any], begun: Mapping[str, Any] | None) -> str:
    """Add what came out to the record in a folder.

    Args:
        folder: the output folder.
        results: what is known by now.
        begun: the record as `begin_record` wrote it. If somebody has deleted or damaged the
            record since, it is written again. None after prediction alone, where a folder
            without a record gets none.

    Returns:
        A warning if the record is not what it was; "" if it is.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = folder / RUN_FILE
    record, warning = _read_if_whole(folder), ""
    if begun is not None and (record is None or record.get("identity") != begun["identity"]):
        warning = f"{path} was deleted or changed by somebody: it is written again"
        record = dict(begun)
    if record is not None:
        merged = {**record, "results": {**_part(record, "results", dict), **results}}
        _write_record(folder, merged)
    elif path.exists():
        warning = f"{path} is damaged: the results are not added to it"
    return warning


def recorded_steps_down(folder: Path) -> list[dict[str, Any]]:
    """The steps down of a folder's run, oldest first; see `bertbench.running.oom_recovery`.

    Empty if there is no run, or no readable record; what is wrong with it is said when the run
    begins.
    """
    record = _read_if_whole(folder) or {}
    return [values for values in _part(record, "steps_down", list) if isinstance(values, dict)]


def add_step_down(folder: Path, values: Mapping[str, Any]) -> None:
    """Add a step down to the record of the run in a folder.

    Raises:
        WorkError: somebody has deleted or damaged the record.
    """
    record = _read_if_whole(folder)
    if record is None:
        raise WorkError(
            f"{folder / RUN_FILE} was deleted or damaged while the run was going on: put it back, "
            "and the same command continues"
        )
    steps_down = [*_part(record, "steps_down", list), dict(values)]
    _write_record(folder, {**record, "steps_down": steps_down})


def _results_that_hold(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Results of the same run before, until this invocation has its own.

    Scores do not hold if anything is predicted or evaluated in another way now.
    """
    results = _part(earlier, "results", dict)
    changing = ("invocations", "steps_down", "results")
    before, now = (
        {key: value for key, value in values.items() if key not in changing}
        for values in (earlier, parse_json(json_text(record)))
    )
    return {key: value for key, value in results.items() if before == now or key in _OF_TRAINING}


def _has_masks_of_xla(earlier: Mapping[str, Any]) -> bool:
    """Whether XLA, or a TPU, drew dropout masks of its own for a run.

    It did until they were made of Philox's integers, which invocations have recorded since.
    """

    def compiled(invocation: Mapping[str, Any]) -> bool:
        device = _part(_part(invocation, "budget", dict), "device", dict)
        return bool(_part(invocation, "levers", dict).get("xla")) or device.get("kind") == "tpu"

    return any(
        isinstance(one, dict) and _MASKS not in one and compiled(one)
        for one in _part(earlier, "invocations", list)
    )


def _part(record: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """A part of a record, empty if the record has none of that kind."""
    found = record.get(name)
    return found if isinstance(found, kind) else kind()


def _read_if_whole(folder: Path) -> dict[str, Any] | None:
    """The run's record; None if there is none that can be read."""
    try:
        return read_record(folder)
    except InputError:
        return None


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomically(folder / RUN_FILE, json_text(record, indent=1, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    names = ("bertbench", "numpy", "tokenizers", "safetensors")
    versions = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "tensorflow": tensorflow_version() or "not installed",
    }
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
