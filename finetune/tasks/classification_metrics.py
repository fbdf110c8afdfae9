"""The metrics of classification tasks, as scikit-learn and SciPy compute them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]

REGRESSION_METRICS: tuple[Metric, ...] = ("pearson", "spearman")


def evaluate(
    metrics: Sequence[Metric], labels: npt.ArrayLike, predicted: npt.ArrayLike
) -> dict[str, float]:
    """Compares predictions with labels.

    Args:
        metrics: what to compute. `f1` is that of label id 1 against the rest, `matthews` the
            Matthews correlation of any number of classes, `pearson` and `spearman` correlate
            numbers.
        labels: [n], n at least 1: ids for the first three, numbers for the others.
        predicted: [n].

    Returns:
        Values by name, as fractions. Where a denominator is zero, as when all predictions are the
        same, F1 and correlations are 0.

    Raises:
        ValueError: the two differ in shape, are empty, or are not finite.
    """
    # Slow to import, and only needed once there is something to compare.
    from scipy import stats
    from sklearn import metrics as sklearn_metrics

    true, guess = np.asarray(labels), np.asarray(predicted)
    if true.ndim != 1 or true.shape != guess.shape or not true.size:
        raise ValueError(f"cannot compare labels {true.shape} with predictions {guess.shape}")
    if not (np.isfinite(true).all() and np.isfinite(guess).all()):
        raise ValueError("labels or predictions are not finite")
    functions = {
        "accuracy": lambda: sklearn_metrics.accuracy_score(true, guess),
        "f1": lambda: sklearn_metrics.f1_score(true == 1, guess == 1, zero_division=0.0),
        "matthews": lambda: sklearn_metrics.matthews_corrcoef(true, guess),
        "pearson": lambda: stats.pearsonr(true, guess).statistic,
        "spearman": lambda: stats.spearmanr(true, guess).statistic,
    }
    results: dict[str, float] = {}
    for metric in metrics:
        with warnings.catch_warnings():
            # Of constant input, which is answered by 0 below, and of very few classes.
            warnings.simplefilter("ignore")
            constant = metric in REGRESSION_METRICS and (
                len(true) < 2 or np.ptp(true) == 0 or np.ptp(guess) == 0
            )
            value = 0.0 if constant else float(functions[metric]())
        results[metric] = 0.0 if math.isnan(value) else value
    return results
