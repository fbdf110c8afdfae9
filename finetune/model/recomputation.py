"""Regions of a graph whose backward pass runs their forward pass again, a few examples at a time.

The recomputed forward pass must draw the same dropout masks as the first one. With
`tf.recompute_grad` around a stateful random operation it does not: it draws new masks, and the
gradient is that of another function than the loss. Here every mask is a function of tensors that
are passed in (`finetune.model.dropout`), so both passes have the same masks.

A region that treats all examples alike may be run in chunks of examples. Then it holds the
activations of one chunk, however large the micro-batch is; only its inputs and outputs grow with
the micro-batch. The gradients of the weights are added up over the chunks, so they differ from
those of a single chunk by the order of a float32 sum.

A region may name results that are too costly to compute again. They are kept, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import tensorflow as tf

from finetune.model.chunks import (
    ChunkFunction,
    Chunking,
    ChunkOutputs,
    ChunkResult,
    Tensors,
    in_chunks,
)

Keep = Callable[..., tf.Tensor]
"""`keep(function, *arguments)` stands for `function(*arguments)` and may remember the result."""


class Region(Protocol):
    """What can be recomputed: a pure function of tensors.

    It may also capture tensors that need no gradient, such as the dropout key of a step.
    """

    def __call__(
        self, first: tf.Tensor, inputs: Tensors, weights: Tensors, constants: Tensors, keep: Keep
    ) -> tf.Tensor:
        """Compute the rows of some examples.

        Args:
            first: index of the first example within the micro-batch, int32 scalar.
            inputs: float tensors with the rows of these examples.
            weights: float tensors that all examples share.
            constants: likewise rows of these examples, but without a gradient.
            keep: to be called for results that should not be computed again, for the same results
                and in the same order each time.
        """
        ...


def compute(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> tf.Tensor:
    """Call a function: the `Keep` that remembers nothing."""
    return function(*arguments)


def recompute(
    region: Region,
    inputs: Tensors,
    weights: Tensors,
    constants: Tensors,
    chunking: Chunking,
    *,
    kept_types: Sequence[tf.DType] = (),
    gradient_sums: Tensors | None = None,
) -> tf.Tensor:
    """Run a region so that only its arguments, and what it asks to keep, outlive it.

    Example:
        >>> y = recompute(region, [x], [kernel], [], Chunking(examples, examples_per_chunk=4))

    Args:
        region: what to run, see `Region`.
        inputs: tensors that a gradient is wanted for. The first dimension of each is a multiple
            of the number of examples.
        weights: tensors that all examples share; a gradient is wanted for them too.
        constants: tensors with the rows of the examples, without a gradient.
        chunking: how the examples are cut into chunks.
        kept_types: types of what the region asks to keep, in that order; empty to keep nothing.
        gradient_sums: sums that the gradients of the weights are added to. What is returned as
            these gradients are then the new sums. None for the gradients alone.

    Returns:
        What the region returns for all examples, of the type of the first input.
    """
    count, keeps = len(inputs), bool(kept_types)

    @tf.custom_gradient
    def checkpointed(*tensors: tf.Tensor) -> tuple[tf.Tensor, Callable[..., list[tf.Tensor]]]:
        entering, shared = tensors[:count], tensors[count:]

        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            outputs = ChunkOutputs(entering, sums_like=shared, initial_sums=gradient_sums)
            backward = _backward(region, count, shared, chunking, keeps=keeps)
            of_inputs, _, of_weights = in_chunks(
                backward, [upstream, *entering, *constants], kept, outputs, chunking
            )
            # Nothing waits for a weight's gradient until the update, and TensorFlow first runs the
            # operation that became ready last. Without this it would recompute the layers below
            # first, and all their activations would live at once.
            with tf.control_dependencies(of_weights):
                return [*(tf.identity(g) for g in of_inputs), *of_weights]

        forward = _forward(region, count, shared, keeps=keeps)
        outputs = ChunkOutputs(inputs[:1], kept_types)
        (result,), kept, _ = in_chunks(forward, [*entering, *constants], (), outputs, chunking)
        return result, gradient

    return checkpointed(*inputs, *weights)


def _forward(region: Region, inputs: int, weights: Tensors, *, keeps: bool) -> ChunkFunction:
    """Make the forward pass of a chunk; its rows are those of the inputs and the constants."""

    def forward(first: tf.Tensor, rows: Tensors, _: Tensors) -> ChunkResult:
        kept: list[tf.Tensor] = []
        keep = _keep_in(kept) if keeps else compute
        result = region(first, rows[:inputs], weights, rows[inputs:], keep)
        return ChunkResult([result], kept, [])

    return forward


def _backward(
    region: Region, inputs: int, weights: Tensors, chunking: Chunking, *, keeps: bool
) -> ChunkFunction:
    """Make the backward pass of a chunk, which runs the forward pass again.

    Its rows are those of the gradient that comes in, of the inputs and of the constants.

    Args:
        region: what is recomputed.
        inputs: number of its inputs.
        weights: that all chunks share.
        chunking: how the examples are cut.
        keeps: whether the region asks to keep results.
    """

    def backward(first: tf.Tensor, rows: Tensors, kept: Tensors) -> ChunkResult:
        upstream, chunk, constants = rows[0], rows[1 : inputs + 1], rows[inputs + 1 :]
        # A loop is a graph of its own, in which TensorFlow finds nothing twice. XLA takes a loop
        # with a single chunk apart.
        if chunking.xla or chunking.examples_per_chunk is None:
            chunk = [_after(upstream, x) for x in chunk]
        if chunking.xla:
            first = _after(upstream, first)
            kept = [x if x.dtype == tf.bool else _after(upstream, x) for x in kept]
        keep = _replay(kept) if keeps else compute
        with tf.GradientTape() as tape:
            tape.watch([*chunk, *weights])
            result = region(first, chunk, weights, constants, keep)
        found = tape.gradient(
            result,
            [*chunk, *weights],
            output_gradients=upstream,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return ChunkResult(found[:inputs], [], found[inputs:])

    return backward


def _keep_in(kept: list[tf.Tensor]) -> Keep:
    """Make the `Keep` that puts results into a list."""

    def keep(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> tf.Tensor:
        kept.append(function(*arguments))
        return kept[-1]

    return keep


def _replay(kept: Tensors) -> Keep:
    """Make the `Keep` that returns remembered results, with the gradients of their functions."""
    remaining = iter(kept)

    def keep(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> tf.Tensor:
        value = next(remaining)
        if not arguments:
            return value

        @tf.custom_gradient
        def known(*arguments: tf.Tensor) -> tuple[tf.Tensor, Callable[..., list[tf.Tensor]]]:
            def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
                # Nothing reads the result itself, so the graph does not compute it.
                with tf.GradientTape() as tape:
                    tape.watch(arguments)
                    result = function(*arguments)
                return tape.gradient(result, arguments, output_gradients=upstream)

            return tf.identity(value), gradient

        return known(*arguments)

    return keep


def _after(trigger: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Return `x`, but not before `trigger` is known.

    The result is the sum of `x` and a number that is 0 unless `trigger` is NaN. A control
    dependency is not enough outside of a loop: TensorFlow's graph optimizer would find the same
    computation twice and keep the activations of the first, and XLA would move the second one
    before the loss.
    """
    first = tf.reshape(trigger, [-1])[0]
    return x + tf.cast(tf.where(tf.equal(first, first), tf.zeros_like(first), first), x.dtype)
