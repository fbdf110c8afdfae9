"""The training loop: data order, log, checkpoints, resumption."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import tensorflow as tf

from finetune.errors import InputError
from finetune.storage.files import write_atomically
from finetune.storage.folders import HeldFolder, held_folder, leads_to
from finetune.storage.json_files import build, json_text, load_json_lines, warn_of_damage
from finetune.train.batches import pad_batch
from finetune.train.checkpoints import restore_state, save_state
from finetune.train.evaluation import (
    EvalRecord,
    Evaluation,
    evaluate_now,
    out_of_patience,
    read_eval_log,
    truncate_eval_log,
)
from finetune.train.step import Trainer

_logger = logging.getLogger(__name__)

LOG_NAME = "train_log.jsonl"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a training goes through its data.

    Attributes:
        effective_batch: examples per optimizer step.
        rows: rows per optimizer step, micro-batch times accumulation steps; those beyond the
            effective batch are padding and weigh nothing.
        num_train_steps: optimizer steps in all.
        seed: of the order of the examples.
        save_checkpoints_steps: most optimizer steps between two checkpoints.
        save_checkpoints_seconds: most seconds between two checkpoints.
    """

    effective_batch: int
    rows: int
    num_train_steps: int
    seed: int
    save_checkpoints_steps: int = 1000
    save_checkpoints_seconds: float = 600.0


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One line of the training log.

    Attributes:
        step: optimizer steps done, this one included.
        loss: mean loss of the effective batch, before the update.
        learning_rate: rate of this update.
        gradient_norm: global norm before clipping.
        seconds: duration of the step.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float


def example_order(num_examples: int, seed: int, first: int, count: int) -> np.ndarray:
    """Choose the examples at some places of an endless, shuffled stream.

    The stream is one permutation of all examples after another, each drawn from (seed, epoch)
    alone: any place can be computed without the ones before it, so that a resumed run sees the
    data that an uninterrupted one would. As in the original, a batch may span two epochs.

    Args:
        num_examples: examples in an epoch, at least 1.
        seed: at least 0.
        first: first place, at least 0.
        count: number of places.

    Returns:
        Indices of examples, int64 `[count]`.
    """
    places = np.arange(first, first + count)
    epochs = places // num_examples
    order = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        permutation = np.random.default_rng([seed, int(epoch)]).permutation(num_examples)
        inside = epochs == epoch
        order[inside] = permutation[places[inside] % num_examples]
    return order


@dataclasses.dataclass(frozen=True)
class Listener:
    """What to tell while training; every function may be left out.

    Attributes:
        on_step: called after every step.
        on_evaluation: called after every evaluation.
        on_save: called after every checkpoint.
        should_stop: asked after every step whether the user wants to stop.
    """

    on_step: Callable[[StepRecord], None] = lambda record: None
    on_evaluation: Callable[[EvalRecord], None] = lambda record: None
    on_save: Callable[[], None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False


class Ending(enum.Enum):
    """Why a training ended."""

    FINISHED = "finished"
    ASKED = "asked to stop"
    NO_IMPROVEMENT = "no improvement"


def resume(trainer: Trainer, output_dir: Path) -> int:
    """Continue from the newest readable checkpoint of a folder, if there is one.

    Log lines of later steps are removed, because those steps are about to be done again, and so
    are damaged ones.

    Args:
        trainer: changed.
        output_dir: existing folder.

    Returns:
        Optimizer steps done so far.

    Raises:
        InputError: the folder's checkpoint is of another model, or all are damaged.
    """
    step = restore_state(output_dir, trainer.variables, trainer.state) or 0
    log_path = output_dir / LOG_NAME
    if log_path.exists():
        records, damaged = _read_log(log_path)
        warn_of_damage(log_path, damaged)
        kept = [record for record in records if record.step <= step]
        lines = (json_text(dataclasses.asdict(record)) + "\n" for record in kept)
        write_atomically(log_path, "".join(lines))
    truncate_eval_log(output_dir, step)
    return step


def train(
    trainer: Trainer,
    data: Mapping[str, np.ndarray],
    schedule: Schedule,
    output_dir: Path,
    *,
    evaluation: Evaluation | None = None,
    listener: Listener | None = None,
) -> Ending:
    """Train from the trainer's step (see `resume`) to the end of the schedule.

    Every step appends a line to `train_log.jsonl`. A checkpoint is written at the set intervals,
    at the end, and when asked to stop, so an interruption with notice loses nothing and a kill
    loses the steps since the last checkpoint, which are then repeated identically. An operation
    that fails, as when memory runs out, loses nothing either unless the update had begun, and
    neither does an evaluation.

    Args:
        trainer: model, optimizer and compiled step; changed.
        data: arrays with one row an example.
        schedule: batches, steps and intervals.
        output_dir: existing folder for checkpoints and logs.
        evaluation: what to do between steps.
        listener: whom to tell.

    Returns:
        Why it ended; `trainer.state.step` says where.

    Raises:
        InputError: there is no data.
        FloatingPointError: the loss, the gradient or a score is not finite; the last checkpoint
            stays.
        FolderLostError: the folder was deleted, renamed or replaced.
        OSError: a checkpoint or log could not be written.
        tensorflow.errors.OpError: an operation failed; `ResourceExhaustedError` if a step does not
            fit in memory.
    """
    with held_folder(output_dir) as folder:
        return _train(trainer, data, schedule, folder, evaluation, listener or Listener())


def _train(
    trainer: Trainer,
    data: Mapping[str, np.ndarray],
    schedule: Schedule,
    folder: HeldFolder,
    evaluation: Evaluation | None,
    listener: Listener,
) -> Ending:
    output_dir = folder.path
    if not len(next(iter(data.values()))):
        raise InputError("there are no training examples")
    step = saved_step = int(trainer.state.step.numpy())
    saved_at = time.monotonic()
    ending = None
    # From here on they are in memory: a log that others delete or change is written anew.
    evaluations = read_eval_log(output_dir)
    tired = evaluation is not None and out_of_patience(evaluation, evaluations)

    def save_what_is_whole() -> None:
        """Before an error is raised, which is to be known even if this goes wrong too."""
        if step > saved_step and not _update_began(trainer, step):
            with contextlib.suppress(tf.errors.OpError, OSError):
                folder.check()
                save_state(output_dir, trainer.variables, trainer.state)
                listener.on_save()

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_open_log(output_dir / LOG_NAME))
        while True:
            asked = listener.should_stop()
            folder.check()
            due = evaluation is not None and _evaluation_due(
                evaluation, schedule, step, evaluations
            )
            if evaluation is not None and due and not asked:
                # Before the checkpoint: a run killed in between does both again.
                try:
                    evaluated = evaluate_now(
                        evaluation, trainer.variables, step, folder, evaluations
                    )
                except FloatingPointError:  # Such weights must not be saved.
                    raise
                except Exception:
                    save_what_is_whole()
                    raise
                evaluations = [r for r in evaluations if r.step < step] + [evaluated]
                listener.on_evaluation(evaluated)
                tired = out_of_patience(evaluation, evaluations)
            if asked and (due or step < schedule.num_train_steps):
                ending = Ending.ASKED
            elif step >= schedule.num_train_steps:
                ending = Ending.FINISHED
            elif tired:
                ending = Ending.NO_IMPROVEMENT
            if step > saved_step and (
                ending is not None
                or step - saved_step >= schedule.save_checkpoints_steps
                or time.monotonic() - saved_at >= schedule.save_checkpoints_seconds
            ):
                folder.check()
                save_state(output_dir, trainer.variables, trainer.state)
                listener.on_save()
                saved_at, saved_step = time.monotonic(), step
            if ending is not None:
                return ending
            try:
                record = _one_step(trainer, data, schedule, step)
                step = record.step
                folder.check()
                if not leads_to(output_dir / LOG_NAME, log.fileno()):
                    log = stack.enter_context(_open_log(output_dir / LOG_NAME, log))
                log.write(json_text(dataclasses.asdict(record)) + "\n")
                listener.on_step(record)
            except (tf.errors.OpError, OSError):
                save_what_is_whole()
                raise


def _open_log(path: Path, before: TextIO | None = None) -> TextIO:
    """Open the log to append to it.

    Args:
        path: the log.
        before: the log as it was opened before somebody deleted or replaced it; None if nobody
            did. What was deleted is written again.
    """
    if before is not None:
        with before:
            if not os.path.lexists(path):
                before.seek(0)
                write_atomically(path, before.read())
        _logger.warning("%s was deleted or replaced: going on with what is there now", path)
    return path.open("a+", encoding="utf-8", buffering=1)


def _update_began(trainer: Trainer, step: int) -> bool:
    """Whether a step that failed may have changed the model."""
    if isinstance(trainer.state.step, tf.distribute.DistributedValues):
        # Another replica may be further than the one that is asked.
        return True
    try:
        return int(trainer.state.step.numpy()) != step
    except tf.errors.OpError:  # As of a device that is lost.
        return True


def _evaluation_due(
    evaluation: Evaluation, schedule: Schedule, step: int, evaluations: Sequence[EvalRecord]
) -> bool:
    """Whether this step's evaluation is still to be made, also after an interruption."""
    at_end = step == schedule.num_train_steps
    if not step or not (at_end or step % evaluation.every_steps == 0):
        return False
    return all(record.step != step for record in evaluations)


def _one_step(
    trainer: Trainer, data: Mapping[str, np.ndarray], schedule: Schedule, step: int
) -> StepRecord:
    began = time.monotonic()
    order = example_order(
        len(next(iter(data.values()))),
        schedule.seed,
        step * schedule.effective_batch,
        schedule.effective_batch,
    )
    batch = pad_batch({name: value[order] for name, value in data.items()}, schedule.rows)
    result = trainer.step(batch)
    record = StepRecord(
        step + 1,
        float(result.loss),
        float(result.learning_rate),
        float(result.gradient_norm),
        time.monotonic() - began,
    )
    # With most precisions the update has been made already: such weights must not be saved.
    for what, value in (("loss", record.loss), ("gradient's norm", record.gradient_norm)):
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {value} at step {record.step}; use a smaller learning rate "
                "or, if it is not float32 already, another precision"
            )
    return record


def read_log(path: Path) -> list[StepRecord]:
    """Read a training log; lines that are damaged or cut short are left out."""
    return _read_log(path)[0]


def _read_log(path: Path) -> tuple[list[StepRecord], int]:
    """The steps, and the number of damaged lines between them."""
    lines = load_json_lines(path)
    records = []
    for values in lines.values:
        with contextlib.suppress(InputError):
            records.append(build(StepRecord, values))
    return records, lines.damaged + len(lines.values) - len(records)
