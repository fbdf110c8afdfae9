"""A step stays on a GPU, as far as a machine without one can tell.

What has no kernel for GPUs TensorFlow computes on the host, and copies to and fro without a word;
and some kernels for GPUs take or give tensors in the host's memory.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import tensorflow as tf
from google.protobuf.message import Message
from tensorflow.python.eager import context
from tensorflow.python.framework import kernels, op_def_registry

from helpers.tiny_models import SETTINGS, random_batch, tiny_trainer

SEQ_LEN = 8
_EAGER = "__wrapped__"
"""Functions of this name are single operations outside of the step."""

pytestmark = pytest.mark.skipif(
    not tf.test.is_built_with_cuda(), reason="this TensorFlow has no kernels for GPUs"
)


@functools.cache
def kernels_of(operation: str) -> list[Message]:
    """Kernels that a GPU may use, those for any device last, as TensorFlow looks for them."""
    found = kernels.get_registered_kernels_for_op(operation).kernel
    return [kernel for kind in ("GPU", "DEFAULT") for kernel in found if kernel.device_type == kind]


def takes(kernel: Message, node: Message) -> bool:
    """Whether a kernel is for the types of a node."""
    for constraint in kernel.constraint:
        attribute = node.attr[constraint.name]
        types = attribute.list.type if attribute.HasField("list") else [attribute.type]
        if not {*types} <= {*constraint.allowed_values.list.type}:
            return False
    return True


def numbers_on_host(kernel: Message, node: Message) -> set[str]:
    """Arguments of a node, by name, that are floating-point numbers in the host's memory."""
    definition = op_def_registry.get(node.op)
    return {
        argument.name
        for argument in [*definition.input_arg, *definition.output_arg]
        if argument.name in kernel.host_memory_arg
        and tf.as_dtype(argument.type or node.attr[argument.type_attr].type).is_floating
    }


def types_of(node: Message) -> dict[str, str]:
    return {name: tf.as_dtype(value.type).name for name, value in node.attr.items() if value.type}


@pytest.mark.parametrize(
    ("head", "policy", "steps", "precision", "optimizer"),
    [
        ("squad", "none", 1, "float32", "adamw"),
        ("squad", "selective", 2, "float32", "adamw"),
        ("squad", "full:1+selective", 2, "tf32", "adamw"),
        ("classifier", "nested", 2, "bf16", "lion"),
        ("regressor", "nested:1+full", 1, "fp16", "adafactor"),
    ],
)
def test_a_step_stays_on_the_gpu(
    head: str, policy: str, steps: int, precision: str, optimizer: str
) -> None:
    before = {*context.context().list_function_names()}
    trainer = tiny_trainer(
        head,
        SEQ_LEN,
        policy=policy,
        accumulation_steps=steps,
        precision=precision,
        settings=dataclasses.replace(SETTINGS, optimizer=optimizer),
    )
    trainer.step(random_batch(2 * steps, SEQ_LEN))
    nodes = [
        node
        for name in {*context.context().list_function_names()} - before
        if not name.startswith(_EAGER)
        for node in context.context().get_function_def(name).node_def
    ]
    assert {"BatchMatMulV2", "StatelessRandomUniformFullIntV2"} <= {node.op for node in nodes}
    crossing = {}
    for node in nodes:
        kernel = next((kernel for kernel in kernels_of(node.op) if takes(kernel, node)), None)
        if kernel is None or numbers_on_host(kernel, node):
            crossing[node.op] = types_of(node)
    assert not crossing
