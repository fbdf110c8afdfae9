"""Predictions of a run's model, and how a task makes scores of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bertbench.core.errors import NotFiniteError
from bertbench.core.progress import progress
from bertbench.running.bind_device import memory_errors_explained
from bertbench.running.model import Model

OnProgress = Callable[[int, int], None]
"""Told how many examples are done, and of how many."""

Predict = Callable[[Mapping[str, np.ndarray], OnProgress], np.ndarray]
"""Gives the logits of all rows of a model's inputs, `[2, n, s]` or `[n, labels]`."""


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a task scores a model while it is trained.

    Attributes:
        score: predicts with the model as it is, and compares with the right answers.
        metric: the score that decides which weights are best; greater is better.
        depends_on: what the scores depend on besides the model, for the run's record.
    """

    score: Callable[[Predict, OnProgress], Mapping[str, float]]
    metric: str
    depends_on: Mapping[str, Any]


def make_predict(model: Model, batch_size: int) -> Predict:
    """Make a function that predicts with a model as it is when called; it compiles only once.

    Args:
        model: what predicts.
        batch_size: examples at a time, on each replica.

    Returns:
        The function. It raises `NotFiniteError` for logits that are not finite, and `WorkError`
        if memory runs out.
    """
    from finetune.train.inference import make_predictor, predict

    predictor = make_predictor(model.variables, model.workload.spec, model.strategy)
    batch_size *= model.replicas
    is_squad = model.workload.head == "squad"

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
        logits = np.concatenate(batches, axis=1 if is_squad else 0)
        check_finite(np.moveaxis(logits, 1, 0) if is_squad else logits)
        return logits

    return predict_rows


def check_finite(logits: np.ndarray) -> None:
    """Refuse logits that are not finite, `[n, …]` with one row an example.

    Raises:
        NotFiniteError: says of how many examples they are not, and why that may be.
    """
    wrong = ~np.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))
    if wrong.any():
        raise NotFiniteError(
            f"the model's output is not finite for {int(wrong.sum()):,} of {len(wrong):,} inputs, "
            f"first for number {int(wrong.argmax()) + 1:,}: its weights are damaged, or its "
            "training diverged; train again with a smaller learning rate or in float32"
        )


def predict_with_progress(
    predict: Predict, data: Mapping[str, np.ndarray], description: str, unit: str = "examples"
) -> np.ndarray:
    """Predict, and show how far it is.

    Args:
        predict: gives the logits.
        data: a model's inputs, one row an example.
        description: what is being done, as in `predict`.
        unit: what a row is.

    Returns:
        The logits of all rows.
    """
    total = len(next(iter(data.values())))
    with progress(description, total, unit) as advance:
        return predict(data, lambda done, _: advance(done, ""))
