"""Tests of finetune.train.gradients: the losses of examples."""

from __future__ import annotations

import numpy as np

from helpers.tiny_models import losses_of, random_batch

SEQ_LEN = 6


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_classifier_losses_are_cross_entropies() -> None:
    batch = random_batch(4, SEQ_LEN)
    losses, logits = losses_of("classifier", batch)
    expected = -log_softmax(logits)[np.arange(4), batch["label_ids"]]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_regression_losses_are_squared_errors() -> None:
    batch = random_batch(4, SEQ_LEN)
    losses, logits = losses_of("regressor", batch)
    assert logits.shape == (4, 1)
    np.testing.assert_allclose(losses, (logits[:, 0] - batch["label_values"]) ** 2, rtol=1e-5)


def test_squad_losses_and_positions_outside() -> None:
    batch = random_batch(5, SEQ_LEN)
    batch["start_positions"] = np.array([0, 5, -1, 6, 100], np.int32)
    batch["end_positions"] = np.array([3, -7, 2, 6, 0], np.int32)
    losses, logits = losses_of("squad", batch)
    start, end = log_softmax(logits)
    expected = -0.5 * np.array([start[0, 0] + end[0, 3], start[1, 5], end[2, 2], 0.0, end[4, 0]])
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-7)
