"""Regions whose backward pass runs their forward pass again, a few examples at a time.

The recomputed forward pass must draw the dropout masks of the first one. `tf.recompute_grad`
around a stateful random op does not: it draws new masks, and the gradient belongs to another
function than the loss. Here every mask is a function of tensors that are passed in
(`finetune.dropout`), so both passes agree by construction.

A region that treats every example alike may be run in blocks of examples. What it holds in
between is then that of one block, however large the micro-batch is; its inputs and outputs alone
grow with the batch. Gradients of weights are added up over the blocks, so they differ from those
of one block by the order of a float32 sum.

A region may name results that are too costly to compute again. They are kept, block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from finetune.layers import fresh_zeros

Tensors = Sequence[tf.Tensor]
Keep = Callable[..., tf.Tensor]
"""`keep(function, *arguments)` stands for `function(*arguments)` and may remember the result."""


class Region(Protocol):
    """What can be recomputed: a pure function of tensors.

    What else it needs, as the step's dropout key, it may capture as long as no gradient is wanted.
    """

    def __call__(
        self, first: tf.Tensor, inputs: Tensors, weights: Tensors, constants: Tensors, keep: Keep
    ) -> tf.Tensor:
        """Compute the rows of some examples.

        Args:
            first: index of their first example within the micro-batch, int32 scalar.
            inputs: float tensors with their rows.
            weights: float tensors that all examples share.
            constants: tensors with their rows that no gradient is wanted for.
            keep: to be called for results that need not be computed again, always the same
                ones in the same order.
        """
        ...


def compute(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> tf.Tensor:
    """Call a function; the `Keep` that remembers nothing."""
    return function(*arguments)


def recompute(
    region: Region,
    inputs: Tensors,
    weights: Tensors,
    constants: Tensors = (),
    *,
    examples: tf.Tensor,
    examples_per_block: int | None = None,
    kept_types: Sequence[tf.DType] = (),
    totals: Tensors | None = None,
) -> tf.Tensor:
    """Run a region so that only its arguments, and what it asks to keep, outlive it.

    Args:
        region: see `Region`.
        inputs: its inputs; the first dimension of each is a multiple of the number of examples.
        weights: its weights.
        constants: its constants; likewise.
        examples: number of examples, int32 scalar.
        examples_per_block: most examples at a time; None for all at once.
        kept_types: types of what the region asks to keep, in that order; empty to keep nothing.
        totals: what the gradients of the weights are to be added to, so that what is returned
            as their gradients are new totals. None for their gradients alone.

    Returns:
        What the region returns for all examples, of the type of the first input.
    """
    count = len(inputs)
    type_ = inputs[0].dtype
    run = functools.partial(_in_blocks, examples=examples, examples_per_block=examples_per_block)

    @tf.custom_gradient
    def checkpointed(*tensors: tf.Tensor) -> tuple[tf.Tensor, Callable[..., list[tf.Tensor]]]:
        entering, shared = tensors[:count], tensors[count:]

        def forward(first: tf.Tensor, rows: Tensors, _: Tensors) -> _BlockResult:
            kept: list[tf.Tensor] = []
            keep = _keep_in(kept) if kept_types else compute
            result = region(first, rows[:count], shared, rows[count:], keep)
            return _BlockResult([result], kept, [])

        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            def backward(first: tf.Tensor, rows: Tensors, kept: Tensors) -> _BlockResult:
                upstream, block, rest = rows[0], rows[1 : count + 1], rows[count + 1 :]
                keep = _replay(kept) if kept_types else compute
                with tf.GradientTape() as tape:
                    tape.watch([*block, *shared])
                    result = region(first, block, shared, rest, keep)
                found = tape.gradient(
                    result,
                    [*block, *shared],
                    output_gradients=upstream,
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )
                return _BlockResult(found[:count], [], found[count:])

            again: Tensors = entering
            if examples_per_block is None:
                again = [_after(upstream, x) for x in entering]
            of_inputs, _, of_weights = run(
                backward,
                [upstream, *again, *constants],
                kept,
                joined_types=[x.dtype for x in entering],
                sums_like=shared,
                totals=totals,
            )
            # Nothing waits for a weight's gradient until the update, and TensorFlow prefers the
            # operation that became ready last: without this the layers below would be recomputed
            # first, and all their activations would live at once.
            with tf.control_dependencies(of_weights):
                return [*(tf.identity(g) for g in of_inputs), *of_weights]

        (result,), kept, _ = run(
            forward, [*entering, *constants], (), joined_types=[type_], kept_types=kept_types
        )
        return result, gradient

    return checkpointed(*inputs, *weights)


def _keep_in(kept: list[tf.Tensor]) -> Keep:
    """Make the `Keep` that remembers results."""

    def keep(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> tf.Tensor:
        kept.append(function(*arguments))
        return kept[-1]

    return keep


def _replay(kept: Tensors) -> Keep:
    """Make the `Keep` that returns what was remembered, with the gradient of the function."""
    remaining = iter(kept)

    def keep(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> tf.Tensor:
        value = next(remaining)
        if not arguments:
            return value

        @tf.custom_gradient
        def known(*arguments: tf.Tensor) -> tuple[tf.Tensor, Callable[..., list[tf.Tensor]]]:
            def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
                # The result itself is not asked for, so the graph does not compute it.
                with tf.GradientTape() as tape:
                    tape.watch(arguments)
                    result = function(*arguments)
                return tape.gradient(result, arguments, output_gradients=upstream)

            return tf.identity(value), gradient

        return known(*arguments)

    return keep


class _BlockResult(NamedTuple):
    joined: Tensors
    """With the rows of the block."""
    kept: Tensors
    """Put aside, to be given to the block of a later call."""
    sums: Tensors
    """To be added up over the blocks."""


def _in_blocks(
    function: Callable[[tf.Tensor, Tensors, Tensors], _BlockResult],
    rows: Tensors,
    kept: Sequence[Any],
    *,
    joined_types: Sequence[tf.DType],
    kept_types: Sequence[tf.DType] = (),
    sums_like: Tensors = (),
    totals: Tensors | None = None,
    examples: tf.Tensor,
    examples_per_block: int | None,
) -> tuple[list[tf.Tensor], list[Any], list[tf.Tensor]]:
    """Call `function(first, rows of a block, kept of a block)` for all blocks, one by one.

    Args:
        function: what to call.
        rows: tensors with the rows of all examples; the first block waits for the first of them.
        kept: what an earlier call with the same blocks has put aside.
        joined_types: types of `_BlockResult.joined`.
        kept_types: types of `_BlockResult.kept`.
        sums_like: tensors with the shapes of `_BlockResult.sums`.
        totals: what to add those to; None for nothing.
        examples: number of examples, int32 scalar.
        examples_per_block: most examples at a time; None for all at once.

    Returns:
        The parts of the results, for all blocks: put together along their rows, put aside, and
        added up.
    """
    if examples_per_block is None:
        result = function(tf.zeros([], tf.int32), rows, kept)
        sums = list(result.sums)
        if totals is not None:
            sums = [total + term for total, term in zip(totals, sums, strict=True)]
        return list(result.joined), list(result.kept), sums
    blocks = (examples + examples_per_block - 1) // examples_per_block
    # A loop starts when its counter does, and zeros are made when nothing keeps them from it.
    # Without waiting for rows[0], in a backward pass the gradient that comes in, both would be
    # there from the beginning of the step.
    with tf.control_dependencies([rows[0]]):
        start = tf.identity(tf.zeros([], tf.int32))
        if totals is None:
            totals = [fresh_zeros(x) for x in sums_like]

    def new_arrays(types: Sequence[tf.DType]) -> list[tf.TensorArray]:
        return [tf.TensorArray(type_, size=blocks, infer_shape=False) for type_ in types]

    shapes: dict[str, list[list[int | None]]] = {}

    def one(
        index: tf.Tensor,
        joined: list[tf.TensorArray],
        put_aside: list[tf.TensorArray],
        sums: list[tf.Tensor],
    ) -> tuple[tf.Tensor, list[tf.TensorArray], list[tf.TensorArray], list[tf.Tensor]]:
        # Blocks of nearly equal size: 9 examples, at most 8 at a time, are 4 and 5.
        first, end = index * examples // blocks, (index + 1) * examples // blocks

        def cut(x: tf.Tensor) -> tf.Tensor:
            rows_per_example = tf.shape(x)[0] // examples
            return x[first * rows_per_example : end * rows_per_example]

        known = [tf.ensure_shape(array.read(index), shape) for array, shape in kept]
        result = function(first, [cut(x) for x in rows], known)
        for name, part in (("joined", result.joined), ("kept", result.kept)):
            shapes[name] = [[None, *x.shape[1:]] for x in part]
        return (
            index + 1,
            [a.write(index, x) for a, x in zip(joined, result.joined, strict=True)],
            [a.write(index, x) for a, x in zip(put_aside, result.kept, strict=True)],
            [total + term for total, term in zip(sums, result.sums, strict=True)],
        )

    _, joined, put_aside, sums = tf.while_loop(
        lambda index, *_: index < blocks,
        one,
        (
            start,
            new_arrays(joined_types),
            new_arrays(kept_types),
            list(totals),
        ),
        # Blocks at the same time would hold the activations of each.
        parallel_iterations=1,
    )
    return (
        [
            tf.ensure_shape(array.concat(), shape)
            for array, shape in zip(joined, shapes["joined"], strict=True)
        ],
        list(zip(put_aside, shapes["kept"], strict=True)),
        sums,
    )


def _after(trigger: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Return `x`, but not before `trigger` is known: `x` plus what is 0 unless `trigger` is NaN.

    A control dependency is not enough in a graph of one piece: its optimizer would see the same
    computation twice and keep the activations of the first, and XLA would move the second one
    before the loss.
    """
    first = tf.reshape(trigger, [-1])[0]
    return x + tf.cast(tf.where(tf.equal(first, first), tf.zeros_like(first), first), x.dtype)
