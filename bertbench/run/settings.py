"""What every `run` begins with: its settings, model files, plan and budget."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertbench.core.terminal import say
from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers, Workload, check_layers
from bertbench.devices import tpu
from bertbench.devices.accelerators import check_levers
from bertbench.devices.device import Budget, check_free
from bertbench.devices.step_time import device_rates
from bertbench.memory.allocator.limit import child_environment
from bertbench.plan.calibration import Experience, experience_of
from bertbench.plan.plan_file import read_plan
from bertbench.plan.planner import Plan, describe_entry, make_plan
from bertbench.run.cloud_storage import RemoteFolder
from finetune.errors import InputError
from finetune.model_files.model_folder import RUN_FILE, ModelFiles, find_tokenizer
from finetune.spec.checkpointing import Checkpointing
from finetune.spec.config import BertConfig, from_json_file
from finetune.spec.optimizers import EXACT_OPTIMIZER
from finetune.spec.precisions import EXACT_PRECISION
from finetune.text.tokenization import Tokenizer
from finetune.text.tokenizer_files import NORMALIZATION_KEYS

# Published models pad their vocabulary by at most a few hundred entries.
_USUAL_UNUSED_ROWS = 512


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Flags that both tasks share; names and defaults as in the original's scripts.

    Attributes:
        output_dir: results and checkpoints.
        max_seq_length: tokens per example.
        train_batch_size: effective batch.
        predict_batch_size: examples at a time without gradients.
        learning_rate: peak.
        num_train_epochs: passes over the examples.
        warmup_proportion: part of the steps with a rising rate.
        save_checkpoints_steps: most steps between checkpoints.
        seed: of initialisation, order and dropout.
        adam_bias_correction: see `finetune.train.optimization.OptimizerSettings`.
        do_lower_case: for an uncased model; None: as the model's files say.
        strip_accents: "é" becomes "e"; None likewise.
        tokenize_chinese_chars: each Chinese character is a word of its own; None likewise.
        overwrite: forget an earlier run in the folder.
        plan_file: settings to run with; None makes a plan.
        checkpointing: policy to insist on.
        micro_batch: micro-batch to insist on.
        allowed: precisions and optimizers to choose from; with `micro_batch` the first is taken.
        insist_placement: of the optimizer's state, that of `allowed`; False lets a plan move it.
        resume: continue an interrupted run; False refuses a folder that holds one.
        evaluate_every_steps: optimizer steps between evaluations while training; None for none.
        early_stopping_patience: see `finetune.train.evaluation.Evaluation`.
        keep_best: as there; predictions are then made with the best weights.
        tensorboard: write event files.
        feature_cache: keep SQuAD's features for the next run.
        remote: where the output folder is copied to after every checkpoint, if anywhere.
    """

    output_dir: Path
    max_seq_length: int
    train_batch_size: int
    predict_batch_size: int
    learning_rate: float
    num_train_epochs: float
    warmup_proportion: float
    save_checkpoints_steps: int
    seed: int
    adam_bias_correction: bool = False
    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool | None = None
    overwrite: bool = False
    plan_file: Path | None = None
    checkpointing: Checkpointing | None = None
    micro_batch: int | None = None
    allowed: tuple[Levers, ...] = (Levers(),)
    insist_placement: bool = False
    resume: bool = True
    evaluate_every_steps: int | None = None
    early_stopping_patience: int | None = None
    keep_best: bool = False
    tensorboard: bool = True
    feature_cache: bool = True
    remote: RemoteFolder | None = None

    @property
    def earlier_run(self) -> tuple[Path, ...]:
        """The output folder, if it holds a run that counts."""
        there = not self.overwrite and (self.output_dir / RUN_FILE).is_file()
        return (self.output_dir,) if there else ()

    @property
    def tokenizer_flags(self) -> dict[str, bool | None]:
        """What the flags say of the tokenizer."""
        return {key: getattr(self, key) for key in NORMALIZATION_KEYS}


def load_config_and_tokenizer(
    files: ModelFiles,
    asked: Mapping[str, bool | None],
    max_seq_length: int,
    trained_in: Sequence[Path] = (),
    *,
    insist: bool = False,
) -> tuple[BertConfig, Tokenizer]:
    """Read a model's shape and tokenizer and see that they belong together.

    Args:
        files: the model.
        asked: what flags say of the tokenizer, see
            `finetune.model_files.model_folder.find_tokenizer`.
        max_seq_length: tokens of an example.
        trained_in: output folders of which a run's record counts before the weights' own.
        insist: that something tells whether letters are lowered.

    Raises:
        InputError: unreadable files, a vocabulary larger than the model's, sequences longer than
            the model has positions for, or nothing tells.
    """
    config = from_json_file(files.config_file)
    found = find_tokenizer(files, asked, trained_in)
    tokenizer = found.tokenizer
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the vocabulary has {tokenizer.vocab_size} entries but the model only "
            f"{config.vocab_size} word embeddings",
            path=files.vocab_file,
            hint="use the vocabulary that came with the checkpoint",
        )
    if max_seq_length > config.max_position_embeddings:
        raise InputError(
            f"--max_seq_length {max_seq_length} is more than the model's "
            f"{config.max_position_embeddings} positions",
            path=files.config_file,
        )
    if tokenizer.vocab_size < config.vocab_size - _USUAL_UNUSED_ROWS:
        say(
            f"warning: {files.vocab_file} has {tokenizer.vocab_size} entries for the model's "
            f"{config.vocab_size} word embeddings: is it the model's?"
        )
    if max_seq_length > (found.model_max_length or max_seq_length):
        say(
            f"warning: --max_seq_length {max_seq_length} is more than the model_max_length "
            f"{found.model_max_length} of its tokenizer_config.json"
        )
    if insist and found.guess == "":
        raise InputError(
            "cannot tell whether this is an uncased model",
            path=files.vocab_file,
            hint="say --do_lower_case=true or --do_lower_case=false",
        )
    for remark in found.remarks:
        say(f"warning: {remark}")
    if found.guess is not None:
        lower = tokenizer.normalization.do_lower_case
        by = f"guessed from {found.guess}" if found.guess else "as nothing tells"
        say(f"do_lower_case is {lower}, {by}; --do_lower_case={str(not lower).lower()} changes it")
    return config, tokenizer


def check_segments(config: BertConfig, config_file: Path) -> None:
    """See that a model tells two texts apart, as a task of pairs needs.

    Raises:
        InputError: it has embeddings for one segment only.
    """
    if config.type_vocab_size < 2:
        raise InputError(
            f"type_vocab_size is {config.type_vocab_size}: the model has no embedding for the "
            "second of two texts",
            path=config_file,
            hint="use a model of two segments, or a task of single texts",
        )


def choose_levers(workload: Workload, settings: RunSettings, budget: Budget) -> tuple[int, Levers]:
    """Take micro-batch and levers from the plan file, the flags, or a plan made now.

    Raises:
        InputError: the plan file is unusable or for another batch, or nothing fits.
    """
    replicas = budget.device.replicas
    check = functools.partial(
        check_levers, budget.device.kind, budget.device.name, replicas=replicas
    )
    for levers in settings.allowed:
        check(levers)
    if settings.checkpointing is not None:
        check_layers(workload, settings.checkpointing)
    if settings.plan_file is not None:
        planned = read_plan(settings.plan_file)
        if settings.micro_batch is not None:
            raise InputError(
                "--micro_batch does not go with --plan, which has one", hint="leave one of them out"
            )
        batch = settings.train_batch_size
        if planned.target_batch != batch:
            raise InputError(
                f"the plan is for an effective batch of {planned.target_batch}, not {batch}",
                path=settings.plan_file,
                hint=f"make one with `bertbench plan --target-batch {batch}`",
            )
        if planned.replicas != replicas:
            raise InputError(
                f"the plan is for {planned.replicas} replicas, not {replicas}",
                path=settings.plan_file,
                hint=f"give --num_tpu_cores {planned.replicas}, or another plan"
                if budget.device.tpu is not None
                else f"name {planned.replicas} GPUs, as in --device gpu:0,gpu:1, or give "
                "--use_tpu, or another plan",
            )
        check(planned.levers)
        _check_insisted(settings, planned.levers)
        return planned.micro_batch, planned.levers
    if settings.micro_batch is not None:
        share = -(-settings.train_batch_size // replicas)
        micro_batch = min(settings.micro_batch, share)
        steps = -(-share // micro_batch)
        policy = settings.checkpointing or Checkpointing()
        return micro_batch, dataclasses.replace(
            settings.allowed[0], checkpointing=policy, accumulation_steps=steps
        )
    plan = plan_run(workload, settings, budget)
    say(
        f"plan: {describe_entry(plan.chosen)}, predicted peak "
        f"{format_bytes(plan.chosen.footprint.peak_bytes)} of {format_bytes(budget.budget_bytes)}"
    )
    return plan.chosen.micro_batch, plan.chosen.levers


def plan_run(
    workload: Workload,
    settings: RunSettings,
    budget: Budget,
    experience: Experience | None = None,
    below_bytes: int | None = None,
) -> Plan:
    """Plan what the settings leave open.

    Args:
        workload: what is trained.
        settings: what is asked for.
        budget: the device.
        experience: of the workload on the device; None asks the user's ledger.
        below_bytes: see `bertbench.plan.planner.make_plan`.

    Raises:
        InputError: nothing fits.
    """
    rates = device_rates(budget.device)
    if experience is None:
        experience = experience_of(budget.device, workload, rates)
    return make_plan(
        workload,
        settings.train_batch_size,
        budget.budget_bytes,
        rates,
        device=budget.device.name,
        device_kind=budget.device.kind,
        policies=None if settings.checkpointing is None else [settings.checkpointing],
        allowed=settings.allowed,
        host_if_needed=not settings.insist_placement,
        replicas=budget.device.replicas,
        experience=experience,
        below_bytes=below_bytes,
    )


def _check_insisted(settings: RunSettings, planned: Levers) -> None:
    """See whether a plan file has what the flags insist on.

    Raises:
        InputError: it has not.
    """
    for name, default in (("precision", EXACT_PRECISION), ("optimizer", EXACT_OPTIMIZER)):
        wanted = {getattr(levers, name) for levers in settings.allowed}
        if wanted != {default} and getattr(planned, name) not in wanted:
            raise InputError(
                f"the plan has {name} {getattr(planned, name)}, the flags say {min(wanted)}",
                path=settings.plan_file,
                hint=f"make one with `bertbench plan --{name} {min(wanted)}`",
            )
    if settings.insist_placement and planned.placement != settings.allowed[0].placement:
        raise InputError(
            f"the plan has the optimizer's state on the {planned.placement}, the flags on the "
            f"{settings.allowed[0].placement}",
            path=settings.plan_file,
            hint="make one with `bertbench plan --placement`",
        )


def open_device(budget: Budget) -> Any:
    """Bind this process to the device of a run, or to several that share its batch.

    Returns:
        A `tf.distribute.Strategy` if it has several replicas, else None.

    Raises:
        InputError: see `bind_budget` and `bertbench.devices.tpu.connect`.
        bertbench.core.errors.WorkError: the TPU cannot be reached.
    """
    if budget.device.tpu is not None:
        return tpu.connect(budget.device.tpu)
    bind_budget(budget)
    if budget.device.replicas == 1:
        return None
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([f"GPU:{n}" for n in range(budget.device.replicas)])


def bind_budget(budget: Budget) -> str:
    """Put this process under a budget; TensorFlow must not have been imported.

    Returns:
        TensorFlow's name of the device.

    Raises:
        InputError: the device has less than the budget free, or cannot be used.
    """
    check_free(budget)
    os.environ.update(child_environment(budget))
    from bertbench.memory.allocator.tensorflow_setup import start_tensorflow

    return start_tensorflow(budget)
