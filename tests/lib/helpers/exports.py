"""Checkpoints to export, and a comparison of arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from finetune.tasks.demo_data import demo_files
from helpers.tiny_models import Arrays

VOCAB = demo_files().vocab_file


def save_tf(prefix: Path, values: Arrays) -> Path:
    """Write a checkpoint as training leaves it, with what an export must not take along."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    state = {"global_step": np.int64(7), "loss_scale": np.float32(1)}
    for name, value in values.items():
        state |= {name: value, f"{name}/adam_m": value + 1, f"{name}/lion_m": value + 2}
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(state),
        shape_and_slices=[""] * len(state),
        tensors=list(map(tf.constant, state.values())),
    )
    return prefix


def assert_same(got: Arrays, expected: Arrays) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name, strict=True)
