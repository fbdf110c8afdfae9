"""A run's output folder: which run it belongs to, and what lies beside the checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bertbench.core.errors import WorkError
from bertbench.core.terminal import say
from bertbench.run.output.cloud_storage import RemoteFolder
from bertbench.run.settings import RunSettings
from finetune.errors import InputError
from finetune.model_files.checkpoint_files import remove_half_written
from finetune.model_files.model_folder import RUN_FILE
from finetune.spec.checkpointing import Checkpointing
from finetune.spec.config import BertConfig, to_original_json
from finetune.storage.array_cache import hash_file
from finetune.storage.files import remove_temporaries, write_atomically
from finetune.storage.folders import HeldFolder, held_folder, try_lock
from finetune.storage.json_files import json_text, load_object, parse_json
from finetune.text.tokenization import Tokenizer
from finetune.text.tokenizer_files import write_tokenizer_files

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
    "test_results*.tsv",
    RUN_FILE,
)
_MODEL_FILES = ("bert_config.json", "vocab.txt", "tokenizer_config.json")
_OF_TRAINING = (
    "task", "global_step", "train_loss", "train_seconds", "best_step", "stopped_early",
    "micro_batch", "levers",
)  # fmt: skip
"""Results that do not depend on what is predicted afterwards."""


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


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[HeldFolder]:
    """Hold a folder in the block, which is made if it is not there; no file is left in it.

    Yields:
        The folder, which tells whether it is still there.

    Raises:
        InputError: another process holds it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(held_folder(folder))
        except OSError as error:
            raise InputError(f"cannot use the output folder ({error})", path=folder) from error
        if not try_lock(held.descriptor):
            raise InputError(
                "another run is writing to this folder",
                path=folder,
                hint="wait for its end, or choose another --output_dir",
            )
        yield held


def prepare_output(
    settings: RunSettings,
    identity: Mapping[str, Any],
    extra: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> dict[str, Any]:
    """Make the output folder and record the run, or see that the folder holds this same run.

    What decides the result (data, model, batch, schedule, seed) must be the same to continue;
    how it is computed (micro-batch, checkpointing, device) may differ, because it does not change
    the result.

    Args:
        settings: names the folder.
        identity: what decides the result.
        extra: what else to record.
        plan: how it is computed this time; each continuation adds its own.

    Returns:
        The run's record as it was written.

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
    earlier = earlier or {}
    record = {
        "identity": dict(identity),
        "settings": settings_json(settings),
        **extra,
        "invocations": [*_part(earlier, "invocations", list), begun],
        "steps_down": _part(earlier, "steps_down", list),
    }
    results = _results_that_hold(earlier, record)
    if results:
        record["results"] = results
    _write_record(folder, record)
    return record


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


def clear_remains(folder: Path) -> None:
    """Remove what killed processes have left half written in an output folder.

    Args:
        folder: held by this process alone.
    """
    names = [pattern for pattern in (*_RUN_FILES, *_MODEL_FILES) if "/" not in pattern]
    for place in (folder, folder / "best"):
        remove_temporaries(place, names)
        if (folder / RUN_FILE).is_file():
            remove_half_written(place)


def recorded_steps_down(folder: Path) -> list[dict[str, Any]]:
    """What a folder's run could not go on with, oldest first; see `bertbench.run.oom_recovery`.

    Empty if there is no run, or no readable record; `prepare_output` says what is wrong with it.
    """
    try:
        found = _part(read_record(folder), "steps_down", list)
    except InputError:
        return []
    return [values for values in found if isinstance(values, dict)]


def add_step_down(settings: RunSettings, values: Mapping[str, Any]) -> None:
    """Add to the run's record what it could not go on with, and what comes after it.

    Raises:
        WorkError: somebody has deleted or damaged the record.
    """
    record = _read_record(settings.output_dir)
    if record is None:
        raise WorkError(
            f"{settings.output_dir / RUN_FILE} was deleted or damaged while the run was going on: "
            "put it back, and the same command continues"
        )
    steps_down = [*_part(record, "steps_down", list), dict(values)]
    _write_record(settings.output_dir, {**record, "steps_down": steps_down})


def record_results(
    folder: HeldFolder, results: Mapping[str, Any], begun: Mapping[str, Any] | None
) -> None:
    """Add what came out to the run's record.

    Args:
        folder: the output folder.
        results: what is known by now.
        begun: the record as `prepare_output` wrote it, which is written again if somebody has
            deleted or damaged it since; None after prediction alone, where a folder without a
            record gets none.

    Raises:
        FolderLostError: the folder is not there any more.
        OSError: it cannot be written to.
    """
    folder.check()
    path = folder.path / RUN_FILE
    record = _read_record(folder.path)
    if begun is not None and (record is None or record.get("identity") != begun["identity"]):
        say(f"warning: {path} was deleted or changed by somebody: it is written again")
        record = dict(begun)
    if record is not None:
        merged = {**record, "results": {**_part(record, "results", dict), **results}}
        _write_record(folder.path, merged)
    elif path.exists():
        say(f"warning: {path} is damaged: the results are not added to it")


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The run's record; None if there is none that can be read."""
    try:
        return read_record(folder)
    except InputError:
        return None


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
