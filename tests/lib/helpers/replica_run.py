"""The command line with two devices made out of one CPU in the place of a TPU's cores."""

from __future__ import annotations

import sys

import tensorflow as tf

from bertbench.cli import main
from bertbench.hardware import tpu


def connect(settings: tpu.TpuSettings) -> tf.distribute.Strategy:
    assert settings == tpu.TpuSettings("stand-in", "us-central1-b", "a-project", 2)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


tpu.connect = connect
main(sys.argv[1:])
