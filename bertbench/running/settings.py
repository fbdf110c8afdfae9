"""What a run is asked for, whatever its task."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bertbench.core.workload import Levers
from bertbench.hardware.device import Budget
from bertbench.running.output.cloud_storage import RemoteFolder
from finetune.model_files.model_folder import RUN_FILE, ModelFiles
from finetune.spec.checkpointing import Checkpointing
from finetune.text.tokenizer_files import NORMALIZATION_KEYS


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
        do_lower_case: lower-case the input, for an uncased model; None does as the model's files
            say.
        strip_accents: "é" becomes "e"; None as above.
        tokenize_chinese_chars: each Chinese character is a word of its own; None as above.
        overwrite: forget an earlier run in the folder.
        plan_file: a plan to train with; None makes one.
        checkpointing: policy that the plan must have; None leaves it open.
        micro_batch: micro-batch to train with instead of planning; None leaves it open.
        allowed: precisions and optimizers to choose from; with `micro_batch` the first is taken.
        insist_placement: keep the optimizer's state where `allowed` has it; False lets a plan
            move it to the host's memory.
        resume: continue an interrupted run; False refuses a folder that holds one.
        evaluate_every_steps: optimizer steps between evaluations while training; None for none.
        early_stopping_patience: see `finetune.train.evaluation.Evaluation`.
        keep_best: keep the weights of the best evaluation, and predict with them.
        tensorboard: write event files.
        feature_cache: keep SQuAD's features for the next run.
        remote: the folder in cloud storage to which the output folder is copied after every
            checkpoint; None for none.
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
        """The output folder if it holds a run that is not to be overwritten, else nothing."""
        there = not self.overwrite and (self.output_dir / RUN_FILE).is_file()
        return (self.output_dir,) if there else ()

    @property
    def tokenizer_flags(self) -> dict[str, bool | None]:
        """What the flags say of the tokenizer."""
        return {key: getattr(self, key) for key in NORMALIZATION_KEYS}


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """What a run is asked for, whatever its task.

    Attributes:
        files: of the model.
        settings: of training and output.
        budget: the device, and how many of its bytes the allocator may use.
    """

    files: ModelFiles
    settings: RunSettings
    budget: Budget
