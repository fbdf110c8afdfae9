"""Runs: what was trained, the loss of each step, and the scores, from a run's output folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bertbench.core.terminal import clean_text
from bertbench.running.output.run_record import read_record
from finetune.errors import InputError
from finetune.model_files.model_folder import RUN_FILE
from finetune.storage.array_cache import hash_file
from finetune.storage.json_files import JsonLines, load_json_lines, warn_of_damage

TRAIN_LOG, EVAL_LOG = "train_log.jsonl", "eval_log.jsonl"
_STEP_COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "seconds")
_MAX_NUMBER = 1e15
_NO_SCORES = {
    "best_step", "global_step", "micro_batch", "skipped_answers", "total", "train_loss",
    "train_seconds", "weights_step",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of `bertbench run`.

    Attributes:
        folder: its output folder.
        record: content of its `run.json`.
        steps: a row for every optimizer step, see `finetune.train.training_loop.StepRecord`.
        evaluations: a row for every evaluation: the step, and a column for each metric.
    """

    folder: Path
    record: Mapping[str, Any]
    steps: pd.DataFrame
    evaluations: pd.DataFrame

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def results(self) -> Mapping[str, Any]:
        """Scores and other results; empty until the run is finished."""
        return _mapping(self.record, "results")

    @property
    def scores(self) -> dict[str, float]:
        """The results that are scores, and not settings, steps, counts or thresholds."""
        return {
            name: float(value)
            for name, value in self.results.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value)
            and name not in _NO_SCORES and not name.endswith(("_thresh", "_threshold", "_total"))
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Values for a table; None for numbers that the record does not have."""
        identity = _mapping(self.record, "identity")
        invocations = self.record.get("invocations")
        last = {}
        if isinstance(invocations, list) and invocations and isinstance(invocations[-1], dict):
            last = invocations[-1]
        steps_down = self.record.get("steps_down")
        return {
            "run": self.name,
            "task": str(self.record.get("task") or "-"),
            "batch": _whole(identity.get("train_batch_size")),
            "micro_batch": _whole(last.get("micro_batch")),
            "checkpointing": str(_mapping(last, "levers").get("checkpointing") or "-"),
            "steps": int(self.steps["step"].max()) if len(self.steps) else 0,
            "of_steps": _whole(identity.get("num_train_steps")),
            "seconds": float(self.steps["seconds"].sum()),
            "steps_down": len(steps_down) if isinstance(steps_down, list) else 0,
            "scores": self.scores,
        }


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_run(folder: Path) -> Run:
    """Read the output folder of a run, which may be unfinished.

    Raises:
        InputError: the folder has no run.
    """
    if not (folder / RUN_FILE).exists():
        raise InputError(
            "no run in this folder", path=folder, hint="give an --output_dir of `bertbench run`"
        )
    record = read_record(folder)
    steps = _read_lines(folder / TRAIN_LOG, _STEP_COLUMNS)
    return Run(folder, record, steps, _read_lines(folder / EVAL_LOG, ("step",)))


def _read_lines(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read the numbers in a file of JSON lines; a missing file has none. Damaged lines are skipped.

    Args:
        path: the file.
        columns: names that every line must have.
    """
    found: list[dict[str, float]] = []
    try:
        lines = load_json_lines(path)
    except OSError:
        lines = JsonLines(())
    for values in lines.values:
        # NaN and numbers far larger than any of a training cannot be drawn on an axis.
        numbers = {
            clean_text(name): float(v)  # a column's name must not have half of a surrogate pair
            for name, v in values.items()
            if isinstance(v, (int, float)) and abs(v) <= _MAX_NUMBER
        }
        if set(columns) <= numbers.keys():
            found.append(numbers)
    warn_of_damage(path, lines.damaged + len(lines.values) - len(found))
    names = dict.fromkeys([*columns, *(name for line in found for name in line)])
    return pd.DataFrame(found, columns=list(names), dtype=float)


def prediction_files(run: Run) -> tuple[Path, Path, Path] | None:
    """Return the files with data, candidates and null odds of a run on SQuAD 2.0.

    Returns:
        None for other runs, and if the data are missing or have changed.
    """
    squad = _mapping(run.record, "squad")
    if not squad.get("version_2_with_negative"):
        return None
    files = (
        Path(str(squad.get("predict_file", ""))),
        run.folder / "nbest_predictions.json",
        run.folder / "null_odds.json",
    )
    if not all(path.is_file() for path in files):
        return None
    try:
        digest = hash_file(files[0])
    except OSError:
        return None
    return files if _mapping(run.record, "predict_file").get("sha256") == digest else None
