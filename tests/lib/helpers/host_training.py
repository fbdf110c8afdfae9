"""Trains with the optimizer's state on another device than the model, in a process of its own.

Writes the weights to the file that it is given; TensorFlow prints where every operation runs.
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow as tf

# Two devices out of the one CPU: CPU:0 is the host, CPU:1 stands for the GPU.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
tf.debugging.set_log_device_placement(True)

from helpers.tiny_models import random_batch, tiny_trainer, values_of  # noqa: E402

SEQ_LEN = 6
SEEDS = range(3)
ROWS = 6


def main() -> None:
    with tf.device("CPU:1"):
        trainer = tiny_trainer("squad", SEQ_LEN, accumulation_steps=2, placement="host")
        for seed in SEEDS:
            trainer.step(random_batch(ROWS, SEQ_LEN, seed=seed))
    for device, variables in (
        ("CPU:1", trainer.variables.values()),
        ("CPU:0", trainer.state.variables),
    ):
        assert all(variable.device.endswith(device) for variable in variables)
    np.savez(sys.argv[1], **values_of(trainer))


if __name__ == "__main__":
    main()
