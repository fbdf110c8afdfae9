"""Batches of a training or prediction: their tensors, padding, and shares of replicas."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from finetune.spec.config import INPUT_NAMES, TARGET_NAMES
from finetune.spec.step_settings import ModelSpec

Batch = Mapping[str, "np.ndarray | tf.Tensor"]
"""Arrays by name, with one row for each example."""


def input_signature(spec: ModelSpec) -> dict[str, tf.TensorSpec]:
    """Types and shapes of a model's inputs, for any number of rows."""
    return {name: tf.TensorSpec([None, spec.seq_len], tf.int32) for name in INPUT_NAMES}


def training_signature(spec: ModelSpec) -> dict[str, tf.TensorSpec]:
    """Types and shapes of inputs, targets and weights, for any number of rows."""
    return {
        **input_signature(spec),
        **{
            name: tf.TensorSpec([None], tf.float32 if name == "label_values" else tf.int32)
            for name in TARGET_NAMES[spec.head]
        },
        "weights": tf.TensorSpec([None], tf.float32),
    }


def pad_batch(batch: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Append rows of weight 0 until an effective batch has `rows` rows.

    The rows repeat the last example, so that no computation meets an empty sequence.

    Example:
        >>> pad_batch({"label_ids": np.array([3, 5])}, 3)
        {'weights': array([1., 1., 0.], dtype=float32), 'label_ids': array([3, 5, 5])}

    Args:
        batch: arrays with one row for each example; without `weights`, every row weighs 1.
        rows: number of rows wanted, at least the number of examples.

    Returns:
        Arrays of `rows` rows, `weights` among them.

    Raises:
        ValueError: there are more examples than rows, or none.
    """
    examples = len(next(iter(batch.values())))
    if not 1 <= examples <= rows:
        raise ValueError(f"cannot pad {examples} examples to {rows} rows")
    padded = {"weights": np.ones(examples, np.float32), **batch}
    index = np.minimum(np.arange(rows), examples - 1)
    padded = {name: value[index] for name, value in padded.items()}
    padded["weights"][examples:] = 0
    return padded


def as_tensors(batch: Batch, signature: Mapping[str, tf.TensorSpec]) -> dict[str, tf.Tensor]:
    """Copy a batch into TensorFlow's own memory, as the types of a signature.

    `tf.constant` does so only if the array, or a copy of it, happens not to begin at a multiple of
    64 bytes, so that what a step needs would depend on chance.
    """
    tensors = {}
    for name, spec in signature.items():
        values = np.asarray(batch[name], spec.dtype.as_numpy_dtype)
        flat = tf.io.decode_raw(values.tobytes(), spec.dtype)
        tensors[name] = tf.reshape(flat, values.shape)
    return tensors


def share_of(batch: Batch, replica: tf.Tensor, replicas: int) -> dict[str, tf.Tensor]:
    """Cut out one replica's rows of a batch; their number is static, as TPUs want it.

    Args:
        batch: tensors whose number of rows is a multiple of the number of replicas.
        replica: number of the replica, int32 scalar.
        replicas: number of replicas.
    """
    share = next(iter(batch.values())).shape[0] // replicas
    return {
        name: tf.ensure_shape(
            value[replica * share : (replica + 1) * share], [share, *value.shape[1:]]
        )
        for name, value in batch.items()
    }
