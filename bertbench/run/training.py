"""Training and prediction of a run: progress, interruption, evaluation, what can go wrong."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertbench.core.errors import NotFiniteError, OutOfMemoryError, StoppedEarlyError, WorkError
from bertbench.core.interruption import interruptible
from bertbench.core.progress import progress
from bertbench.core.terminal import say
from bertbench.core.workload import Levers, Workload
from bertbench.plan.planner import describe_setting
from bertbench.run.settings import RunSettings
from bertbench.trials.outcome import memory_ran_out, summarise_error

OnProgress = Callable[[int, int], None]
"""Told how many examples are done, and of how many."""

Predict = Callable[[Mapping[str, np.ndarray], OnProgress], np.ndarray]
"""Gives the logits of all rows of a model's inputs, `[2, n, s]` or `[n, labels]`."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """How a task scores a model while it is trained.

    Attributes:
        score: predicts with the model as it is, and compares.
        metric: the score that counts.
        greater_is_better: False for a loss.
    """

    score: Callable[[OnProgress], Mapping[str, float]]
    metric: str
    greater_is_better: bool = True


def train_model(
    variables: Mapping[str, Any],
    workload: Workload,
    settings: RunSettings,
    levers: Levers,
    micro_batch: int,
    data: Mapping[str, np.ndarray],
    num_train_steps: int,
    scorer: Scorer | None = None,
    strategy: Any = None,
) -> dict[str, Any]:
    """Train to the end, or continue; TensorFlow is already under the run's budget.

    Afterwards the variables are the best ones if the settings say so.

    Returns:
        `global_step`; `weights_step`, that of the weights; `train_loss` of the last step, and
        `train_seconds` that all steps took, whichever process made them, if the log has them all;
        and with evaluations `best_step` and `stopped_early`.

    Raises:
        InputError: the folder's checkpoints cannot be continued from.
        OutOfMemoryError: a step did not fit.
        WorkError: a loss that is not finite, or a disk that is full.
        StoppedEarlyError: the user interrupted.
        FolderLostError: the output folder is not there any more.
    """
    import tensorflow as tf

    from finetune.model.weights import load_weights
    from finetune.model_files.checkpoint_files import list_checkpoints
    from finetune.storage.folders import FolderLostError
    from finetune.train.evaluation import (
        BEST_FOLDER,
        EvalRecord,
        Evaluation,
        best_record,
        read_eval_log,
    )
    from finetune.train.optimization import OptimizerSettings
    from finetune.train.step import make_trainer
    from finetune.train.tensorboard import ScalarWriter
    from finetune.train.training import Ending, Listener, Schedule, StepRecord, resume, train

    optimizer = OptimizerSettings(
        settings.learning_rate,
        num_train_steps,
        int(num_train_steps * settings.warmup_proportion),
        bias_correction=settings.adam_bias_correction,
        optimizer=levers.optimizer,
    )
    folder = settings.output_dir
    try:
        step_settings = levers.step_settings(settings.seed)
        trainer = make_trainer(variables, workload.spec, optimizer, step_settings, strategy)
        first = resume(trainer, folder)
    except tf.errors.OpError as error:
        if not _is_out_of_memory(error):
            raise
        what = "out of memory while the optimizer's state was made"
        raise OutOfMemoryError(what, _saved_step(folder)) from error
    replicas = 1 if strategy is None else strategy.num_replicas_in_sync
    schedule = Schedule(
        settings.train_batch_size,
        micro_batch * levers.accumulation_steps * replicas,
        num_train_steps,
        settings.seed,
        settings.save_checkpoints_steps,
    )
    if first:
        say(f"continuing at step {first} of {num_train_steps}")
    done = first
    with (
        interruptible() as should_stop,
        contextlib.ExitStack() as stack,
        progress("train", num_train_steps, "steps", first) as advance,
    ):
        writers = {}
        if settings.tensorboard:
            for name, place in (("train", folder), ("eval", folder / "eval")):
                if name == "train" or scorer is not None:
                    writers[name] = stack.enter_context(contextlib.closing(ScalarWriter(place)))

        def on_step(record: StepRecord) -> None:
            nonlocal done
            done = record.step
            rate = settings.train_batch_size / record.seconds
            advance(record.step, f"loss {record.loss:.4f}, {rate:.1f} examples/s")
            if "train" in writers:
                writers["train"].write(
                    record.step,
                    {
                        "loss": record.loss,
                        "learning_rate": record.learning_rate,
                        "gradient_norm": record.gradient_norm,
                        "examples_per_second": rate,
                    },
                )

        def on_evaluation(record: EvalRecord) -> None:
            scores = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
            say(f"step {record.step}: {scores}")
            if "eval" in writers:
                writers["eval"].write(record.step, record.metrics)

        def on_save() -> None:
            if settings.remote is not None:
                try:
                    settings.remote.push()
                except WorkError as error:
                    # The next one copies all that is missing.
                    say(f"warning: {error}")

        evaluation = None
        if scorer is not None:
            score = scorer.score
            evaluation = Evaluation(
                lambda: score(lambda n, of: advance(done, f"evaluating {n}/{of}")),
                settings.evaluate_every_steps or num_train_steps,
                scorer.metric,
                scorer.greater_is_better,
                settings.early_stopping_patience,
                settings.keep_best,
            )
        try:
            ending = train(
                trainer,
                data,
                schedule,
                folder,
                evaluation=evaluation,
                listener=Listener(on_step, on_evaluation, on_save, should_stop),
            )
        except tf.errors.OpError as error:
            saved = _saved_step(folder)
            if not _is_out_of_memory(error):
                raise WorkError(
                    f"step {done + 1} failed ({_summary(error)}); step {saved} is saved"
                ) from error
            what = f"out of memory in step {done + 1} with {describe_setting(micro_batch, levers)}"
            if should_stop():
                raise StoppedEarlyError(
                    f"{what}; step {saved} is saved: the same command continues"
                ) from error
            raise OutOfMemoryError(what, saved) from error
        except FloatingPointError as error:
            raise WorkError(str(error)) from error
        except FolderLostError:
            raise
        except OSError as error:
            raise WorkError(
                f"{error}; make room or mend the folder: the same command continues"
            ) from error
    step = int(trainer.state.step.numpy())
    if ending is Ending.ASKED:
        raise StoppedEarlyError(
            f"stopped at step {step} of {num_train_steps}; saved: the same command continues"
        )
    result: dict[str, Any] = {
        **_logged_results(folder, step),
        "global_step": step,
        "weights_step": step,
    }
    if evaluation is not None:
        best = best_record(evaluation, read_eval_log(folder))
        result["stopped_early"] = ending is Ending.NO_IMPROVEMENT
        if result["stopped_early"]:
            say(f"stopped at step {step}: no better {scorer and scorer.metric} for a while")
        if best is not None:
            result["best_step"] = best.step
        if settings.keep_best and best is not None and best.step != step:
            kept = [checkpoint.name for checkpoint in list_checkpoints(folder / BEST_FOLDER)]
            if kept == [f"model.ckpt-{best.step}"]:
                load_weights(variables, folder / BEST_FOLDER)
                result["weights_step"] = best.step
                say(f"using the weights of step {best.step}, the best")
            else:
                # As when --keep_best was added to a run that had made its best evaluation before.
                say(f"the weights of step {best.step}, the best, are not there; using the last")
    return result


def _logged_results(folder: Path, step: int) -> dict[str, float]:
    """Loss of the last step and seconds of all; nothing if the log lacks some of them."""
    from finetune.train.training import LOG_NAME, read_log

    log = read_log(folder / LOG_NAME)
    if not log or [record.step for record in log] != list(range(1, step + 1)):
        return {}
    seconds = sum(record.seconds for record in log)
    return {"train_loss": log[-1].loss, "train_seconds": round(seconds, 3)}


def _saved_step(folder: Path) -> int:
    """Optimizer steps of the newest checkpoint; 0 without one."""
    from finetune.model_files.checkpoint_files import list_checkpoints

    saved = [path.name.rpartition("-")[2] for path in list_checkpoints(folder)]
    return int(saved[-1]) if saved else 0


@contextlib.contextmanager
def memory_errors_explained(what: str) -> Iterator[None]:
    """Say in one line that memory ran out while something was done; other errors pass."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        if not _is_out_of_memory(error):
            raise
        raise WorkError(f"out of memory while {what} ({_summary(error)})") from error


def _is_out_of_memory(error: Exception) -> bool:
    return memory_ran_out(type(error).__name__, str(error))


def _summary(error: Exception) -> str:
    return summarise_error(type(error).__name__, str(error))


def make_predict(
    variables: Mapping[str, Any], workload: Workload, batch_size: int, strategy: Any = None
) -> Predict:
    """Make a function that predicts with a model as it is when called; it compiles only once.

    Args:
        variables: the model.
        workload: its configuration and head.
        batch_size: examples at a time, on each replica.
        strategy: see `finetune.train.prediction.make_predictor`.
    """
    from finetune.train.prediction import make_predictor, predict

    predictor = make_predictor(variables, workload.spec, strategy)
    if strategy is not None:
        batch_size *= strategy.num_replicas_in_sync

    def predict_rows(data: Mapping[str, np.ndarray], on_progress: OnProgress) -> np.ndarray:
        total = len(next(iter(data.values())))
        done = 0

        def on_batch(examples: int) -> None:
            nonlocal done
            done += examples
            on_progress(done, total)

        what = f"predicting {batch_size} examples at a time: give a smaller --predict_batch_size"
        with memory_errors_explained(what):
            batches = list(predict(predictor, data, batch_size, on_batch=on_batch))
        logits = np.concatenate(batches, axis=1 if workload.head == "squad" else 0)
        check_finite(np.moveaxis(logits, 1, 0) if workload.head == "squad" else logits)
        return logits

    return predict_rows


def check_finite(logits: np.ndarray) -> None:
    """See that a model gave numbers for all its examples, the rows of the logits.

    Raises:
        NotFiniteError: says for how many it did not, and why that may be.
    """
    wrong = ~np.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))
    if wrong.any():
        raise NotFiniteError(
            f"the model's output is not finite for {int(wrong.sum()):,} of {len(wrong):,} inputs, "
            f"first for number {int(wrong.argmax()) + 1:,}: its weights are damaged, or its "
            "training diverged; train again with a smaller learning rate or in float32"
        )


def predict_with_progress(
    predict: Predict, data: Mapping[str, np.ndarray], description: str
) -> np.ndarray:
    """Predict, and show how far it is."""
    total = len(next(iter(data.values())))
    with progress(description, total, "examples") as advance:
        return predict(data, lambda done, _: advance(done, ""))
