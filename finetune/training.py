"""The training loop and the prediction loop: data order, log, checkpoints, resumption."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from finetune.checkpoints import restore_state, save_state
from finetune.errors import InputError
from finetune.files import write_atomically
from finetune.step import Batch, Trainer, pad_batch

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


def train(
    trainer: Trainer,
    data: Mapping[str, np.ndarray],
    schedule: Schedule,
    output_dir: Path,
    *,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train to the end of the schedule, from the newest checkpoint of the folder if there is one.

    Every step appends a line to `train_log.jsonl`. A checkpoint is written at the set intervals,
    at the end, and when asked to stop, so an interruption with notice loses nothing and a kill
    loses the steps since the last checkpoint, which are then repeated identically.

    Args:
        trainer: model, optimizer and compiled step; changed.
        data: arrays with one row an example.
        schedule: batches, steps and intervals.
        output_dir: existing folder for checkpoints and log.
        on_step: called after every step.
        should_stop: asked after every step.

    Returns:
        Optimizer steps done: fewer than the schedule's only when asked to stop.

    Raises:
        InputError: there is no data, or the folder's checkpoint is of another model.
        FloatingPointError: the loss is not finite; the last checkpoint stays as it was.
        tensorflow.errors.ResourceExhaustedError: a step does not fit in memory.
    """
    num_examples = len(next(iter(data.values())))
    if not num_examples:
        raise InputError("there are no training examples")
    step = restore_state(output_dir, trainer.variables, trainer.state) or 0
    log_path = output_dir / LOG_NAME
    if log_path.exists():
        # Steps after the checkpoint are about to be done again.
        _truncate_log(log_path, step)
    saved_at, saved_step = time.monotonic(), step
    with log_path.open("a", encoding="utf-8", buffering=1) as log:
        while step < schedule.num_train_steps:
            began = time.monotonic()
            order = example_order(
                num_examples,
                schedule.seed,
                step * schedule.effective_batch,
                schedule.effective_batch,
            )
            batch = pad_batch({name: value[order] for name, value in data.items()}, schedule.rows)
            result = trainer.step(batch)
            loss = float(result.loss)
            step += 1
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}; use a smaller learning rate"
                )
            record = StepRecord(
                step,
                loss,
                float(result.learning_rate),
                float(result.gradient_norm),
                time.monotonic() - began,
            )
            log.write(json.dumps(dataclasses.asdict(record)) + "\n")
            on_step(record)
            stop = should_stop()
            if (
                stop
                or step == schedule.num_train_steps
                or step - saved_step >= schedule.save_checkpoints_steps
                or time.monotonic() - saved_at >= schedule.save_checkpoints_seconds
            ):
                save_state(output_dir, trainer.variables, trainer.state)
                saved_at, saved_step = time.monotonic(), step
            if stop:
                break
    return step


def read_log(path: Path) -> list[StepRecord]:
    """Read a training log; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(StepRecord(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            break
    return records


def _truncate_log(path: Path, last_step: int) -> None:
    kept = [record for record in read_log(path) if record.step <= last_step]
    write_atomically(
        path, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in kept)
    )


def predict(
    predictor: Callable[[Batch], tf.Tensor],
    data: Mapping[str, np.ndarray],
    batch_size: int,
    *,
    on_batch: Callable[[int], None] = lambda examples: None,
) -> Iterator[np.ndarray]:
    """Run a model over all examples in their order.

    Args:
        predictor: from `finetune.step.make_predictor`.
        data: arrays with one row an example.
        batch_size: examples at a time.
        on_batch: called with the number of examples of every finished batch.

    Yields:
        Logits, batch after batch.
    """
    num_examples = len(next(iter(data.values())))
    for start in range(0, num_examples, batch_size):
        batch = {name: value[start : start + batch_size] for name, value in data.items()}
        yield predictor(batch).numpy()
        on_batch(len(next(iter(batch.values()))))
