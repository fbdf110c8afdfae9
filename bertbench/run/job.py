"""The part of a run between data and predictions, alike for all tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bertbench.core.errors import OutOfMemoryError, WorkError
from bertbench.core.terminal import say
from bertbench.core.workload import Setup, Workload
from bertbench.memory.fit import inference_batch
from bertbench.run.choose_plan import choose_step
from bertbench.run.device import open_device
from bertbench.run.initial_weights import load_initial_weights
from bertbench.run.oom_recovery import apply_steps_down, step_down
from bertbench.run.output.run_folder import (
    alone_in,
    clear_remains,
    describe_file,
    hash_arrays,
    prepare_output,
    record_results,
    write_model_files,
)
from bertbench.run.settings import RunRequest, RunSettings
from bertbench.run.training import (
    Predict,
    Scorer,
    make_predict,
    memory_errors_explained,
    train_model,
)
from finetune.errors import InputError
from finetune.spec.recipes import train_steps
from finetune.storage.folders import FolderLostError, HeldFolder
from finetune.text.tokenization import Tokenizer

# Which of the two a configuration's `gelu` means is worth saying: they differ by family.
_ACTIVATIONS = {"gelu_tanh": "GELU by tanh", "gelu_erf": "exact GELU"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a task wants done.

    Attributes:
        task: its name, for the record.
        workload: model, head and sequence length.
        tokenizer: with which the arrays were made.
        train_arrays: one row an example or window; None does not train.
        num_examples: what steps are counted by.
        make_scorer: gives the scores to take while training; None takes none.
        evaluation: what those scores depend on besides the model.
        record: what else belongs in `run.json`.
        labels: of a classifier, in the order in which its rows are to be.
    """

    task: str
    workload: Workload
    tokenizer: Tokenizer
    train_arrays: Mapping[str, np.ndarray] | None
    num_examples: int
    make_scorer: Callable[[Predict], Scorer] | None = None
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """A model after its training, or as loaded where there was none.

    Attributes:
        predict: predicts with it, no more examples at a time than fit, see
            `bertbench.memory.fit.inference_batch`.
        results: for `--json`; `weights_step` says how many optimizer steps its weights have seen,
            where that is known.
        folder: the output folder; to be checked before anything is written to it.
        begun: the run's record as it began, for `record_results`; None without training.
    """

    predict: Predict
    results: dict[str, Any]
    folder: HeldFolder
    begun: Mapping[str, Any] | None = None


def feature_arrays(features: object, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Take the arrays that a model is fed out of a task's columnar features."""
    return {name: getattr(features, name) for name in names}


@contextlib.contextmanager
def fine_tuned(request: RunRequest, job: Job) -> Iterator[FineTuned]:
    """Plan, bind the budget, load weights and train; import TensorFlow on the way.

    Without training, the weights are those that an earlier training left in the output folder,
    as in the original; only where there are none, those of `--init_checkpoint`.

    Args:
        request: the model, the settings and the device.
        job: what to do.

    Yields:
        The model. In the block the output folder is held, so that nobody else writes to it.

    Raises:
        InputError: too few examples, nothing fits, the weights do not match, or the output
            folder holds another run.
        bertbench.core.errors.SteppedDownError: a step ran out of memory; what was done is saved,
        and the
            same call in a fresh process goes on with another plan.
        bertbench.core.errors.WorkError: training failed, or somebody deleted or renamed the
        folder, in
            the block too.
    """
    with contextlib.ExitStack() as stack:
        try:
            make = _load if job.train_arrays is None else _train
            yield make(request, job, stack)
        except FolderLostError as error:
            raise WorkError(
                f"{error}; nothing was written elsewhere: put it back, and the same command "
                "continues from its last checkpoint"
            ) from error


def _train(request: RunRequest, job: Job, stack: contextlib.ExitStack) -> FineTuned:
    files, settings, budget = request.files, request.settings, request.budget
    assert job.train_arrays is not None
    steps = train_steps(job.num_examples, settings.train_batch_size, settings.num_train_epochs)
    if steps < 1:
        raise InputError(
            f"{job.num_examples} examples and {settings.num_train_epochs} epochs make no batch of "
            f"{settings.train_batch_size}",
            hint="use a smaller --train_batch_size or more epochs",
        )
    say(f"train: {job.num_examples} examples, {steps} steps of {settings.train_batch_size}")
    step = apply_steps_down(request, choose_step(request, job.workload))
    micro_batch, levers = step.micro_batch, step.levers
    strategy = open_device(budget)
    variables = _create(settings, job.workload, strategy)
    if files.init_checkpoint is not None:
        load_initial_weights(
            variables, files.init_checkpoint, job.workload.head, job.labels, trains=True
        )
    identity = {
        "workload": json.loads(job.workload.key()),
        "data_sha256": hash_arrays(job.train_arrays),
        "initial_weights_sha256": hash_arrays({n: v.numpy() for n, v in variables.items()}),
        "train_batch_size": settings.train_batch_size,
        "learning_rate": settings.learning_rate,
        "num_train_steps": steps,
        "warmup_proportion": settings.warmup_proportion,
        "seed": settings.seed,
        "adam_bias_correction": settings.adam_bias_correction,
        # Before this was recorded, the moments were corrected and epsilon was not.
        **({"adam_epsilon": "corrected too"} if settings.adam_bias_correction else {}),
        **({} if levers.exact else {"inexact": list(levers.inexact)}),
    }
    plan = {
        "micro_batch": micro_batch,
        "replicas": budget.device.replicas,
        "levers": levers.to_json(),
        "budget": budget.to_json(),
    }
    record = {
        "task": job.task,
        "init_checkpoint": None if files.init_checkpoint is None else str(files.init_checkpoint),
        **vars(job.tokenizer.normalization),
        "files": {
            "config": describe_file(files.config_file),
            "vocab": describe_file(files.vocab_file),
        },
        "evaluation": dict(job.evaluation),
        **job.record,
    }
    # The folder is made once everything that can be wrong with the input has been read.
    folder = stack.enter_context(alone_in(settings.output_dir))
    begun = prepare_output(settings, identity, record, plan)
    clear_remains(settings.output_dir)
    write_model_files(settings, job.tokenizer, job.workload.config)
    most = min(settings.predict_batch_size, micro_batch)
    predict_batch = inference_batch(Setup(job.workload, levers), budget.budget_bytes, most)
    predict = make_predict(variables, job.workload, predict_batch, strategy)
    scorer = None if job.make_scorer is None else job.make_scorer(predict)
    try:
        trained = train_model(
            variables,
            job.workload,
            settings,
            levers,
            micro_batch,
            job.train_arrays,
            steps,
            scorer,
            strategy,
        )
    except OutOfMemoryError as error:
        step_down(request, step, error)
    results = {
        "task": job.task,
        **trained,
        "micro_batch": micro_batch,
        "levers": levers.to_json(),
    }
    record_results(folder, results, begun)
    return FineTuned(predict, results, folder, begun)


def _load(request: RunRequest, job: Job, stack: contextlib.ExitStack) -> FineTuned:
    files, settings, budget = request.files, request.settings, request.budget
    strategy = open_device(budget)
    from finetune.model_files.checkpoint_files import PREFIX, list_checkpoints

    variables = _create(settings, job.workload, strategy)
    source = files.init_checkpoint
    if settings.output_dir.is_dir() and list_checkpoints(settings.output_dir):
        source = settings.output_dir
        say(f"using the weights that a training left in {source}")
    results: dict[str, Any] = {"task": job.task}
    unset = list(variables)
    if source is not None:
        report = load_initial_weights(
            variables, source, job.workload.head, job.labels, trains=False
        )
        unset = list(report.initialised)
        step = report.source.name.removeprefix(PREFIX)
        if step.isdecimal():
            results["weights_step"] = int(step)
    # SQuAD has no use for the pooler.
    needed = "cls/" if job.workload.head == "squad" else ("output_", "bert/pooler/")
    head = [name for name in unset if name.startswith(needed)]
    if head:
        names = "all weights" if len(unset) == len(variables) else ", ".join(head)
        say(f"warning: {names} are random: train first, or give trained weights")
    folder = stack.enter_context(alone_in(settings.output_dir))
    clear_remains(settings.output_dir)
    predict = make_predict(variables, job.workload, settings.predict_batch_size, strategy)
    return FineTuned(predict, results, folder)


def _create(settings: RunSettings, workload: Workload, strategy: Any) -> dict[str, Any]:
    from finetune.model.modeling import create_variables

    config = workload.config
    say(
        f"model: {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{_ACTIVATIONS.get(config.hidden_act, config.hidden_act)}"
    )
    with (
        contextlib.nullcontext() if strategy is None else strategy.scope(),
        memory_errors_explained("the model was made: it needs more memory"),
    ):
        return create_variables(
            workload.config, workload.head, num_labels=workload.num_labels, seed=settings.seed
        )
