"""Tests of finetune.model.layers: values and gradients against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from finetune.model.layers import activation, dense, fresh_zeros, layer_norm
from helpers.tiny_models import operations_before

EPSILON = 1e-12
NORMAL_CDF = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))


def reference_layer_norm(
    x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float
) -> np.ndarray:
    variance = x.var(axis=-1, keepdims=True)
    return gamma * (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(variance + epsilon) + beta


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def largest_gradient_error(function: object, inputs: list[np.ndarray]) -> float:
    theory, numeric = tf.test.compute_gradient(function, [tf.constant(x) for x in inputs], 1e-5)
    return max(float(np.max(np.abs(t - n))) for t, n in zip(theory, numeric, strict=True))


@pytest.mark.parametrize("epsilon", [EPSILON, 0.5])
def test_layer_norm_in_double_precision(epsilon: float) -> None:
    x, gamma, beta = draw(4, 6), draw(6, seed=1), draw(6, seed=2)
    y = layer_norm(tf.constant(x), tf.constant(gamma), tf.constant(beta), epsilon)
    np.testing.assert_allclose(y, reference_layer_norm(x, gamma, beta, epsilon), rtol=1e-12)
    error = largest_gradient_error(
        lambda x, gamma, beta: layer_norm(x, gamma, beta, epsilon), [x, gamma, beta]
    )
    assert error < 1e-8


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1e-4), (0.0, 1e4)])
def test_layer_norm_in_single_precision(mean: float, spread: float) -> None:
    x32 = (mean + spread * draw(5, 64)).astype(np.float32)
    gamma, beta = draw(64, seed=1).astype(np.float32), draw(64, seed=2).astype(np.float32)
    expected = reference_layer_norm(x32.astype(np.float64), gamma, beta, EPSILON)
    # A mean of 1000 costs three of the seven digits that x has.
    tolerance = 3e-6 if mean == 0 else 1e-3
    y = layer_norm(tf.constant(x32), tf.constant(gamma), tf.constant(beta), EPSILON)
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


def test_layer_norm_of_a_constant_row_is_its_shift() -> None:
    gamma, beta = tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])
    x = tf.constant([[7.0, 7.0]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer_norm(x, gamma, beta, EPSILON)
    np.testing.assert_array_equal(y, [[3.0, 4.0]])
    assert np.isfinite(tape.gradient(y, x)).all()


def test_gelus_by_their_definitions() -> None:
    x = np.linspace(-6, 6, 241)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    erf = x * NORMAL_CDF(x)
    assert np.abs(tanh - erf).max() > 1e-4  # they can be told apart
    np.testing.assert_allclose(activation(tf.constant(x), "gelu_tanh"), tanh, atol=1e-14)
    np.testing.assert_allclose(activation(tf.constant(x), "gelu_erf"), erf, atol=1e-14)
    for name, expected in (("gelu_tanh", tanh), ("gelu_erf", erf)):
        single = activation(tf.constant(x, tf.float32), name)
        np.testing.assert_allclose(single, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu_erf"])
def test_gelu_gradients(name: str) -> None:
    x = np.linspace(-5, 5, 41)
    assert largest_gradient_error(lambda x: activation(x, name), [x]) < 1e-9


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu_erf", "relu"])
def test_activations_far_from_zero(name: str) -> None:
    x = tf.constant([-1e6, -50.0, 50.0, 1e6])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = activation(x, name)
    np.testing.assert_array_equal(y, [0.0, 0.0, 50.0, 1e6])
    np.testing.assert_array_equal(tape.gradient(y, x), [0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu_erf"])
def test_gelu_keeps_its_input_alone(name: str) -> None:
    graph = tf.Graph()
    with graph.as_default():
        x = tf.identity(tf.zeros((2, 3)))
        y = activation(x, name)
        forward = {op.name for op in graph.get_operations()}
        (gradient,) = tf.gradients(y, [x])
    assert outputs_read_later(graph, forward, gradient) <= {x.op.name}


def test_layer_norm_keeps_its_input_and_two_numbers_a_row() -> None:
    graph = tf.Graph()
    with graph.as_default():
        x, gamma, beta = tf.identity(tf.zeros((2, 3))), tf.ones(3), tf.zeros(3)
        y = layer_norm(x, gamma, beta, EPSILON)
        forward = {op.name for op in graph.get_operations()}
        gradients = tf.gradients(y, [x, gamma, beta])
    kept = set().union(*(outputs_read_later(graph, forward, g) for g in gradients))
    full_size = {n for n in kept if graph.get_operation_by_name(n).outputs[0].shape == (2, 3)}
    assert full_size <= {x.op.name}


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu_erf", "layer_norm"])
def test_gradients_wait_for_the_gradient_that_comes_in(name: str) -> None:
    # What depends on the forward pass alone would be computed during it, and be kept.
    graph = tf.Graph()
    with graph.as_default():
        x = tf.identity(tf.zeros((2, 3)))
        if name == "layer_norm":
            y = layer_norm(x, tf.ones(3), tf.zeros(3), EPSILON)
        else:
            y = activation(x, name)
        forward = set(graph.get_operations())
        dy = tf.identity(tf.ones((2, 3)))
        tf.gradients(y, [x], grad_ys=[dy])
    late = {dy.op}
    for op in graph.get_operations():
        if late & {*(tensor.op for tensor in op.inputs), *op.control_inputs}:
            late.add(op)
    sized = {op for op in graph.get_operations() if any(t.shape == (2, 3) for t in op.outputs)}
    # tf.gradients adds zeros that nothing reads.
    early = {op for op in sized - forward - late if op.type not in ("ZerosLike", "Const")}
    assert not {op.name for op in early}


def outputs_read_later(graph: tf.Graph, forward: set[str], gradient: tf.Tensor) -> set[str]:
    """Names of the forward pass's activations that the gradient's computation reads."""
    kept, waiting, seen = set(), [gradient.op], set()
    while waiting:
        op = waiting.pop()
        for tensor in op.inputs:
            if tensor.op.name in forward:
                if tensor.op.type not in ("Const", "Identity") or tensor.op.inputs:
                    kept.add(tensor.op.name)
            elif tensor.op.name not in seen:
                seen.add(tensor.op.name)
                waiting.append(tensor.op)
    return kept


def test_dense() -> None:
    x, kernel, bias = draw(3, 4), draw(4, 2, seed=1), draw(2, seed=2)
    y = dense(tf.constant(x), tf.constant(kernel), tf.constant(bias))
    np.testing.assert_allclose(y, x @ kernel + bias, rtol=1e-12)
    assert largest_gradient_error(dense, [x, kernel, bias]) < 1e-8


def test_dense_gives_weights_their_gradients_before_it_goes_on() -> None:
    graph = tf.Graph()
    with graph.as_default():
        x, kernel, bias = (tf.identity(tf.zeros(shape)) for shape in ((3, 4), (4, 2), (2,)))
        dx, d_kernel, d_bias = tf.gradients(dense(x, kernel, bias), [x, kernel, bias])
    assert {d_kernel.op, d_bias.op} <= operations_before([dx])


def test_zeros_to_be_added_to_are_new_in_every_place_and_every_time() -> None:
    @tf.function
    def sums(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        like = tf.zeros((2, 3))
        first, second = fresh_zeros(like), fresh_zeros(like)
        return tf.raw_ops.InplaceAdd(x=first, i=[1], v=rows), second

    for _ in range(2):
        first, second = sums(tf.ones((1, 3)))
        np.testing.assert_array_equal(first, [[0, 0, 0], [1, 1, 1]])
        np.testing.assert_array_equal(second, np.zeros((2, 3)))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="'swish'"):
        activation(tf.zeros(1), "swish")
