"""The command line on a machine whose one CPU passes for two GPUs."""

from __future__ import annotations

import sys

import tensorflow as tf

from bertbench.cli import main
from bertbench.hardware import discover
from bertbench.hardware.device import Budget, Device
from bertbench.memory.allocator.budget import child_environment
from bertbench.running import bind_device

GIB_BYTES = 1 << 30
CARDS = [
    Device("gpu", n, "Tesla V100", f"GPU-{n}", 16 * GIB_BYTES, (15 - n) * GIB_BYTES, driver="1")
    for n in range(2)
]
Mirrored = tf.distribute.MirroredStrategy


def bind_budget(budget: Budget) -> str:
    bind_device.check_free(budget)
    assert child_environment(budget)["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    return "GPU:0"


def mirrored(devices: list[str]) -> tf.distribute.Strategy:
    assert devices == ["GPU:0", "GPU:1"]
    return Mirrored(["CPU:0", "CPU:1"])


discover.list_gpus = lambda: CARDS
bind_device.bind_budget = bind_budget
tf.distribute.MirroredStrategy = mirrored
main(sys.argv[1:])
