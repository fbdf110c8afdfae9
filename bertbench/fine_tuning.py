"""The part of a run between data and predictions, alike for all tasks."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from bertbench.devices import Budget
from bertbench.output_folder import hash_arrays, prepare_output, write_model_files
from bertbench.progress import say
from bertbench.running import (
    ModelFiles,
    RunSettings,
    bind_budget,
    choose_levers,
    train_model,
)
from bertbench.workload import Workload
from finetune.errors import InputError
from finetune.recipes import train_steps


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """A model after its training, or as loaded where there was none.

    Attributes:
        variables: the model.
        predict_batch: examples at a time without gradients; no more than the micro-batch, which
            is known to fit.
        results: for `--json`.
    """

    variables: Mapping[str, Any]
    predict_batch: int
    results: dict[str, Any]


def feature_arrays(features: object, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Take the arrays that a model is fed out of a task's columnar features."""
    return {name: getattr(features, name) for name in names}


def fine_tune(
    files: ModelFiles,
    settings: RunSettings,
    budget: Budget,
    workload: Workload,
    task: str,
    train_arrays: Mapping[str, np.ndarray] | None,
    num_examples: int,
) -> FineTuned:
    """Plan, bind the budget, load weights and train; import TensorFlow on the way.

    Args:
        files: the model.
        settings: training and output.
        budget: the device and what may be used of it.
        workload: model, head and sequence length.
        task: name for the record.
        train_arrays: one row an example or window; None does not train.
        num_examples: what steps are counted by.

    Raises:
        InputError: too few examples, nothing fits, the weights do not match, or the output
            folder holds another run.
        bertbench.errors.WorkError: training failed.
    """
    results: dict[str, Any] = {"task": task}
    predict_batch, micro_batch, levers, steps = settings.predict_batch_size, 0, None, 0
    if train_arrays is not None:
        steps = train_steps(num_examples, settings.train_batch_size, settings.num_train_epochs)
        if steps < 1:
            raise InputError(
                f"{num_examples} examples and {settings.num_train_epochs} epochs make no batch of "
                f"{settings.train_batch_size}",
                hint="use a smaller --train_batch_size or more epochs",
            )
        say(f"train: {num_examples} examples, {steps} steps of {settings.train_batch_size}")
        micro_batch, levers = choose_levers(workload, settings, budget)
        predict_batch = min(predict_batch, micro_batch)
    bind_budget(budget)
    from finetune.modeling import create_variables
    from finetune.weights import load_weights

    variables = create_variables(
        workload.config, workload.head, num_labels=workload.num_labels, seed=settings.seed
    )
    if files.init_checkpoint is not None:
        report = load_weights(variables, files.init_checkpoint)
        say(f"weights: {len(report.loaded)} of {len(variables)} from {report.source.name}")
    # The folder is made once everything that can be wrong with the input has been read.
    if train_arrays is None or levers is None:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        return FineTuned(variables, predict_batch, results)
    identity = {
        "workload": json.loads(workload.key()),
        "data_sha256": hash_arrays(train_arrays),
        "initial_weights_sha256": hash_arrays({n: v.numpy() for n, v in variables.items()}),
        "train_batch_size": settings.train_batch_size,
        "learning_rate": settings.learning_rate,
        "num_train_steps": steps,
        "warmup_proportion": settings.warmup_proportion,
        "seed": settings.seed,
        "adam_bias_correction": settings.adam_bias_correction,
    }
    record = {
        "task": task,
        "init_checkpoint": str(files.init_checkpoint),
        "micro_batch": micro_batch,
        "levers": levers.to_json(),
        "budget": budget.to_json(),
    }
    prepare_output(settings, identity, record)
    write_model_files(settings, files, workload.config)
    began = time.monotonic()
    done, loss = train_model(
        variables, workload, settings, levers, micro_batch, train_arrays, steps
    )
    results |= {
        "global_step": done,
        "loss": loss,
        "train_seconds": round(time.monotonic() - began, 3),
        "micro_batch": micro_batch,
        "levers": levers.to_json(),
    }
    return FineTuned(variables, predict_batch, results)
