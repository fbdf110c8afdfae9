"""The order in which a graph's operations run: that in which they were written.

TensorFlow runs whatever is ready, in an order that depends on the addresses of its own data
structures and on times that it measures. What is alive at the same moment, and with it the peak,
then differs from process to process: for one batch of a small model by a tenth.
"""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf

# Nothing is computed here, or not when the step runs.
_NOT_RUN = frozenset({"Const", "Placeholder", "NoOp"})

# These ask for a shape only. A backward pass asks for those of the forward pass, and a tensor would
# be held until then.
_SHAPES = frozenset({"Shape", "Size", "Rank"})


def run_in_order(results: Iterable[tf.Tensor], *, each_device: bool = False) -> None:
    """Have the operations of the graph that is being made run in the order of their creation.

    Only those that the results, or what changes variables, need: what nothing needs is left free to
    be pruned. On a GPU only those of tensors with at least two dimensions: TensorFlow may move the
    small ones to the host, and an order between two devices makes one wait for the other.

    Args:
        results: what the function that is being traced returns.
        each_device: those of each device have an order of their own, so that replicas, which are
            written one after the other, run at the same time. What has no device, as what takes a
            batch apart, is left free.
    """
    if tf.executing_eagerly():
        return
    only_large = bool(tf.config.list_logical_devices("GPU"))
    graph = tf.compat.v1.get_default_graph()
    operations = graph.get_operations()
    needed = {tensor.op for tensor in results if tensor.graph is graph}
    for operation in reversed(operations):
        if operation.op_def.is_stateful and operation.type not in _NOT_RUN:
            needed.add(operation)
        if operation in needed:
            needed.update(tensor.op for tensor in operation.inputs)
            needed.update(operation.control_inputs)
    last: dict[str, tf.Operation] = {}
    for operation in _with_shapes_first(operations):
        if operation not in needed or operation.type in _NOT_RUN:
            continue
        if only_large and not _is_large(operation):
            continue
        if each_device and not operation.device:
            continue
        device = operation.device if each_device else ""
        before = last.get(device)
        if before is not None and before not in operation.control_inputs:
            operation._add_control_input(before)
        last[device] = operation


def _with_shapes_first(operations: list[tf.Operation]) -> list[tf.Operation]:
    """Move every question for a shape to where the shape is known."""
    early = [op for op in operations if op.type in _SHAPES and not op.control_inputs]
    asked: dict[tf.Operation, list[tf.Operation]] = {}
    for operation in early:
        asked.setdefault(operation.inputs[0].op, []).append(operation)
    moved = set(early)
    return [
        operation
        for first in operations
        if first not in moved
        for operation in (first, *asked.get(first, ()))
    ]


def _is_large(operation: tf.Operation) -> bool:
    """Tell whether an operation reads or makes something with at least two dimensions."""
    return any(
        tensor.dtype != tf.resource and (tensor.shape.rank is None or tensor.shape.rank >= 2)
        for tensor in (*operation.inputs, *operation.outputs)
    )
