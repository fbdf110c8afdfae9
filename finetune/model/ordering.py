"""Running a graph's operations in the order in which they were written.

By itself TensorFlow runs any operation that is ready. Its order depends on the addresses of its own
data structures and on times that it measures. Then the tensors that are alive at the same moment,
and with them the peak memory, differ from process to process: by a tenth for the same batch of a
small model.
"""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf

# These compute nothing when the step runs.
_NOT_RUN = frozenset({"Const", "Placeholder", "NoOp"})

# These read only the shape of a tensor. A backward pass reads shapes of the forward pass, and their
# tensors would be held until then.
_SHAPES = frozenset({"Shape", "Size", "Rank"})


def run_in_order(results: Iterable[tf.Tensor], *, each_device: bool = False) -> None:
    """Make the operations of the graph that is being built run in the order of their creation.

    Operations are ordered only if the results need them, or operations that change variables.
    TensorFlow may prune the others. On a GPU only operations on tensors with at least two
    dimensions are ordered: TensorFlow may move smaller ones to the host, and an order between
    two devices would make one wait for the other.

    Args:
        results: what the function that is being traced returns.
        each_device: give the operations of each device an order of their own, so that replicas,
            which are written one after the other, run at the same time. Operations without a
            device, such as those that cut up the batch, are not ordered.
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
    """Move every operation that reads a shape to just behind the one that makes the tensor."""
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
    """Return whether an operation reads or makes a tensor with at least two dimensions."""
    return any(
        tensor.dtype != tf.resource and (tensor.shape.rank is None or tensor.shape.rank >= 2)
        for tensor in (*operation.inputs, *operation.outputs)
    )
