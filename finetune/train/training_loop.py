"""The training loop: order of the examples, log, checkpoints, resumption."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import time
from collections.abc import Callable, Mapping
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
    """How a training goes through its examples.

    Attributes:
        effective_batch: examples of an optimizer step.
        rows: rows of an optimizer step: micro-batch times accumulation steps, on all replicas.
            Those beyond the effective batch are padding with weight 0.
        num_train_steps: all optimizer steps of the training.
        seed: seed of the order of the examples.
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
        step: number of finished optimizer steps, this one included.
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
    """Return which examples are at some places of an endless, shuffled stream.

    The stream consists of one permutation of all examples after the other. Each permutation depends
    only on (seed, epoch), so every place can be computed without those before it, and a resumed run
    sees the same examples as an uninterrupted one. As in the original, a batch may span two epochs.

    Args:
        num_examples: number of examples in an epoch, at least 1.
        seed: seed of the order, at least 0.
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
    """Functions that are called during a training; each may be left out.

    Attributes:
        on_step: called after every step.
        on_evaluation: called after every evaluation.
        on_save: called after every checkpoint.
        should_stop: called before every step; returns True if the user wants to stop.
    """

    on_step: Callable[[StepRecord], None] = lambda record: None
    on_evaluation: Callable[[EvalRecord], None] = lambda record: None
    on_save: Callable[[], None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False


class StopReason(enum.Enum):
    """Why a training stopped."""

    FINISHED = "finished"
    ASKED = "asked to stop"
    NO_IMPROVEMENT = "no improvement"


def resume(trainer: Trainer, output_dir: Path) -> int:
    """Continue from the newest readable checkpoint of a folder, if there is one.

    Lines of later steps are removed from the logs, because these steps will be done again. So are
    damaged lines.

    Args:
        trainer: model and optimizer state; changed.
        output_dir: an existing folder.

    Returns:
        Number of optimizer steps that are done; 0 without a checkpoint.

    Raises:
        InputError: the newest checkpoint is of another model, or all are damaged.
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
) -> StopReason:
    """Train from the trainer's step (see `resume`) to the end of the schedule.

    Every step appends a line to `train_log.jsonl`. A checkpoint is written at the set intervals, at
    the end, and when the listener asks to stop. So a training that is asked to stop loses nothing.
    One that is killed loses the steps since the last checkpoint, which are then repeated
    identically. A checkpoint is also written if an evaluation fails, or an operation of a step, as
    when memory runs out, unless the update had begun.

    Example:
        >>> schedule = Schedule(effective_batch=32, rows=32, num_train_steps=1000, seed=0)
        >>> first = resume(trainer, output_dir)
        >>> train(trainer, data, schedule, output_dir)
        <StopReason.FINISHED: 'finished'>

    Args:
        trainer: model, optimizer and compiled step; changed.
        data: arrays with one row for each example.
        schedule: batches, steps and intervals.
        output_dir: an existing folder, for checkpoints and logs.
        evaluation: when and how the model is evaluated; None for never.
        listener: functions to be called.

    Returns:
        Why it stopped; `trainer.state.step` says at which step.

    Raises:
        InputError: there are no examples.
        FloatingPointError: the loss, the gradient or a score is not finite; the last checkpoint is
            kept.
        FolderLostError: the folder was deleted, renamed or replaced.
        OSError: a checkpoint or log could not be written.
        tensorflow.errors.OpError: an operation failed; `ResourceExhaustedError` if a step does not
            fit into memory.
    """
    if not len(next(iter(data.values()))):
        raise InputError("there are no training examples")
    with held_folder(output_dir) as folder:
        loop = _Loop(trainer, data, schedule, folder, evaluation, listener or Listener())
        return loop.run()


class _Loop:
    """A training while it runs."""

    def __init__(
        self,
        trainer: Trainer,
        data: Mapping[str, np.ndarray],
        schedule: Schedule,
        folder: HeldFolder,
        evaluation: Evaluation | None,
        listener: Listener,
    ) -> None:
        self._trainer, self._data, self._schedule = trainer, data, schedule
        self._folder, self._evaluation, self._listener = folder, evaluation, listener
        self._step = self._saved_step = int(trainer.state.step.numpy())
        self._saved_at = time.monotonic()
        # From here on the evaluations are in memory: a log that somebody deletes or changes is
        # written again.
        self._evaluations = read_eval_log(folder.path)

    def run(self) -> StopReason:
        """See `train`."""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(_open_log(self._folder.path / LOG_NAME))
            while True:
                asked = self._listener.should_stop()
                self._folder.check()
                due = self._evaluation_is_due()
                if self._evaluation is not None and due and not asked:
                    # Before the checkpoint: a run that is killed in between repeats both.
                    self._evaluate(self._evaluation)
                reason = self._stop_reason(asked=asked, due=due)
                self._save_if_due(stops=reason is not None)
                if reason is not None:
                    return reason
                try:
                    record = _one_step(self._trainer, self._data, self._schedule, self._step)
                    self._step = record.step
                    self._folder.check()
                    if not leads_to(self._folder.path / LOG_NAME, log.fileno()):
                        log = stack.enter_context(_open_log(self._folder.path / LOG_NAME, log))
                    log.write(json_text(dataclasses.asdict(record)) + "\n")
                    self._listener.on_step(record)
                except (tf.errors.OpError, OSError):
                    self._save_before_error()
                    raise

    def _evaluation_is_due(self) -> bool:
        """Return whether this step's evaluation is still to be made, also when resumed."""
        if self._evaluation is None or not self._step:
            return False
        at_end = self._step == self._schedule.num_train_steps
        if not at_end and self._step % self._evaluation.every_steps:
            return False
        return all(record.step != self._step for record in self._evaluations)

    def _evaluate(self, evaluation: Evaluation) -> None:
        try:
            record = evaluate_now(
                evaluation, self._trainer.variables, self._step, self._folder, self._evaluations
            )
        except FloatingPointError:  # Such weights must not be saved.
            raise
        except Exception:
            self._save_before_error()
            raise
        self._evaluations = [r for r in self._evaluations if r.step < self._step] + [record]
        self._listener.on_evaluation(record)

    def _stop_reason(self, *, asked: bool, due: bool) -> StopReason | None:
        """Return why to stop before the next step; None to go on.

        Args:
            asked: the user wants to stop.
            due: an evaluation was due.
        """
        finished = self._step >= self._schedule.num_train_steps
        if asked and (due or not finished):
            return StopReason.ASKED
        if finished:
            return StopReason.FINISHED
        if self._evaluation is not None and out_of_patience(self._evaluation, self._evaluations):
            return StopReason.NO_IMPROVEMENT
        return None

    def _save_if_due(self, *, stops: bool) -> None:
        done, schedule = self._step - self._saved_step, self._schedule
        if done > 0 and (
            stops
            or done >= schedule.save_checkpoints_steps
            or time.monotonic() - self._saved_at >= schedule.save_checkpoints_seconds
        ):
            self._folder.check()
            self._save()
            self._saved_at, self._saved_step = time.monotonic(), self._step

    def _save_before_error(self) -> None:
        """Save what the last whole step has left; the error is raised even if this fails too."""
        if self._step > self._saved_step and not _update_began(self._trainer, self._step):
            with contextlib.suppress(tf.errors.OpError, OSError):
                self._folder.check()
                self._save()

    def _save(self) -> None:
        save_state(self._folder.path, self._trainer.variables, self._trainer.state)
        self._listener.on_save()


def _open_log(path: Path, before: TextIO | None = None) -> TextIO:
    """Open the log to append to it.

    Args:
        path: the log.
        before: the open log that somebody has deleted or replaced since; None if nobody has. A log
            that was deleted is written again.
    """
    if before is not None:
        with before:
            if not os.path.lexists(path):
                before.seek(0)
                write_atomically(path, before.read())
        _logger.warning("%s was deleted or replaced: going on with what is there now", path)
    return path.open("a+", encoding="utf-8", buffering=1)


def _update_began(trainer: Trainer, step: int) -> bool:
    """Return whether a step that failed may have changed the model."""
    if isinstance(trainer.state.step, tf.distribute.DistributedValues):
        # Another replica may have done more than the one whose step is read.
        return True
    try:
        return int(trainer.state.step.numpy()) != step
    except tf.errors.OpError:  # For example, the device is lost.
        return True


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
    # With most precisions the update is already done: such weights must not be saved.
    for what, value in (("loss", record.loss), ("gradient's norm", record.gradient_norm)):
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {value} at step {record.step}; use a smaller learning rate "
                "or, if it is not float32 already, another precision"
            )
    return record


def read_log(path: Path) -> list[StepRecord]:
    """Read a training log, without lines that are damaged or cut short."""
    return _read_log(path)[0]


def _read_log(path: Path) -> tuple[list[StepRecord], int]:
    """Return the steps, and the number of damaged lines."""
    lines = load_json_lines(path)
    records = []
    for values in lines.values:
        with contextlib.suppress(InputError):
            records.append(build(StepRecord, values))
    return records, lines.damaged + len(lines.values) - len(records)
