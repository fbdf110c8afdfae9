"""TensorBoard scalars of a training, without needing TensorBoard installed to write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

# What TensorBoard's own `tf.summary.scalar` writes: the data are float32 scalars of its plugin
# "scalars". That function is part of the TensorBoard package, which training does not need.
_DATA_CLASS_SCALAR = 1
_METADATA = tf.compat.v1.SummaryMetadata(
    plugin_data={"plugin_name": "scalars"}, data_class=_DATA_CLASS_SCALAR
)


class ScalarWriter:
    """Appends scalars to an event file in a folder, which TensorBoard reads as a run.

    As with the original's Estimator, training belongs in the output folder and evaluation in its
    folder `eval`.
    """

    def __init__(self, folder: Path) -> None:
        """Open a new event file.

        Args:
            folder: made if missing; earlier event files there belong to the same run.
        """
        self._writer = tf.summary.create_file_writer(str(folder))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append values of one step; they are on disk when this returns.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        try:
            with self._writer.as_default():
                for name, value in scalars.items():
                    tf.summary.write(name, tf.constant(value, tf.float32), step, metadata=_METADATA)
            self._writer.flush()
        except tf.errors.OpError as error:
            # TensorFlow calls a full disk an exhausted resource, as it calls exhausted memory.
            raise OSError(f"cannot write TensorBoard's events ({error.message})") from error

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
