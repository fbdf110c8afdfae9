"""The part of a run that is alike for all tasks: from data to a trained model that predicts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bertbench.core.errors import OutOfMemoryError, WorkError
from bertbench.core.terminal import say
from bertbench.core.workload import TrainingStep, Workload
from bertbench.memory.prediction import inference_batch
from bertbench.running.bind_device import open_device
from bertbench.running.choose_plan import choose_step
from bertbench.running.model import Model, create_model, load_initial_weights, random_head_names
from bertbench.running.oom_recovery import step_down
from bertbench.running.output.run_folder import OutputFolder, open_output, write_model_files
from bertbench.running.output.run_record import RunDescription, describe_file, hash_arrays
from bertbench.running.predict import Predict, Scoring, make_predict
from bertbench.running.settings import RunRequest, RunSettings
from finetune.errors import InputError
from finetune.model_files.checkpoint_files import PREFIX, list_checkpoints
from finetune.spec.recipes import train_steps
from finetune.storage.folders import FolderLostError
from finetune.text.tokenization import Tokenizer

if TYPE_CHECKING:
    from bertbench.running.train import Training


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a model is trained on.

    Attributes:
        arrays: by name, with one row an example, or a window of one.
        num_examples: what steps are counted by.
    """

    arrays: Mapping[str, np.ndarray]
    num_examples: int


@dataclasses.dataclass(frozen=True)
class Job:
    """What a task wants done with a model.

    Attributes:
        request: the model's files, the settings and the device.
        task: name of the task, for the record.
        workload: model, head and sequence length.
        tokenizer: with which the arrays were made.
        data: to train on; None does not train.
        scoring: how the model is scored while it is trained; None does not score it.
        details: what else belongs in `run.json`.
        labels: of a classifier, in the order in which its rows are to be.
    """

    request: RunRequest
    task: str
    workload: Workload
    tokenizer: Tokenizer
    data: TrainingData | None
    scoring: Scoring | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """A model after its training, or as loaded where there was none.

    Attributes:
        predict: predicts with it, no more examples at a time than fit, see
            `bertbench.memory.prediction.inference_batch`.
        results: for `--json`; `weights_step` says how many optimizer steps its weights have seen,
            where that is known.
        output: the output folder, which no other run can write to.
    """

    predict: Predict
    results: dict[str, Any]
    output: OutputFolder


def feature_arrays(features: object, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Take the arrays that a model is fed out of a task's columnar features."""
    return {name: getattr(features, name) for name in names}


@contextlib.contextmanager
def fine_tune(job: Job) -> Iterator[FineTuned]:
    """Plan, bind the budget, load weights and train; import TensorFlow on the way.

    Without training, the weights are those that an earlier training left in the output folder,
    as in the original; only where there are none, those of `--init_checkpoint`.

    Args:
        job: what to do.

    Yields:
        The model. In the block the output folder is held, so that nobody else writes to it.

    Raises:
        InputError: too few examples, nothing fits, the weights do not match, or the output
            folder holds another run.
        bertbench.core.errors.SteppedDownError: a step ran out of memory. What was done is saved,
            and the same call in a fresh process continues with another plan.
        bertbench.core.errors.WorkError: training failed, or somebody deleted or renamed the
            folder, in the block too.
    """
    with lost_folder_explained(), contextlib.ExitStack() as held:
        yield _load(job, held) if job.data is None else _train(job, job.data, held)


@contextlib.contextmanager
def lost_folder_explained() -> Iterator[None]:
    """Say what to do if the output folder is lost in the block.

    Raises:
        WorkError: somebody deleted or renamed the folder; other errors pass unchanged.
    """
    try:
        yield
    except FolderLostError as error:
        raise WorkError(
            f"{error}; nothing was written elsewhere: put it back, and the same command continues "
            "from its last checkpoint"
        ) from error


def _train(job: Job, data: TrainingData, held: contextlib.ExitStack) -> FineTuned:
    """Train the model of a job; `held` closes the output folder later."""
    request, settings = job.request, job.request.settings
    num_train_steps = _count_steps(data, settings)
    step = choose_step(request, job.workload)
    model = create_model(job.workload, settings.seed, open_device(request.budget))
    if request.files.init_checkpoint is not None:
        load_initial_weights(model, request.files.init_checkpoint, job.labels, trains=True)
    from bertbench.running.train import Training, train_model

    training = Training(settings, step, data.arrays, num_train_steps, job.scoring)
    # The folder is made once everything that can be wrong with the input has been read.
    output = held.enter_context(open_output(settings, _describe(job, training, model)))
    write_model_files(settings, job.tokenizer, job.workload.config)
    predict = make_predict(model, _prediction_batch(request, step))
    try:
        trained = train_model(model, training, predict)
    except OutOfMemoryError as error:
        step_down(request, step, error)
    results = {
        "task": job.task,
        **trained,
        "micro_batch": step.micro_batch,
        "levers": step.levers.to_json(),
    }
    output.add_results(results)
    return FineTuned(predict, results, output)


def _load(job: Job, held: contextlib.ExitStack) -> FineTuned:
    """Load the trained model of a job; `held` closes the output folder later."""
    request, settings = job.request, job.request.settings
    model = create_model(job.workload, settings.seed, open_device(request.budget))
    source = request.files.init_checkpoint
    if settings.output_dir.is_dir() and list_checkpoints(settings.output_dir):
        source = settings.output_dir
        say(f"using the weights that a training left in {source}")
    results: dict[str, Any] = {"task": job.task}
    unset = list(model.variables)
    if source is not None:
        report = load_initial_weights(model, source, job.labels, trains=False)
        unset = list(report.initialised)
        step = report.source.name.removeprefix(PREFIX)
        if step.isdecimal():
            results["weights_step"] = int(step)
    head = random_head_names(model, unset)
    if head:
        names = "all weights" if len(unset) == len(model.variables) else ", ".join(head)
        say(f"warning: {names} are random: train first, or give trained weights")
    output = held.enter_context(open_output(settings))
    return FineTuned(make_predict(model, settings.predict_batch_size), results, output)


def _count_steps(data: TrainingData, settings: RunSettings) -> int:
    """Optimizer steps of the training.

    Raises:
        InputError: there are too few examples for one.
    """
    batch, epochs = settings.train_batch_size, settings.num_train_epochs
    steps = train_steps(data.num_examples, batch, epochs)
    if steps < 1:
        raise InputError(
            f"{data.num_examples} examples and {epochs} epochs make no batch of {batch}",
            hint="use a smaller --train_batch_size or more epochs",
        )
    say(f"train: {data.num_examples} examples, {steps} steps of {batch}")
    return steps


def _prediction_batch(request: RunRequest, step: TrainingStep) -> int:
    """Examples that can be predicted at a time beside the training."""
    most = min(request.settings.predict_batch_size, step.micro_batch)
    return inference_batch(step.setup, request.budget.budget_bytes, most)


def _describe(job: Job, training: Training, model: Model) -> RunDescription:
    """What the run writes into its record."""
    files, settings, budget = job.request.files, job.request.settings, job.request.budget
    step = training.step
    identity = {
        "workload": json.loads(job.workload.key()),
        "data_sha256": hash_arrays(training.data),
        "initial_weights_sha256": hash_arrays({n: v.numpy() for n, v in model.variables.items()}),
        "train_batch_size": settings.train_batch_size,
        "learning_rate": settings.learning_rate,
        "num_train_steps": training.num_train_steps,
        "warmup_proportion": settings.warmup_proportion,
        "seed": settings.seed,
        "adam_bias_correction": settings.adam_bias_correction,
        # Before this was recorded, the moments were corrected and epsilon was not.
        **({"adam_epsilon": "corrected too"} if settings.adam_bias_correction else {}),
        **({} if step.levers.exact else {"inexact": list(step.levers.inexact)}),
    }
    plan = {
        "micro_batch": step.micro_batch,
        "replicas": budget.device.replicas,
        "levers": step.levers.to_json(),
        "budget": budget.to_json(),
    }
    details = {
        "task": job.task,
        "init_checkpoint": None if files.init_checkpoint is None else str(files.init_checkpoint),
        **vars(job.tokenizer.normalization),
        "files": {
            "config": describe_file(files.config_file),
            "vocab": describe_file(files.vocab_file),
        },
        "evaluation": {} if job.scoring is None else dict(job.scoring.depends_on),
        **job.details,
    }
    return RunDescription(identity, plan, details)
