"""Barriers change no number, and there are none where TensorFlow runs a graph itself."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from bertbench.compiling.compilation import compile_step
from bertbench.compiling.installed import has_compiler
from bertbench.compiling.target import compile_target
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.accelerators import find_accelerator
from bertbench.memory.footprint import predict_footprint
from finetune.model.barriers import after, barriers, stored
from finetune.spec.checkpointing import parse_checkpointing


def graph_of(xla: bool) -> tf.types.experimental.ConcreteFunction:
    @tf.function(jit_compile=xla, autograph=False)
    def function(x: tf.Tensor) -> tf.Tensor:
        with barriers(xla):
            return stored(tf.tanh(x)) + after([tf.exp(x)], x)

    return function.get_concrete_function(tf.TensorSpec([None], tf.float32))


def test_there_are_barriers_for_xla_alone() -> None:
    def types(xla: bool) -> list[str]:
        return [operation.type for operation in graph_of(xla).graph.get_operations()]

    assert types(True).count("XlaOptimizationBarrier") == 2
    assert "XlaOptimizationBarrier" not in types(False)
    # Outside of the block there are none.
    x = tf.constant([1.0])
    assert after([x], x) is x
    assert stored(x) is x


def test_barriers_change_nothing() -> None:
    x = tf.constant(np.linspace(-2, 2, 7), tf.float32)
    np.testing.assert_allclose(graph_of(True)(x), graph_of(False)(x), rtol=1e-6)


@pytest.mark.skipif(not has_compiler("gpu"), reason="needs bertbench[compile-gpu]")
@pytest.mark.parametrize(
    ("policy", "precision"),
    [
        ("none", "float32"),
        pytest.param("full", "float32", marks=pytest.mark.slow),
        pytest.param("selective", "float32", marks=pytest.mark.slow),
        pytest.param("nested", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_gpus_compiler_keeps_what_the_policy_keeps(policy: str, precision: str) -> None:
    """Without barriers it would keep half as much again."""
    levers = Levers(parse_checkpointing(policy), precision=precision, xla=True)
    step = Setup(published_workload("bert-tiny", 384), levers).step(32)
    compilation = compile_step(step, compile_target(find_accelerator("a100")))
    assert compilation.memory is not None, compilation.message
    expected = predict_footprint(step).peak_bytes
    assert 0.9 * expected < compilation.memory.device_bytes < 1.04 * expected
