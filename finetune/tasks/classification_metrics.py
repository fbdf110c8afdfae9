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
    """Compare predictions with labels.

    Args:
        metrics: names of the metrics. `f1` is the F1 of label id 1 against all others, `matthews`
            the Matthews correlation of any number of classes. `pearson` and `spearman` are
            correlations of numbers.
        labels: [n], n at least 1: numbers for `pearson` and `spearman`, else ids.
        predicted: [n], likewise.

    Returns:
        Values by name, as fractions. F1 and correlations are 0 where a denominator is zero, for
        example because all predictions are the same.

    Raises:
        ValueError: labels and predictions differ in shape, are empty, or are not finite.
    """
    # Imported here, because the import is slow.
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
            # Warnings of constant values, for which the result is 0, and of very few classes.
            warnings.simplefilter("ignore")
            constant = metric in REGRESSION_METRICS and (
                len(true) < 2 or np.ptp(true) == 0 or np.ptp(guess) == 0
            )
            value = 0.0 if constant else float(functions[metric]())
        results[metric] = 0.0 if math.isnan(value) else value
    return results
