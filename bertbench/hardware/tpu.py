"""Connection to a Cloud TPU through TensorFlow's resolver.

It was never run on a real TPU. Training on replicas is tested on two logical devices of one CPU,
and the connection with a replacement for the resolver.
"""

from __future__ import annotations

from typing import Any

from bertbench.core.errors import WorkError
from bertbench.core.quiet import muted_stderr
from bertbench.hardware.device import TpuSettings
from finetune.errors import InputError


def connect(tpu: TpuSettings) -> Any:
    """Connect to a TPU and initialise it.

    Returns:
        A `tf.distribute.TPUStrategy`.

    Raises:
        InputError: the TPU has another number of cores than the flags say.
        WorkError: the TPU cannot be reached.
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
    # The resolver also asks Google's metadata service, whose errors are OSErrors.
    except (ValueError, RuntimeError, OSError, ImportError, tf.errors.OpError) as error:
        raise WorkError(
            f"cannot reach {what} ({str(error).splitlines()[0]}); check --tpu_name, --tpu_zone "
            "and --gcp_project, or leave --use_tpu out"
        ) from error
    cores = strategy.num_replicas_in_sync
    if cores != tpu.cores:
        raise InputError(f"{what} has {cores} cores", hint=f"give --num_tpu_cores {cores}")
    return strategy
