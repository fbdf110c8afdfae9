"""Tests of finetune.train.batches: padding."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.train.batches import pad_batch
from helpers.tiny_models import random_batch, rows_of

SEQ_LEN = 6


def test_pad_batch() -> None:
    batch = random_batch(3, SEQ_LEN)
    padded = pad_batch(batch, 5)
    for name, value in padded.items():
        assert value.dtype == batch[name].dtype
        np.testing.assert_array_equal(value[:3], batch[name])
    np.testing.assert_array_equal(padded["weights"], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(padded["input_ids"][3:], batch["input_ids"][[2, 2]])
    np.testing.assert_array_equal(batch["weights"], [1, 1, 1])


def test_pad_batch_keeps_weights_and_adds_missing_ones() -> None:
    batch = random_batch(2, SEQ_LEN)
    batch["weights"][0] = 0.5
    np.testing.assert_array_equal(pad_batch(batch, 3)["weights"], [0.5, 1, 0])
    np.testing.assert_array_equal(pad_batch(batch, 2)["weights"], [0.5, 1])
    del batch["weights"]
    np.testing.assert_array_equal(pad_batch(batch, 3)["weights"], [1, 1, 0])


@pytest.mark.parametrize("examples", [0, 4])
def test_pad_batch_with_too_many_examples_or_none(examples: int) -> None:
    with pytest.raises(ValueError, match=f"cannot pad {examples} examples to 3 rows"):
        pad_batch(rows_of(random_batch(4, SEQ_LEN), slice(0, examples)), 3)
