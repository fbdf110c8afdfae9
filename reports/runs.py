"""Run folders: what was trained, how the loss went, and what came out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bertbench.output_folder import RUN_FILE
from finetune.errors import InputError

TRAIN_LOG, EVAL_LOG = "train_log.jsonl", "eval_log.jsonl"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where.
        record: what is in its `run.json`.
        steps: a row for every optimizer step, see `finetune.training.StepRecord`.
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
        """Scores and the like; empty as long as it is not done."""
        results = self.record.get("results", {})
        return results if isinstance(results, dict) else {}

    @property
    def scores(self) -> dict[str, float]:
        """The results that are numbers and no settings."""
        skipped = {"micro_batch", "global_step", "train_seconds", "train_loss", "skipped_answers"}
        return {
            name: float(value)
            for name, value in self.results.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
            and name not in skipped
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """What a table says of it."""
        identity = self.record.get("identity", {})
        invocations = self.record.get("invocations") or [{}]
        levers = invocations[-1].get("levers", {})
        return {
            "run": self.name,
            "task": self.record.get("task", "-"),
            "batch": identity.get("train_batch_size"),
            "micro_batch": invocations[-1].get("micro_batch"),
            "checkpointing": levers.get("checkpointing"),
            "steps": int(self.steps["step"].max()) if len(self.steps) else 0,
            "of_steps": identity.get("num_train_steps"),
            "seconds": float(self.steps["seconds"].sum()) if len(self.steps) else 0.0,
            "steps_down": len(self.record.get("steps_down", [])),
            "scores": self.scores,
        }


def read_run(folder: Path) -> Run:
    """Read a run's folder, which may be of a run that is not done.

    Raises:
        InputError: there is no run in it.
    """
    path = folder / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"no run in this folder ({error.strerror})",
            path=path,
            hint="give an --output_dir of `bertbench run`",
        ) from error
    except ValueError as error:
        raise InputError(f"not the record of a run ({error})", path=path) from error
    if not isinstance(record, dict):
        raise InputError("not the record of a run", path=path)
    steps = _read_lines(folder / TRAIN_LOG)
    evaluations = [line for line in _read_lines(folder / EVAL_LOG) if "step" in line]
    columns = ("step", "loss", "learning_rate", "gradient_norm", "seconds")
    frame = pd.DataFrame([line for line in steps if set(columns) <= line.keys()], columns=columns)
    return Run(folder, record, frame, pd.DataFrame(evaluations))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, up to one that was cut short; none without the file."""
    found: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            break
        if isinstance(value, dict):
            found.append(value)
    return found


def prediction_files(run: Run) -> tuple[Path, Path, Path] | None:
    """Data, answers and null odds of a run on SQuAD 2.0 whose data are still as they were."""
    squad = run.record.get("squad", {})
    if not isinstance(squad, dict) or not squad.get("version_2_with_negative"):
        return None
    described = run.record.get("predict_file", {})
    files = (
        Path(str(squad.get("predict_file", ""))),
        run.folder / "predictions.json",
        run.folder / "null_odds.json",
    )
    if not all(path.is_file() for path in files):
        return None
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    return files if described.get("sha256") == digest else None
