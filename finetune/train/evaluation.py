"""Evaluation during training: its log, the best weights, and when to stop early.

All decisions follow from `eval_log.jsonl`, so a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune.model.modeling import Variables
from finetune.storage.files import write_atomically
from finetune.storage.folders import HeldFolder
from finetune.storage.json_files import json_text, load_json_lines, warn_of_damage
from finetune.train.checkpoints import save_weights

EVAL_LOG_NAME = "eval_log.jsonl"
BEST_FOLDER = "best"

Metrics = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When and how a model is evaluated during its training.

    Attributes:
        evaluate: scores the model as it is when called.
        every_steps: optimizer steps between two evaluations; the last step is evaluated too.
        metric: name of the score that decides which weights are best.
        greater_is_better: False for a loss.
        patience: stop after this many evaluations in a row without a new best one; None for never.
        keep_best: write the best weights to the folder `best`.
    """

    evaluate: Callable[[], Metrics]
    every_steps: int
    metric: str
    greater_is_better: bool = True
    patience: int | None = None
    keep_best: bool = False


@dataclasses.dataclass(frozen=True)
class EvalRecord:
    """One line of the evaluation log.

    Attributes:
        step: optimizer steps that the weights have seen.
        metrics: the scores.
    """

    step: int
    metrics: Metrics


def read_eval_log(output_dir: Path) -> list[EvalRecord]:
    """Read a folder's evaluations, without lines that are damaged or cut short."""
    try:
        return _read_log(output_dir)[0]
    except FileNotFoundError:
        return []


def _read_log(output_dir: Path) -> tuple[list[EvalRecord], int]:
    """Return the evaluations, and the number of damaged lines."""
    lines = load_json_lines(output_dir / EVAL_LOG_NAME)
    records = []
    for values in lines.values:
        step = values.pop("step", None)
        # JSON has no NaN, which is written as null.
        scores = {name: math.nan if value is None else value for name, value in values.items()}
        if type(step) is int and all(type(score) in (int, float) for score in scores.values()):
            records.append(EvalRecord(step, scores))
    return records, lines.damaged + len(lines.values) - len(records)


def truncate_eval_log(output_dir: Path, last_step: int) -> None:
    """Remove damaged lines, and the evaluations of steps after `last_step`, which come again."""
    try:
        records, damaged = _read_log(output_dir)
    except FileNotFoundError:
        return
    warn_of_damage(output_dir / EVAL_LOG_NAME, damaged)
    if records or damaged:
        _write_log(output_dir, [record for record in records if record.step <= last_step])


def evaluate_now(
    evaluation: Evaluation,
    variables: Variables,
    step: int,
    folder: HeldFolder,
    earlier: Sequence[EvalRecord],
) -> EvalRecord:
    """Score the model, log it, and keep its weights if they are the best so far.

    The weights are written before the log says that they are the best.

    Args:
        evaluation: how to score the model, and whether to keep its weights.
        variables: the model.
        step: number of optimizer steps that the weights have had.
        folder: where the log is.
        earlier: the earlier evaluations; the log is written again with them.

    Raises:
        FloatingPointError: a score is not finite.
        OSError: the folder is gone, or cannot be written to.
    """
    record = EvalRecord(step, {name: float(v) for name, v in evaluation.evaluate().items()})
    for name, value in record.metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the evaluation's {name} is {value} after step {step}; use a smaller learning "
                "rate or, if it is not float32 already, another precision"
            )
    records = [r for r in earlier if r.step < step] + [record]
    folder.check()
    if evaluation.keep_best and best_record(evaluation, records) is record:
        save_weights(folder.path / BEST_FOLDER, variables, step)
    _write_log(folder.path, records)
    return record


def best_record(evaluation: Evaluation, records: list[EvalRecord]) -> EvalRecord | None:
    """Find the best evaluation that has a finite score; of several equal ones the first.

    Returns:
        None if no evaluation has a finite score.
    """
    best: EvalRecord | None = None
    best_score = -math.inf
    for record in records:
        score = _score(evaluation, record)
        if score > best_score:
            best, best_score = record, score
    return best


def out_of_patience(evaluation: Evaluation, records: list[EvalRecord]) -> bool:
    """Return whether none of the last `patience` evaluations was a new best one."""
    if evaluation.patience is None or not records:
        return False
    best = best_record(evaluation, records)
    since = len(records) - (0 if best is None else records.index(best) + 1)
    return since >= evaluation.patience


def _score(evaluation: Evaluation, record: EvalRecord) -> float:
    value = record.metrics.get(evaluation.metric, math.nan)
    if not math.isfinite(value):
        return -math.inf
    return value if evaluation.greater_is_better else -value


def _write_log(output_dir: Path, records: list[EvalRecord]) -> None:
    lines = (json_text({"step": r.step, **r.metrics}) + "\n" for r in records)
    write_atomically(output_dir / EVAL_LOG_NAME, "".join(lines))
