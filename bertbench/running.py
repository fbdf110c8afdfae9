"""What every `run` does: model files, plan, training, prediction."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from bertbench.bytes import format_bytes
from bertbench.cost import device_rates
from bertbench.devices import Budget, check_free, child_environment
from bertbench.errors import StoppedEarlyError, WorkError
from bertbench.planner import PlanEntry, make_plan, read_plan
from bertbench.progress import progress, say
from bertbench.workload import Levers, Workload
from finetune.checkpointing import Checkpointing
from finetune.config import BertConfig, from_json_file
from finetune.errors import InputError
from finetune.tokenization import Tokenizer, check_case, load_tokenizer

_CONFIG_NAMES = ("bert_config.json", "config.json")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where a model comes from.

    Attributes:
        config_file: its shape.
        vocab_file: its vocabulary.
        init_checkpoint: its weights; None starts from random ones.
    """

    config_file: Path
    vocab_file: Path
    init_checkpoint: Path | None


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Flags that both tasks share; names and defaults as in the original's scripts.

    Attributes:
        output_dir: results and checkpoints.
        max_seq_length: tokens per example.
        do_lower_case: for an uncased model.
        train_batch_size: effective batch.
        predict_batch_size: examples at a time without gradients.
        learning_rate: peak.
        num_train_epochs: passes over the examples.
        warmup_proportion: part of the steps with a rising rate.
        save_checkpoints_steps: most steps between checkpoints.
        seed: of initialisation, order and dropout.
        adam_bias_correction: see `finetune.optimization.OptimizerSettings`.
        overwrite: forget an earlier run in the folder.
        plan_file: settings to run with; None makes a plan.
        checkpointing: policy to insist on.
        micro_batch: micro-batch to insist on.
    """

    output_dir: Path
    max_seq_length: int
    do_lower_case: bool
    train_batch_size: int
    predict_batch_size: int
    learning_rate: float
    num_train_epochs: float
    warmup_proportion: float
    save_checkpoints_steps: int
    seed: int
    adam_bias_correction: bool = False
    overwrite: bool = False
    plan_file: Path | None = None
    checkpointing: Checkpointing | None = None
    micro_batch: int | None = None


def find_model_files(
    model_dir: Path | None,
    config_file: Path | None,
    vocab_file: Path | None,
    init_checkpoint: Path | None,
) -> ModelFiles:
    """Combine a model's folder with files that are named one by one, which come first.

    Raises:
        InputError: a file is neither named nor in the folder.
    """

    def locate(given: Path | None, names: tuple[str, ...], flag: str) -> Path:
        if given is not None:
            if not given.is_file():
                raise InputError(f"no such file, given as {flag}", path=given)
            return given
        if model_dir is None:
            raise InputError(f"{flag} is missing", hint=f"give --model FOLDER or {flag} FILE")
        for name in names:
            if (model_dir / name).is_file():
                return model_dir / name
        raise InputError(
            f"no {' or '.join(names)} in the model's folder",
            path=model_dir,
            hint=f"give it with {flag}",
        )

    if model_dir is not None and not model_dir.is_dir():
        raise InputError("no such model folder", path=model_dir)
    return ModelFiles(
        locate(config_file, _CONFIG_NAMES, "--bert_config_file"),
        locate(vocab_file, ("vocab.txt",), "--vocab_file"),
        init_checkpoint or model_dir,
    )


def load_config_and_tokenizer(
    files: ModelFiles, do_lower_case: bool, max_seq_length: int
) -> tuple[BertConfig, Tokenizer]:
    """Read a model's shape and vocabulary and see that they belong together.

    Raises:
        InputError: unreadable files, a vocabulary of another size than the model's, or sequences
            longer than the model has positions for.
    """
    config = from_json_file(files.config_file)
    tokenizer = load_tokenizer(files.vocab_file, do_lower_case=do_lower_case)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the vocabulary has {tokenizer.vocab_size} entries but the model only "
            f"{config.vocab_size} word embeddings",
            path=files.vocab_file,
            hint="use the vocab.txt that came with the checkpoint",
        )
    if tokenizer.vocab_size < config.vocab_size - 512:
        # Published models pad their vocabulary by at most a few hundred entries.
        raise InputError(
            f"the vocabulary has only {tokenizer.vocab_size} entries for the model's "
            f"{config.vocab_size} word embeddings",
            path=files.vocab_file,
            hint="use the vocab.txt that came with the checkpoint",
        )
    if max_seq_length > config.max_position_embeddings:
        raise InputError(
            f"--max_seq_length {max_seq_length} is more than the model's "
            f"{config.max_position_embeddings} positions",
            path=files.config_file,
        )
    warning = check_case(do_lower_case, str(files.init_checkpoint or files.config_file))
    if warning:
        say(f"warning: {warning}")
    return config, tokenizer


def choose_levers(workload: Workload, settings: RunSettings, budget: Budget) -> tuple[int, Levers]:
    """Take micro-batch and levers from the plan file, the flags, or a plan made now.

    Raises:
        InputError: the plan file is unusable or for another batch, or nothing fits.
    """
    target_batch = settings.train_batch_size
    if settings.plan_file is not None:
        planned_batch, micro_batch, levers = read_plan(settings.plan_file)
        if planned_batch != target_batch:
            raise InputError(
                f"the plan is for an effective batch of {planned_batch}, not {target_batch}",
                path=settings.plan_file,
                hint=f"make one with `bertbench plan --target-batch {target_batch}`",
            )
        return micro_batch, levers
    if settings.micro_batch is not None:
        micro_batch = min(settings.micro_batch, target_batch)
        steps = -(-target_batch // micro_batch)
        policy = settings.checkpointing or Checkpointing()
        return micro_batch, Levers(checkpointing=policy, accumulation_steps=steps)
    plan = make_plan(
        workload,
        target_batch,
        budget.budget_bytes,
        device_rates(budget.device),
        device=budget.device.name,
        device_kind=budget.device.kind,
        policies=None if settings.checkpointing is None else [settings.checkpointing],
    )
    say(
        f"plan: {describe_entry(plan.chosen)}, predicted peak "
        f"{format_bytes(plan.chosen.footprint.peak_bytes)} of {format_bytes(budget.budget_bytes)}"
    )
    return plan.chosen.micro_batch, plan.chosen.levers


def describe_entry(entry: PlanEntry) -> str:
    """Write a setting as `3 x 11, checkpointing full`."""
    return (
        f"{entry.levers.accumulation_steps} x {entry.micro_batch}, "
        f"checkpointing {entry.levers.checkpointing}"
    )


def bind_budget(budget: Budget) -> str:
    """Put this process under a budget; TensorFlow must not have been imported.

    Returns:
        TensorFlow's name of the device.

    Raises:
        InputError: the device has less than the budget free, or cannot be used.
    """
    check_free(budget)
    os.environ.update(child_environment(budget))
    from bertbench.runtime import start_tensorflow

    return start_tensorflow(budget)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a question that the work asks between steps.

    Yields:
        A function that says whether to stop. A second Ctrl-C interrupts at once.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_model(
    variables: Mapping[str, Any],
    workload: Workload,
    settings: RunSettings,
    levers: Levers,
    micro_batch: int,
    data: Mapping[str, np.ndarray],
    num_train_steps: int,
) -> tuple[int, float]:
    """Train to the end, or continue; TensorFlow is already under the run's budget.

    Returns:
        Steps done, and the last step's loss (NaN if no step was left to do).

    Raises:
        WorkError: out of memory, or a loss that is not finite.
        StoppedEarlyError: the user interrupted.
    """
    import tensorflow as tf

    from finetune.checkpoints import list_checkpoints
    from finetune.optimization import OptimizerSettings
    from finetune.step import make_trainer
    from finetune.training import Schedule, StepRecord, train

    optimizer = OptimizerSettings(
        settings.learning_rate,
        num_train_steps,
        int(num_train_steps * settings.warmup_proportion),
        bias_correction=settings.adam_bias_correction,
    )
    trainer = make_trainer(
        variables,
        workload.config,
        workload.head,
        workload.seq_len,
        optimizer,
        accumulation_steps=levers.accumulation_steps,
        checkpointing=levers.checkpointing,
        xla=levers.xla,
        seed=settings.seed,
    )
    schedule = Schedule(
        settings.train_batch_size,
        micro_batch * levers.accumulation_steps,
        num_train_steps,
        settings.seed,
        settings.save_checkpoints_steps,
    )
    checkpoints = list_checkpoints(settings.output_dir)
    first = int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else 0
    if first:
        say(f"continuing at step {first} of {num_train_steps}")
    last_loss = float("nan")
    with (
        interruptible() as should_stop,
        progress("train", num_train_steps, "steps", first) as advance,
    ):

        def on_step(record: StepRecord) -> None:
            nonlocal last_loss
            last_loss = record.loss
            rate = settings.train_batch_size / record.seconds
            advance(record.step, f"loss {record.loss:.4f}, {rate:.1f} examples/s")

        try:
            done = train(
                trainer,
                data,
                schedule,
                settings.output_dir,
                on_step=on_step,
                should_stop=should_stop,
            )
        except tf.errors.ResourceExhaustedError as error:
            raise WorkError(
                f"out of memory with micro-batch {micro_batch} and checkpointing "
                f"{levers.checkpointing} ({str(error).splitlines()[0]}); the last checkpoint is "
                "kept: give a smaller --memory, which plans smaller, and run again"
            ) from error
        except FloatingPointError as error:
            raise WorkError(str(error)) from error
    if done < num_train_steps:
        raise StoppedEarlyError(
            f"stopped at step {done} of {num_train_steps}; saved: the same command continues"
        )
    return done, last_loss


def predict_all(
    variables: Mapping[str, Any],
    workload: Workload,
    data: Mapping[str, np.ndarray],
    batch_size: int,
    description: str,
) -> list[np.ndarray]:
    """Logits of all examples, batch after batch, with progress."""
    from finetune.step import make_predictor
    from finetune.training import predict

    predictor = make_predictor(variables, workload.config, workload.head, workload.seq_len)
    total = len(next(iter(data.values())))
    done = 0
    with progress(description, total, "examples") as advance:

        def on_batch(examples: int) -> None:
            nonlocal done
            done += examples
            advance(done, "")

        return list(predict(predictor, data, batch_size, on_batch=on_batch))
