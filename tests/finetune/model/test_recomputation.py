"""Recomputed regions: values, gradients, chunks, and what is kept or computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.model.chunks import Chunking, Tensors
from finetune.model.encoder_layer import layer_weight_names
from finetune.model.modeling import create_variables
from finetune.model.recomputation import Keep, compute, recompute
from helpers.tiny_models import (
    CONFIG,
    WEIGHTS_SEED,
    gradients_of_losses,
    operations_before,
    operations_needed,
    random_batch,
)

ROWS_PER_EXAMPLE = 2


def region(
    first: tf.Tensor, inputs: Tensors, weights: Tensors, constants: Tensors, keep: Keep
) -> tf.Tensor:
    """Use everything that a region is given, each example's place in the batch too."""
    (x, z), (w, v), (shift,) = inputs, weights, constants
    examples = tf.shape(shift)[0]
    place = tf.cast(first + tf.range(examples), x.dtype)[:, None] + shift
    y = keep(tf.matmul, tf.sin(x), w)
    mask = keep(lambda: tf.cast(y, tf.float32) > 0)
    y = tf.where(mask, y, 0.5 * y)
    return keep(tf.matmul, y * tf.repeat(place, ROWS_PER_EXAMPLE, axis=0), v) + tf.exp(z)


KEPT = (tf.float64, tf.bool, tf.float64)


def tensors(examples: int) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
    draw = np.random.default_rng(examples).normal
    rows = ROWS_PER_EXAMPLE * examples
    inputs = [tf.constant(draw(size=(rows, width))) for width in (3, 2)]
    return (
        inputs,
        [tf.constant(draw(size=s)) for s in ((3, 4), (4, 2))],
        [tf.constant(draw(size=(examples, 1)))],
    )


def value_and_gradients(
    run: Callable[[Tensors, Tensors, Tensors], tf.Tensor], examples: int
) -> list[np.ndarray]:
    inputs, weights, constants = tensors(examples)
    with tf.GradientTape() as tape:
        tape.watch([*inputs, *weights])
        y = run(inputs, weights, constants)
        loss = tf.reduce_sum(tf.cos(y))
    return [y.numpy(), *(g.numpy() for g in tape.gradient(loss, [*inputs, *weights]))]


def plain(inputs: Tensors, weights: Tensors, constants: Tensors) -> tf.Tensor:
    return region(tf.constant(0), inputs, weights, constants, compute)


@settings(max_examples=50)
@given(
    examples=st.integers(1, 7),
    examples_per_chunk=st.none() | st.integers(1, 8),
    kept_types=st.sampled_from([(), KEPT]),
    xla=st.booleans(),
)
def test_exact_values_and_gradients(
    examples: int, examples_per_chunk: int | None, kept_types: Sequence[tf.DType], xla: bool
) -> None:
    found = value_and_gradients(
        lambda *arguments: recompute(
            region,
            *arguments,
            Chunking(tf.constant(examples), examples_per_chunk, xla),
            kept_types=kept_types,
        ),
        examples,
    )
    for got, expected in zip(found, value_and_gradients(plain, examples), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("examples", "per_chunk", "sizes"),
    [(9, 8, [4, 5]), (8, 4, [4, 4]), (3, 1, [1, 1, 1]), (2, 5, [2])],
)
def test_chunks_are_even_and_know_their_place(
    examples: int, per_chunk: int, sizes: list[int]
) -> None:
    seen: list[tuple[int, list[float]]] = []

    def record(
        first: tf.Tensor, inputs: Tensors, _: Tensors, constants: Tensors, keep: Keep
    ) -> tf.Tensor:
        seen.append((int(first), list(constants[0].numpy())))
        return inputs[0] * 2.0

    x = tf.range(examples, dtype=tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = recompute(record, [x], [], [x], Chunking(tf.constant(examples), per_chunk))
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(tape.gradient(y, x), np.full(examples, 2.0))
    # Once forwards and once backwards.
    assert [len(rows) for _, rows in seen] == 2 * sizes
    assert all(rows == list(range(first, first + len(rows))) for first, rows in seen)


@pytest.mark.parametrize("examples_per_chunk", [None, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_broken_gradient_is_hidden(bad: float, examples_per_chunk: int | None) -> None:
    x, w = tf.constant([1.0, 2.0]), tf.constant(3.0)
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        y = recompute(
            lambda _, inputs, weights, *__: inputs[0] * weights[0],
            [x],
            [w],
            [],
            Chunking(tf.constant(2), examples_per_chunk),
        )
    dx, dw = tape.gradient(y, [x, w], output_gradients=tf.constant([bad, 1.0]))
    assert not np.isfinite(dx[0])
    assert not np.isfinite(dw)


def test_what_is_kept_is_not_computed_again() -> None:
    def products(kept_types: Sequence[tf.DType]) -> int:
        @tf.function
        def gradients(examples: tf.Tensor) -> list[tf.Tensor]:
            inputs, weights, constants = tensors(3)
            with tf.GradientTape() as tape:
                tape.watch([*inputs, *weights])
                y = recompute(
                    region, inputs, weights, constants, Chunking(examples), kept_types=kept_types
                )
                loss = tf.reduce_sum(tf.cos(y))
            return tape.gradient(loss, [*inputs, *weights])

        graph = gradients.get_concrete_function(tf.TensorSpec([], tf.int32)).graph
        return operations_needed(graph)["MatMul"]

    # Two forwards and four backwards. The second one's value is needed by no gradient.
    assert products(KEPT) == 6
    assert products(()) >= 7


def test_a_region_must_keep_what_it_said() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        value_and_gradients(
            lambda *arguments: recompute(
                region, *arguments, Chunking(tf.constant(2), 1), kept_types=KEPT[:2]
            ),
            2,
        )


@pytest.mark.parametrize("policy", ["none", "full"])
def test_masks_are_drawn_when_their_layer_is_reached(policy: str) -> None:
    # They depend on no activation, so a graph would draw those of all layers at once, and find
    # those of a recomputation to be equal to the first ones: each way they would all be kept.
    variables = create_variables(CONFIG, "squad", seed=WEIGHTS_SEED)

    @tf.function
    def gradients() -> dict[str, tf.Tensor]:
        return gradients_of_losses(variables, "squad", random_batch(2, 4), policy)

    graph = gradients.get_concrete_function().graph
    needed = operations_before(graph.outputs)
    masks = [op for op in needed if op.type == "StatelessRandomUniformFullIntV2"]
    assert masks
    # Every mask comes after the embeddings, and one of a recomputation after the loss.
    before = [{other.type for other in operations_before(mask.outputs)} for mask in masks]
    assert all("GatherV2" in types for types in before)
    after_loss = sum("SparseSoftmaxCrossEntropyWithLogits" in types for types in before)
    assert after_loss == (len(masks) / 2 if policy == "full" else 0)
    # Those of the second layer come after the first layer.
    products = [
        sum(other.type in ("MatMul", "BatchMatMulV2") for other in operations_before(mask.outputs))
        for mask in masks
    ]
    assert max(products) > 6


@pytest.mark.parametrize("policy", ["selective", "nested"])
def test_sums_over_chunks_are_made_in_the_backward_pass(policy: str) -> None:
    # They depend on nothing, so those of all layers would be there from the step's beginning.
    variables = create_variables(CONFIG, "squad", seed=WEIGHTS_SEED)

    @tf.function
    def gradients() -> dict[str, tf.Tensor]:
        return gradients_of_losses(variables, "squad", random_batch(2, 4), policy)

    graph = gradients.get_concrete_function().graph
    sums = [op for op in operations_before(graph.outputs) if op.type == "Empty"]
    assert len(sums) == CONFIG.num_hidden_layers * len(layer_weight_names(0))
    for op in sums:
        before = {other.type for other in operations_before(op.outputs)}
        assert "SparseSoftmaxCrossEntropyWithLogits" in before
