"""A run's output folder: which run it belongs to, and what lies beside the checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from bertbench.running import ModelFiles, RunSettings
from finetune.config import BertConfig, to_original_json
from finetune.errors import InputError
from finetune.files import write_atomically

RUN_FILE = "run.json"


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named arrays, names and shapes included."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def prepare_output(
    settings: RunSettings, identity: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Make the output folder and record the run, or see that the folder holds this same run.

    What decides the result (data, model, batch, schedule, seed) must be the same to continue;
    how it is computed (micro-batch, checkpointing, device) may differ, because it does not change
    the result.

    Args:
        settings: names the folder.
        identity: what decides the result.
        extra: what else to record.

    Raises:
        InputError: the folder holds another run, or something else under the names needed.
    """
    folder = settings.output_dir
    path = folder / RUN_FILE
    if settings.overwrite and path.is_file():
        # Only what a run writes: a user may keep other files there.
        for pattern in ("model.ckpt-*", ".tmp-*", "checkpoint", "train_log.jsonl", RUN_FILE):
            for old in folder.glob(pattern):
                old.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot use the output folder ({error})", path=folder) from error
    if earlier is None and any(folder.glob("model.ckpt-*")):
        raise InputError(
            "the output folder holds checkpoints of something else",
            path=folder,
            hint="choose another --output_dir",
        )
    if earlier is not None:
        changed = [key for key in identity if earlier.get("identity", {}).get(key) != identity[key]]
        if changed:
            raise InputError(
                f"the output folder holds a run that differs in {', '.join(sorted(changed))}",
                path=folder,
                hint="choose another --output_dir, or --overwrite_output_dir to start again",
            )
    record = {"identity": dict(identity), **extra}
    write_atomically(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def write_model_files(settings: RunSettings, files: ModelFiles, config: BertConfig) -> None:
    """Leave configuration and vocabulary beside the weights, so the folder is a model folder."""
    write_atomically(settings.output_dir / "bert_config.json", to_original_json(config))
    vocabulary = files.vocab_file.read_text(encoding="utf-8")
    write_atomically(settings.output_dir / "vocab.txt", vocabulary)
