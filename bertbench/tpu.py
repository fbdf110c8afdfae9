"""Cloud TPUs: the original's flags, and a connection through TensorFlow's resolver.

No TPU was at hand while this was written: what runs on its replicas is tested on two devices made
out of one CPU, and the connection against a stand-in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bertbench.bytes import GIB_BYTES
from bertbench.devices import Budget, Device, make_budget
from bertbench.errors import WorkError
from bertbench.quiet import muted_stderr
from finetune.errors import InputError

CORE_BYTES = 8 * GIB_BYTES
"""Memory of a core of a Cloud TPU v2, the smallest (Google Cloud's system architecture page)."""


@dataclasses.dataclass(frozen=True)
class TpuSettings:
    """Flags as in the original's scripts.

    Attributes:
        name: `--tpu_name`, or a `grpc://` address; None asks the environment.
        zone: `--tpu_zone`, as in `us-central1-b`.
        project: `--gcp_project`.
        cores: `--num_tpu_cores`.
    """

    name: str | None = None
    zone: str | None = None
    project: str | None = None
    cores: int = 8


def tpu_budget(tpu: TpuSettings, memory_bytes: int | None) -> Budget:
    """Budget of one core; its memory cannot be asked for before connecting."""
    size = CORE_BYTES if memory_bytes is None else memory_bytes
    name = f"TPU {tpu.name or ''}".strip()
    return make_budget(Device("tpu", 0, f"{name}, {tpu.cores} cores", None, size, size), size)


def connect(tpu: TpuSettings) -> Any:
    """Connect to a TPU and initialise it.

    Returns:
        A `tf.distribute.TPUStrategy`.

    Raises:
        InputError: it has another number of cores.
        WorkError: it cannot be reached.
    """
    with muted_stderr():
        import tensorflow as tf
    what = "the TPU" if tpu.name is None else f"the TPU {tpu.name}"
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            tpu=tpu.name or "", zone=tpu.zone, project=tpu.project
        )
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
    # The resolver asks Google's metadata service by itself, whose errors are OSErrors.
    except (ValueError, RuntimeError, OSError, ImportError, tf.errors.OpError) as error:
        raise WorkError(
            f"cannot reach {what} ({str(error).splitlines()[0]}); check --tpu_name, --tpu_zone "
            "and --gcp_project, or leave --use_tpu out"
        ) from error
    cores = strategy.num_replicas_in_sync
    if cores != tpu.cores:
        raise InputError(f"{what} has {cores} cores", hint=f"give --num_tpu_cores {cores}")
    return strategy
