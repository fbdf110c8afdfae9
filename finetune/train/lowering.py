"""The optimizer step as XLA's input, for compiling it for a device that is not there.

What is lowered is the step that `finetune.train.step.make_trainer` runs with XLA: the same graph,
which updates its variables in place. The variables take no memory, because nothing fills them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from finetune.model.layers import unfilled
from finetune.model.modeling import unfilled_variables
from finetune.spec.precisions import allow_tensor_float_32, scales_loss
from finetune.spec.step_settings import PLAIN_STEP, ModelSpec, StepSettings
from finetune.train.batches import Batch, training_signature
from finetune.train.optimization import OptimizerSettings, create_state
from finetune.train.step import Numbers, make_update, trained_variables


def lower_step(
    spec: ModelSpec,
    optimizer: OptimizerSettings,
    rows: int,
    settings: StepSettings = PLAIN_STEP,
    *,
    num_labels: int = 2,
    replicas: int = 1,
    optimized: bool = False,
) -> bytes:
    """Lower one optimizer step to XLA's HLO.

    The module takes the inputs, targets and weights of the effective batch, with several replicas
    the number of its own, and all variables that the step reads. It returns loss, learning rate and
    norm of the gradients, and the variables that the step changes, each in the memory of its
    argument (`input_output_alias`).

    Example:
        >>> spec = ModelSpec(preset("bert-tiny"), "squad", 128)
        >>> hlo = lower_step(spec, OptimizerSettings(5e-5, num_train_steps=1000), rows=8)

    Args:
        spec: configuration and head of the model, and the length of the examples.
        optimizer: optimizer and schedule.
        rows: examples of the effective batch, of all replicas together: a multiple of
            `replicas * settings.accumulation_steps`.
        settings: how the step is done; it is lowered for XLA whether `xla` is set or not.
        num_labels: classes of the classifier.
        replicas: devices that share the effective batch. Every one runs the module, on its share of
            the rows, and the module adds up the gradients with an all-reduce.
        optimized: compile it for this machine's CPU as well, with TensorFlow's own XLA.

    Returns:
        A serialized `HloModuleProto`; if optimized, a serialized `HloProto` with the module and its
        buffer assignment, which says what it needs of memory.

    Raises:
        ValueError: the rows cannot be cut into that many parts.
    """
    if rows % (replicas * settings.accumulation_steps):
        parts = f"{settings.accumulation_steps} micro-batches on each of {replicas} replicas"
        raise ValueError(f"a batch of {rows} rows cannot be cut into {parts}")
    for_xla = dataclasses.replace(settings, xla=True)
    allow_tensor_float_32(settings.precision)
    variables = unfilled_variables(spec.config, spec.head, num_labels=num_labels)
    state = create_state(
        list(trained_variables(variables, spec).values()),
        optimizer.optimizer,
        scales_loss=scales_loss(settings.precision),
        value=unfilled,
    )
    update = make_update(variables, state, spec, optimizer, for_xla)
    signature = training_signature(spec)

    # As in a run: on one device the graph is traced for any number of rows, which XLA gets
    # afterwards; on replicas for this number. A replica gets its own number as an argument.
    @tf.function(input_signature=[signature], jit_compile=True, autograph=False)
    def whole_step(batch: Batch) -> Numbers:
        return update.of_whole_batch(batch)

    @tf.function(jit_compile=True, autograph=False)
    def share_of_step(batch: Batch, replica: tf.Tensor) -> Numbers:
        return update.of_share(batch, replica, replicas, lambda parts: _sums(parts, replicas))

    batch = {
        name: tf.constant(np.zeros([rows, *one.shape[1:]], one.dtype.as_numpy_dtype))
        for name, one in signature.items()
    }
    if replicas == 1:
        lower = whole_step.experimental_get_compiler_ir(batch)
    else:
        lower = share_of_step.experimental_get_compiler_ir(batch, tf.constant(0))
    stage = "optimized_hlo_proto_serialized" if optimized else "hlo_serialized"
    return bytes(lower(stage=stage))


def _sums(parts: Sequence[tf.Tensor], replicas: int) -> list[tf.Tensor]:
    """Add up tensors over all replicas, each with an all-reduce of its own as on a TPU."""
    group = tf.constant([list(range(replicas))])
    return [
        gen_xla_ops.xla_all_reduce(
            input=part, group_assignment=group, reduce_op="Add", mode="CrossReplica"
        )
        for part in parts
    ]
