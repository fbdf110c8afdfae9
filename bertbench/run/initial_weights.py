"""The weights that a run begins with: loaded, and its head brought into the task's order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bertbench.core.terminal import say
from bertbench.run.training import memory_errors_explained
from finetune.errors import InputError
from finetune.model_files.head_labels import TrainedHead, read_trained_head, rows_of

if TYPE_CHECKING:
    from finetune.model.weights import LoadReport

_HEAD_NAMES = ("output_weights", "output_bias")
_POOLER_PREFIX = "bert/pooler/"


def load_initial_weights(
    variables: dict[str, Any], source: Path, head: str, labels: Sequence[str], *, trains: bool
) -> LoadReport:
    """Load weights into a new model; a head of other labels, or none, is left random.

    Args:
        variables: the model; changed.
        source: see `finetune.model.weights.find_checkpoint`.
        head: one of `finetune.spec.config.HEADS`.
        labels: of a classifier, in the task's order.
        trains: whether a training follows, which can mend what is random.

    Raises:
        InputError: the weights cannot be read, or are of another model; or without training the
            head is of other labels, or lacks the pooler that it was trained with.
    """
    from finetune.model.weights import find_checkpoint, load_weights

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
        report = load_weights(variables, checkpoint, with_head=not trained.why_other)
    say(f"weights: {len(report.loaded)} of {len(variables)} from {report.source.name}")
    problem = _problem(report, trained, head, labels, trains)
    if problem and not trains:
        raise InputError(
            problem, path=trained.folder, hint="give weights that were trained for it, or train"
        )
    if problem:
        say(f"{problem}: training starts from random ones")
    if head == "classifier" and _HEAD_NAMES[0] in report.loaded:
        _order_rows(variables, trained, labels, trains)
    return report


def _problem(
    report: LoadReport, trained: TrainedHead, head: str, labels: Sequence[str], trains: bool
) -> str:
    """What is missing that a trained head of the task would have; "" if nothing is."""
    if head == "squad":
        return ""
    if trained.why_other:
        return f"the weights have no classifier of texts ({trained.why_other})"
    if set(_HEAD_NAMES) & set(report.initialised) & set(report.unused):
        there = f" ({', '.join(trained.labels)})" if trained.labels else ""
        count = len(labels) or 1
        return f"the weights' classifier{there} has another number of outputs than {count}"
    # Without head and training, all that is random is said elsewhere.
    matters = trains or _HEAD_NAMES[0] in report.loaded
    if matters and any(name.startswith(_POOLER_PREFIX) for name in report.initialised):
        return "the weights have no pooler, which a classifier needs"
    return ""


def _order_rows(
    variables: dict[str, Any], trained: TrainedHead, labels: Sequence[str], trains: bool
) -> None:
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
