"""The command line, run out of memory in its fourth step; the process that goes on is as it is."""

from __future__ import annotations

import os
from typing import Any

import tensorflow as tf

import finetune.train.step
from bertbench.cli import main
from bertbench.cli.options.common import CONTINUE_VARIABLE
from finetune.train.batches import Batch
from finetune.train.step import StepResult, Trainer

make_trainer = finetune.train.step.make_trainer


def short_of_memory(*arguments: Any, **options: Any) -> Trainer:
    trainer = make_trainer(*arguments, **options)

    def step(batch: Batch) -> StepResult:
        if int(trainer.state.step.numpy()) == 3:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return trainer.step(batch)

    return Trainer(trainer.variables, trainer.state, step)


if CONTINUE_VARIABLE not in os.environ:
    finetune.train.step.make_trainer = short_of_memory
main()
