"""A graph's operations run as they were written, so that a step needs the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tensorflow as tf

from finetune.model.ordering import run_in_order
from helpers.paths import REPOSITORY

PEAK = """
import tensorflow as tf
from bertbench.hardware.discover import resolve_device
from bertbench.hardware.device import make_budget
from bertbench.memory.allocator.tensorflow_setup import start_tensorflow
from bertbench.trials.worker import build_trainer, random_batch
from bertbench.core.workload import Levers, Setup, published_workload
from finetune.spec.checkpointing import parse_checkpointing

device = start_tensorflow(make_budget(resolve_device("cpu"), 512 << 20))
workload = published_workload("bert-tiny", 64)
trainer = build_trainer(Setup(workload, Levers(parse_checkpointing({policy!r}))))
for _ in range(2):
    trainer.step(random_batch(workload, 37))
print(tf.config.experimental.get_memory_info(device)["peak"])
"""


def traced(function) -> tf.Graph:  # type: ignore[no-untyped-def]
    compiled = tf.function(function, input_signature=[tf.TensorSpec([None, 3])])
    return compiled.get_concrete_function().graph


def follows(graph: tf.Graph, later: str, earlier: str) -> bool:
    """Whether one operation can only run after another."""
    waiting, seen = [graph.get_operation_by_name(later)], set()
    while waiting:
        operation = waiting.pop()
        before = {*operation.control_inputs, *(tensor.op for tensor in operation.inputs)} - seen
        seen |= before
        waiting += before
    return graph.get_operation_by_name(earlier) in seen


def test_independent_operations_run_as_written() -> None:
    def function(x: tf.Tensor) -> tf.Tensor:
        first = tf.exp(x, name="first")
        second = tf.sin(x, name="second")
        third = tf.cos(x, name="third")
        result = third + second + first
        run_in_order([result])
        return result

    graph = traced(function)
    assert follows(graph, "second", "first")
    assert follows(graph, "third", "second")


def test_replicas_do_not_wait_for_each_other() -> None:
    def function(x: tf.Tensor) -> tf.Tensor:
        results = []
        for device in ("CPU:0", "CPU:1"):
            with tf.device(device):
                results += [
                    tf.exp(x, name=f"first_{device[-1]}"),
                    tf.sin(x, name=f"second_{device[-1]}"),
                ]
        with tf.device("CPU:0"):
            results.append(tf.cos(x, name="third_0"))
        run_in_order(results, each_device=True)
        return tf.add_n(results)

    graph = traced(function)
    assert follows(graph, "second_0", "first_0")
    assert follows(graph, "third_0", "second_0")
    assert follows(graph, "second_1", "first_1")
    assert not follows(graph, "first_1", "second_0")
    assert not follows(graph, "third_0", "second_1")


def test_what_nothing_needs_can_be_pruned() -> None:
    def function(x: tf.Tensor) -> tf.Tensor:
        first = tf.exp(x, name="first")
        tf.linalg.matmul(x, x, transpose_b=True, name="unused")
        second = tf.sin(x, name="second")
        run_in_order([first + second])
        return first + second

    graph = traced(function)
    assert follows(graph, "second", "first")
    assert not follows(graph, "second", "unused")


def test_what_changes_variables_is_needed() -> None:
    variable = tf.Variable(tf.zeros([2, 3]))

    def function(x: tf.Tensor) -> tf.Tensor:
        added = tf.exp(x, name="added")
        variable.assign_add(added)
        last = tf.sin(x, name="last")
        run_in_order([last])
        return last

    assert follows(traced(function), "last", "added")


def test_a_late_question_for_a_shape_holds_nothing() -> None:
    def function(x: tf.Tensor) -> tf.Tensor:
        first = tf.exp(x, name="first")
        second = tf.sin(first, name="second")
        third = tf.cos(second, name="third")
        result = third * tf.cast(tf.shape(first, name="question")[0], tf.float32)
        run_in_order([result])
        return result

    graph = traced(function)
    assert not follows(graph, "question", "second")
    assert follows(graph, "third", "question")


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [
        ("none", 0.0),
        # A loop gives back what it was handed some time after it has ended.
        ("selective", 0.01),
    ],
)
def test_peak_is_the_same_in_every_process(policy: str, tolerance: float) -> None:
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK.format(policy=policy)],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                check=True,
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": "-1",
                    "TF_CPU_ALLOCATOR_USE_BFC": "true",
                    "TF_CPU_BFC_MEM_LIMIT_IN_MB": "512",
                    "PYTHONPATH": str(REPOSITORY),
                },
            ).stdout
        )
        for _ in range(2)
    ]
    assert max(peaks) - min(peaks) <= tolerance * max(peaks)
