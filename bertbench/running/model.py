"""The model of a run: made on its device, and filled with the weights that the run begins with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bertbench.core.terminal import say
from bertbench.core.workload import Workload
from bertbench.running.bind_device import memory_errors_explained
from finetune.errors import InputError
from finetune.model_files.head_labels import TrainedHead, read_trained_head, rows_of

if TYPE_CHECKING:
    from finetune.model.weights import LoadReport

# A configuration's `gelu` is one of two functions, which differ by family of models.
_ACTIVATIONS = {"gelu_tanh": "GELU by tanh", "gelu_erf": "exact GELU"}

_HEAD_NAMES = ("output_weights", "output_bias")
_POOLER_PREFIX = "bert/pooler/"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on the device of a run.

    Attributes:
        workload: configuration, head and sequence length.
        variables: TensorFlow's variables by name.
        strategy: the `tf.distribute.Strategy` in whose scope they were made; None for one device.
    """

    workload: Workload
    variables: dict[str, Any]
    strategy: Any = None

    @property
    def replicas(self) -> int:
        """Devices that share an effective batch."""
        return 1 if self.strategy is None else int(self.strategy.num_replicas_in_sync)


def create_model(workload: Workload, seed: int, strategy: Any = None) -> Model:
    """Make a model with random weights.

    Args:
        workload: configuration and head.
        seed: of the weights.
        strategy: see `Model`.

    Raises:
        bertbench.core.errors.WorkError: it does not fit in the device's memory.
    """
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
        variables = create_variables(
            config, workload.head, num_labels=workload.num_labels, seed=seed
        )
    return Model(workload, variables, strategy)


def load_initial_weights(
    model: Model, source: Path, labels: Sequence[str], *, trains: bool
) -> LoadReport:
    """Load weights into a new model; a head of other labels, or none, stays random.

    Args:
        model: changed.
        source: see `finetune.model.weights.find_checkpoint`.
        labels: of a classifier, in the task's order.
        trains: whether a training follows. Then random weights are said; else they are refused.

    Raises:
        InputError: the weights cannot be read, or are of another model; or without training the
            head is of other labels, or lacks the pooler that it was trained with.
    """
    from finetune.model.weights import find_checkpoint, load_weights

    head = model.workload.head
    checkpoint = find_checkpoint(source)
    trained = TrainedHead(checkpoint.parent, None)
    try:
        if head != "squad":
            trained = read_trained_head(checkpoint.parent)
    except InputError as error:
        if not trains:
            raise
        say(f"warning: {error}")
    with memory_errors_explained("weights were loaded: the model needs more memory"):
        report = load_weights(model.variables, checkpoint, with_head=not trained.why_other)
    say(f"weights: {len(report.loaded)} of {len(model.variables)} from {report.source.name}")
    problem = "" if head == "squad" else _problem_of_head(report, trained, labels, trains)
    if problem and not trains:
        raise InputError(
            problem, path=trained.folder, hint="give weights that were trained for it, or train"
        )
    if problem:
        say(f"{problem}: training starts from random ones")
    if head == "classifier" and _HEAD_NAMES[0] in report.loaded:
        _order_rows(model.variables, trained, labels, trains)
    return report


def random_head_names(model: Model, unset: Sequence[str]) -> list[str]:
    """Choose from the weights that no file has set those that predictions come from."""
    # SQuAD has no use for the pooler.
    needed = "cls/" if model.workload.head == "squad" else ("output_", _POOLER_PREFIX)
    return [name for name in unset if name.startswith(needed)]


def _problem_of_head(
    report: LoadReport, trained: TrainedHead, labels: Sequence[str], trains: bool
) -> str:
    """What the weights lack of a trained head for texts; "" if nothing."""
    if trained.why_other:
        return f"the weights have no classifier of texts ({trained.why_other})"
    if set(_HEAD_NAMES) & set(report.initialised) & set(report.unused):
        there = f" ({', '.join(trained.labels)})" if trained.labels else ""
        count = len(labels) or 1
        return f"the weights' classifier{there} has another number of outputs than {count}"
    # Without a head and without training, `random_head_names` finds all that is random.
    matters = trains or _HEAD_NAMES[0] in report.loaded
    if matters and any(name.startswith(_POOLER_PREFIX) for name in report.initialised):
        return "the weights have no pooler, which a classifier needs"
    return ""


def _order_rows(
    variables: dict[str, Any], trained: TrainedHead, labels: Sequence[str], trains: bool
) -> None:
    """Bring the rows of a classifier's head, one for each label, into the task's order."""
    try:
        rows = rows_of(labels, trained)
    except InputError as error:
        if not trains:
            raise
        say(f"warning: {error}")
        return
    if rows is None and trained.labels is not None:
        say(
            f"warning: the classifier's labels {', '.join(trained.labels)} are taken for "
            f"{', '.join(labels)}, in this order"
        )
    if rows is not None and list(rows) != sorted(rows):
        say(f"the classifier's rows are put in the order {', '.join(labels)}")
        for name in _HEAD_NAMES:
            variables[name].assign(np.take(variables[name].numpy(), rows, axis=0))
