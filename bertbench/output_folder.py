"""A run's output folder: which run it belongs to, and what lies beside the checkpoints."""

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

from bertbench.cloud_storage import RemoteFolder
from bertbench.running import RunSettings
from finetune.array_cache import hash_file
from finetune.checkpointing import Checkpointing
from finetune.config import BertConfig, to_original_json
from finetune.errors import InputError
from finetune.files import write_atomically
from finetune.json_files import json_text, load_object
from finetune.model_folder import RUN_FILE
from finetune.tokenization import Tokenizer
from finetune.tokenizer_files import write_tokenizer_files

_T = TypeVar("_T")

_MASKS = "dropout_masks"

_RUN_FILES = (
    "model.ckpt-*",
    ".tmp-*",
    "checkpoint",
    "train_log.jsonl",
    "eval_log.jsonl",
    "events.out.tfevents.*",
    "eval/events.out.tfevents.*",
    "best/model.ckpt-*",
    "best/checkpoint",
    "predictions.json",
    "nbest_predictions.json",
    "null_odds.json",
    "eval_results.txt",
    "test_results.tsv",
    RUN_FILE,
)


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


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a run has recorded about itself.

    Raises:
        InputError: there is no record, or it is damaged.
    """
    hint = "give an --output_dir of `bertbench run`, and for a new run one without a record"
    # Scores of earlier versions may be NaN.
    return load_object(folder / RUN_FILE, what="the record of a run", hint=hint, finite=False)


def _part(record: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """A part of a record, empty if the record has none of that kind."""
    found = record.get(name)
    return found if isinstance(found, kind) else kind()


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


def prepare_output(
    settings: RunSettings,
    identity: Mapping[str, Any],
    extra: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> None:
    """Make the output folder and record the run, or see that the folder holds this same run.

    What decides the result (data, model, batch, schedule, seed) must be the same to continue;
    how it is computed (micro-batch, checkpointing, device) may differ, because it does not change
    the result.

    Args:
        settings: names the folder.
        identity: what decides the result.
        extra: what else to record.
        plan: how it is computed this time; each continuation adds its own.

    Raises:
        InputError: the folder holds another run, or something else under the names needed.
    """
    folder = settings.output_dir
    path = folder / RUN_FILE
    if settings.overwrite and path.is_file():
        # Only what a run writes: a user may keep other files there.
        for pattern in _RUN_FILES:
            for old in folder.glob(pattern):
                old.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use the output folder ({error})", path=folder) from error
    earlier = read_record(folder) if path.exists() else None
    if earlier is None and any(folder.glob("model.ckpt-*")):
        raise InputError(
            "the output folder holds checkpoints of something else",
            path=folder,
            hint="choose another --output_dir",
        )
    if earlier is not None:
        if not settings.resume:
            raise InputError(
                "the output folder holds a run already",
                path=folder,
                hint="choose another --output_dir, or --overwrite_output_dir to start again",
            )
        before = _part(earlier, "identity", dict)
        changed = [key for key in identity if before.get(key) != identity[key]]
        if changed:
            raise InputError(
                f"the output folder holds a run that differs in {', '.join(sorted(changed))}",
                path=folder,
                hint="choose another --output_dir, or --overwrite_output_dir to start again",
            )
        if _has_masks_of_xla(earlier):
            raise InputError(
                "the output folder holds a run of an earlier version of bertbench, for which XLA "
                "drew other dropout masks",
                path=folder,
                hint="choose another --output_dir, or --overwrite_output_dir to start again",
            )
        now, then = extra.get("evaluation"), earlier.get("evaluation")
        if now and then and now != then:
            raise InputError(
                "the output folder holds a run that was evaluated on other data",
                path=folder,
                hint="use the same data, or --overwrite_output_dir to start again",
            )
    if not settings.keep_best:
        # They would be taken for the result although later weights may be better.
        for pattern in ("best/model.ckpt-*", "best/checkpoint"):
            for old in folder.glob(pattern):
                old.unlink()
    begun = {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        _MASKS: "Philox's integers",
        **plan,
    }
    _write_record(
        folder,
        {
            "identity": dict(identity),
            "settings": settings_json(settings),
            **extra,
            "invocations": [*_part(earlier or {}, "invocations", list), begun],
            "steps_down": _part(earlier or {}, "steps_down", list),
        },
    )


def recorded_steps_down(folder: Path) -> list[dict[str, Any]]:
    """What a folder's run could not go on with, oldest first; see `bertbench.stepping_down`.

    Empty if there is no run, or no readable record; `prepare_output` says what is wrong with it.
    """
    try:
        found = _part(read_record(folder), "steps_down", list)
    except InputError:
        return []
    return [values for values in found if isinstance(values, dict)]


def add_step_down(settings: RunSettings, values: Mapping[str, Any]) -> None:
    """Add to the run's record what it could not go on with, and what comes after it."""
    record = read_record(settings.output_dir)
    steps_down = [*_part(record, "steps_down", list), dict(values)]
    _write_record(settings.output_dir, {**record, "steps_down": steps_down})


def record_results(settings: RunSettings, results: Mapping[str, Any]) -> None:
    """Add what came out to the run's record; without one, as after prediction alone, do nothing."""
    path = settings.output_dir / RUN_FILE
    if not path.is_file():
        return
    record = read_record(settings.output_dir)
    results = {**_part(record, "results", dict), **results}
    _write_record(settings.output_dir, {**record, "results": results})


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomically(folder / RUN_FILE, json_text(record, indent=1, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    names = ("bertbench", "tensorflow", "numpy", "tokenizers", "safetensors")
    versions = {"python": platform.python_version(), "system": platform.platform()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def write_model_files(settings: RunSettings, tokenizer: Tokenizer, config: BertConfig) -> None:
    """Leave configuration and tokenizer beside the weights, so the folder is a model folder."""
    folder = settings.output_dir
    for place in (folder, folder / "best") if settings.keep_best else (folder,):
        place.mkdir(exist_ok=True)
        write_atomically(place / "bert_config.json", to_original_json(config))
        write_tokenizer_files(place, tokenizer, config.max_position_embeddings)
