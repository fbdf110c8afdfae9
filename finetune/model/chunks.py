"""Running a function over chunks of examples, one chunk after the other.

What the function holds while it runs is then that of one chunk, however large the micro-batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from finetune.model.layers import fresh_zeros
from finetune.model.ordering import run_in_order

Tensors = Sequence[tf.Tensor]


class ChunkResult(NamedTuple):
    """What a function returns for one chunk."""

    joined: Tensors
    """With the rows of the chunk."""
    kept: Tensors
    """Put aside, to be given to the chunk of a later call; likewise."""
    sums: Tensors
    """To be added up over the chunks."""


ChunkFunction = Callable[[tf.Tensor, Tensors, Tensors], ChunkResult]
"""Takes the index of a chunk's first example, int32 scalar; rows of the chunk; and what an
earlier function has put aside for it."""


def in_chunks(
    function: ChunkFunction,
    rows: Tensors,
    kept: Sequence[Any],
    *,
    joined_types: Sequence[tf.DType],
    kept_types: Sequence[tf.DType] = (),
    sums_like: Tensors = (),
    totals: Tensors | None = None,
    examples: tf.Tensor,
    examples_per_chunk: int | None,
    xla: bool = False,
) -> tuple[list[tf.Tensor], list[Any], list[tf.Tensor]]:
    """Call a function for all chunks, one by one.

    XLA wants sizes that it knows when it compiles. For XLA all chunks have one size: rows of
    zeros are added behind the last example until they do, and taken off the results. The function
    must return finite numbers for them, and sums that they add nothing to.

    Args:
        function: what to call.
        rows: tensors with the rows of all examples; the first chunk waits for the first of them.
        kept: what an earlier call with the same chunks has put aside.
        joined_types: types of `ChunkResult.joined`.
        kept_types: types of `ChunkResult.kept`.
        sums_like: tensors with the shapes of `ChunkResult.sums`.
        totals: what to add those to; None for nothing.
        examples: number of examples, int32 scalar.
        examples_per_chunk: most examples at a time; None for all at once.
        xla: make a graph that XLA can compile.

    Returns:
        The parts of the results, for all chunks: put together along their rows, put aside, and
        added up.
    """
    if examples_per_chunk is None:
        result = function(tf.zeros([], tf.int32), rows, kept)
        sums = list(result.sums)
        if totals is not None:
            sums = _added(totals, sums)
        return list(result.joined), list(result.kept), sums
    chunks = (examples + examples_per_chunk - 1) // examples_per_chunk
    # A loop starts when its counter does, and zeros are made when nothing keeps them from it.
    # Without waiting for rows[0], in a backward pass the gradient that comes in, both would be
    # there from the beginning of the step.
    with tf.control_dependencies([rows[0]]):
        start = tf.identity(tf.zeros([], tf.int32))
        if totals is None:
            totals = [fresh_zeros(x) for x in sums_like]
    if xla:
        size = (examples + chunks - 1) // chunks
        rows = [_padded(x, examples, size * chunks) for x in rows]

    def cut(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        if xla:
            rows_per_chunk = tf.shape(x)[0] // chunks
            return take_rows(x, index * rows_per_chunk, rows_per_chunk)
        # Chunks of nearly equal size: 9 examples, at most 8 at a time, are 4 and 5.
        rows_per_example = tf.shape(x)[0] // examples
        first, end = index * examples // chunks, (index + 1) * examples // chunks
        return x[first * rows_per_example : end * rows_per_example]

    def join(array: tf.TensorArray, shape: list[int | None]) -> tf.Tensor:
        if not xla:
            return tf.ensure_shape(array.concat(), shape)
        x = tf.reshape(array.stack(), [-1, *shape[1:]])
        return take_rows(x, 0, tf.shape(x)[0] // (size * chunks) * examples)

    def new_arrays(types: Sequence[tf.DType]) -> list[tf.TensorArray]:
        return [tf.TensorArray(type_, size=chunks, infer_shape=False) for type_ in types]

    shapes: dict[str, list[list[int | None]]] = {}

    # XLA's arrays have elements of one shape, so nothing can be taken out of them.
    empties = not xla and not tf.executing_eagerly()

    def one(
        index: tf.Tensor,
        joined: list[tf.TensorArray],
        put_aside: list[tf.TensorArray],
        sums: list[tf.Tensor],
        left: list[tf.TensorArray],
    ) -> tuple[tf.Tensor, Any, Any, list[tf.Tensor], Any]:
        next_index = index + 1
        arrays = left or [array for array, _ in kept]
        known = [
            tf.ensure_shape(array.read(index), shape)
            for array, (_, shape) in zip(arrays, kept, strict=True)
        ]
        # What has been read is let go: the array would hold it until the last chunk is done.
        left = [a.write(index, tf.zeros([0], x.dtype)) for a, x in zip(left, known, strict=False)]
        first = index * size if xla else index * examples // chunks
        result = function(first, [cut(x, index) for x in rows], known)
        for name, part in (("joined", result.joined), ("kept", result.kept)):
            shapes[name] = [[None, *x.shape[1:]] for x in part]
        joined = [a.write(index, x) for a, x in zip(joined, result.joined, strict=True)]
        put_aside = [a.write(index, x) for a, x in zip(put_aside, result.kept, strict=True)]
        sums = _added(sums, result.sums)
        if not xla:
            run_in_order([next_index, *(a.flow for a in (*joined, *put_aside, *left)), *sums])
        return next_index, joined, put_aside, sums, left

    _, joined, put_aside, sums, _ = tf.while_loop(
        lambda index, *_: index < chunks,
        one,
        (
            start,
            new_arrays(joined_types),
            new_arrays(kept_types),
            list(totals),
            [array for array, _ in kept] if empties else [],
        ),
        # Chunks at the same time would hold the activations of each.
        parallel_iterations=1,
    )
    return (
        [join(array, shape) for array, shape in zip(joined, shapes["joined"], strict=True)],
        list(zip(put_aside, shapes["kept"], strict=True)),
        sums,
    )


def _added(totals: Tensors, terms: Tensors) -> list[tf.Tensor]:
    return [total + term for total, term in zip(totals, terms, strict=True)]


def _padded(x: tf.Tensor, examples: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
    """Append rows of zeros for the examples that are wanted."""
    more = (wanted - examples) * (tf.shape(x)[0] // examples)
    return tf.concat([x, tf.zeros(tf.stack([more, *x.shape[1:]]), x.dtype)], axis=0)


def take_rows(x: tf.Tensor, first: tf.Tensor | int, count: tf.Tensor) -> tf.Tensor:
    """Cut rows out by their number, which XLA can work out when it compiles.

    Args:
        x: `[rows, ...]`.
        first: index of the first, int32 scalar.
        count: their number, int32 scalar. For XLA it must follow from the shapes of tensors, and
            within a loop from the shapes of tensors within the loop.
    """
    begin, size = tf.stack([first, *[0] * (x.shape.rank - 1)]), tf.stack([count, *x.shape[1:]])
    return tf.ensure_shape(tf.slice(x, begin, size), [None, *x.shape[1:]])
