"""A trial's process whose TPU is two devices made out of one CPU, with memory for few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from bertbench.hardware import tpu
from bertbench.hardware.device import TpuSettings
from bertbench.trials import worker

LIMIT = 5
"""Examples that a core has memory for."""

SETTINGS = TpuSettings("stand-in", "us-central1-b", "a-project", 2)


def run_trial(payload: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
    tpu.connect = _connect
    worker.random_batch = _within_memory(worker.random_batch)
    worker.run_trial(payload, send)


def _connect(settings: TpuSettings) -> tf.distribute.Strategy:
    assert settings == SETTINGS
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def _within_memory(random_batch: Callable[..., Any]) -> Callable[..., Any]:
    def limited(workload: Any, rows: int) -> Any:
        each, rest = divmod(rows, SETTINGS.cores)
        assert not rest
        if each > LIMIT:
            raise tf.errors.ResourceExhaustedError(
                None, None, "9 root error(s) found.\n  (0) RESOURCE_EXHAUSTED: Compilation failure:"
                " Ran out of memory in memory space hbm. Used 8.38G of 8.00G hbm. Exceeded hbm "
                "capacity by 385.25M.",
            )  # fmt: skip
        return random_batch(workload, rows)

    return limited
