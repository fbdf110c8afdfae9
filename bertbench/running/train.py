"""The training of a run: continued from its last checkpoint, watched, and its errors explained."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from bertbench.core.errors import OutOfMemoryError, StoppedEarlyError, WorkError
from bertbench.core.interruption import interruptible
from bertbench.core.progress import progress
from bertbench.core.terminal import say
from bertbench.core.workload import TrainingStep
from bertbench.planning.planner import describe_setting
from bertbench.running.bind_device import is_out_of_device_memory, is_out_of_memory, summarise
from bertbench.running.listeners import ProgressListener, cloud_copy, event_files, join_listeners
from bertbench.running.model import Model
from bertbench.running.predict import Predict, Scoring
from bertbench.running.settings import RunSettings
from finetune.model.weights import load_weights
from finetune.model_files.checkpoint_files import list_checkpoints
from finetune.storage.folders import FolderLostError
from finetune.train.evaluation import BEST_FOLDER, Evaluation, best_record, read_eval_log
from finetune.train.optimization import OptimizerSettings
from finetune.train.step import Trainer, make_trainer
from finetune.train.training_loop import (
    LOG_NAME,
    Listener,
    Schedule,
    StopReason,
    read_log,
    resume,
    train,
)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a model is to be trained with.

    Attributes:
        settings: of the run; they name the output folder.
        step: micro-batch and levers.
        data: arrays with one row an example.
        num_train_steps: optimizer steps in all.
        scoring: how the model is scored meanwhile; None does not score it.
    """

    settings: RunSettings
    step: TrainingStep
    data: Mapping[str, np.ndarray]
    num_train_steps: int
    scoring: Scoring | None = None

    @property
    def folder(self) -> Path:
        """Where checkpoints and logs are."""
        return self.settings.output_dir


def train_model(model: Model, training: Training, predict: Predict) -> dict[str, Any]:
    """Train to the end, or continue; TensorFlow is already under the run's budget.

    Args:
        model: changed; afterwards it has the best weights if the settings say so.
        training: with what.
        predict: predicts with the model, for its scores.

    Returns:
        `train_loss` of the last step, and `train_seconds` that all steps took in whichever process,
        if the log has them all; `global_step`; `weights_step`, that of the weights; and with
        evaluations `stopped_early` and `best_step`.

    Raises:
        InputError: the folder's checkpoints cannot be continued from.
        OutOfMemoryError: a step did not fit.
        WorkError: a loss that is not finite, or a disk that is full.
        StoppedEarlyError: the user interrupted.
        FolderLostError: the output folder is not there any more.
    """
    trainer, first = _make_trainer(model, training)
    last = training.num_train_steps
    if first:
        say(f"continuing at step {first} of {last}")
    with (
        interruptible() as should_stop,
        event_files(training.settings, evaluates=training.scoring is not None) as event_writer,
        progress("train", last, "steps", first) as advance,
    ):
        shown = ProgressListener(advance, first, training.settings.train_batch_size)
        copier = cloud_copy(training.settings.remote)
        stopper = Listener(should_stop=should_stop)
        evaluation = _make_evaluation(training, predict, shown)
        with _errors_explained(training, shown, should_stop):
            reason = train(
                trainer,
                training.data,
                _make_schedule(training, model.replicas),
                training.folder,
                evaluation=evaluation,
                listener=join_listeners(shown.listener(), event_writer, copier, stopper),
            )
    done = int(trainer.state.step.numpy())
    if reason is StopReason.ASKED:
        raise StoppedEarlyError(
            f"stopped at step {done} of {last}; saved: the same command continues"
        )
    results = {**_logged_results(training.folder, done), "global_step": done, "weights_step": done}
    if evaluation is not None:
        results["stopped_early"] = reason is StopReason.NO_IMPROVEMENT
        if results["stopped_early"]:
            say(f"stopped at step {done}: no better {evaluation.metric} for a while")
        results |= _choose_weights(model, evaluation, training.folder, done)
    return results


def _make_trainer(model: Model, training: Training) -> tuple[Trainer, int]:
    """Make the trainer, and continue from the folder's newest checkpoint.

    Returns:
        The trainer, and the optimizer steps that are done.
    """
    settings, step = training.settings, training.step
    optimizer = OptimizerSettings(
        settings.learning_rate,
        training.num_train_steps,
        int(training.num_train_steps * settings.warmup_proportion),
        bias_correction=settings.adam_bias_correction,
        optimizer=step.levers.optimizer,
    )
    try:
        trainer = make_trainer(
            model.variables,
            step.workload.spec,
            optimizer,
            step.levers.step_settings(settings.seed),
            model.strategy,
        )
        return trainer, resume(trainer, training.folder)
    except tf.errors.OpError as error:
        if not is_out_of_memory(error):
            raise
        what = "out of memory while the optimizer's state was made"
        raise OutOfMemoryError(
            what, _saved_step(training.folder), of_device=is_out_of_device_memory(error)
        ) from error


def _make_schedule(training: Training, replicas: int) -> Schedule:
    settings, step = training.settings, training.step
    return Schedule(
        settings.train_batch_size,
        step.micro_batch * step.levers.accumulation_steps * replicas,
        training.num_train_steps,
        settings.seed,
        settings.save_checkpoints_steps,
    )


def _make_evaluation(
    training: Training, predict: Predict, shown: ProgressListener
) -> Evaluation | None:
    settings, scoring = training.settings, training.scoring
    if scoring is None:
        return None
    return Evaluation(
        lambda: scoring.score(predict, shown.on_evaluation_progress),
        settings.evaluate_every_steps or training.num_train_steps,
        scoring.metric,
        patience=settings.early_stopping_patience,
        keep_best=settings.keep_best,
    )


@contextlib.contextmanager
def _errors_explained(
    training: Training, shown: ProgressListener, should_stop: Callable[[], bool]
) -> Iterator[None]:
    """Say of an error of the training loop which step is saved, and how to continue.

    Raises:
        OutOfMemoryError: a step did not fit.
        StoppedEarlyError: a step did not fit after the user had interrupted.
        WorkError: another error of the device, of the disk, or a number that is not finite.
    """
    try:
        yield
    except tf.errors.OpError as error:
        failed, saved = shown.done + 1, _saved_step(training.folder)
        if not is_out_of_memory(error):
            raise WorkError(
                f"step {failed} failed ({summarise(error)}); step {saved} is saved"
            ) from error
        setting = describe_setting(training.step)
        what = f"out of memory in step {failed} with {setting}"
        if should_stop():
            raise StoppedEarlyError(
                f"{what}; step {saved} is saved: the same command continues"
            ) from error
        raise OutOfMemoryError(what, saved, of_device=is_out_of_device_memory(error)) from error
    except FloatingPointError as error:
        raise WorkError(str(error)) from error
    except FolderLostError:
        raise
    except OSError as error:
        raise WorkError(
            f"{error}; make room or mend the folder: the same command continues"
        ) from error


def _choose_weights(
    model: Model, evaluation: Evaluation, folder: Path, step: int
) -> dict[str, int]:
    """Load the best weights if the settings say so.

    Returns:
        `best_step` if there is one, and `weights_step` if other weights than the last are loaded.
    """
    best = best_record(evaluation, read_eval_log(folder))
    if best is None:
        return {}
    if not evaluation.keep_best or best.step == step:
        return {"best_step": best.step}
    kept = [checkpoint.name for checkpoint in list_checkpoints(folder / BEST_FOLDER)]
    if kept != [f"model.ckpt-{best.step}"]:
        # As when --keep_best was added to a run that had made its best evaluation before.
        say(f"the weights of step {best.step}, the best, are not there; using the last")
        return {"best_step": best.step}
    load_weights(model.variables, folder / BEST_FOLDER)
    say(f"using the weights of step {best.step}, the best")
    return {"best_step": best.step, "weights_step": best.step}


def _logged_results(folder: Path, step: int) -> dict[str, Any]:
    """Loss of the last step and seconds of all; nothing if the log lacks some of them."""
    log = read_log(folder / LOG_NAME)
    if not log or [record.step for record in log] != list(range(1, step + 1)):
        return {}
    seconds = sum(record.seconds for record in log)
    return {"train_loss": log[-1].loss, "train_seconds": round(seconds, 3)}


def _saved_step(folder: Path) -> int:
    """Optimizer steps of the newest checkpoint; 0 without one."""
    saved = [path.name.rpartition("-")[2] for path in list_checkpoints(folder)]
    return int(saved[-1]) if saved else 0
