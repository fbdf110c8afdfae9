"""Running a function over chunks of examples, one chunk after the other.

The memory that the function needs while it runs is then that of one chunk, however large the
micro-batch is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from finetune.model.barriers import after
from finetune.model.layers import fresh_zeros
from finetune.model.ordering import run_in_order

Tensors = Sequence[tf.Tensor]


class ChunkResult(NamedTuple):
    """What a function returns for one chunk."""

    joined: Tensors
    """Rows of the chunk's examples; those of all chunks are put together."""
    kept: Tensors
    """Likewise rows, but kept chunk by chunk, for the same chunk of a later call."""
    sums: Tensors
    """Terms of sums over all chunks."""


ChunkFunction = Callable[[tf.Tensor, Tensors, Tensors], ChunkResult]
"""Called with the index of the chunk's first example (int32 scalar), the rows of the chunk, and
what an earlier call has kept of it."""


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How the examples of a micro-batch are cut into chunks.

    The chunks have nearly equal sizes: 9 examples, at most 8 at a time, make chunks of 4 and 5.

    XLA must know all sizes when it compiles, so for XLA all chunks have one size. Rows of zeros
    are appended to the last chunk, and taken off the results. For them the function must return
    finite rows, and terms of sums that are 0.

    Attributes:
        examples: number of examples, int32 scalar.
        examples_per_chunk: most examples of a chunk; None for all examples at once.
        xla: build a graph that XLA can compile.
    """

    examples: tf.Tensor
    examples_per_chunk: int | None = None
    xla: bool = False


@dataclasses.dataclass(frozen=True)
class ChunkOutputs:
    """What a chunk function returns, as far as it must be known before the first call.

    Attributes:
        joined_like: tensors like `ChunkResult.joined` of all chunks together: of the same type, and
            with as many rows of the same shape.
        kept_types: types of `ChunkResult.kept`.
        sums_like: tensors with the shapes and types of `ChunkResult.sums`.
        initial_sums: what the sums begin with; None for 0.
    """

    joined_like: Tensors
    kept_types: Sequence[tf.DType] = ()
    sums_like: Tensors = ()
    initial_sums: Tensors | None = None


class AllChunksResult(NamedTuple):
    """What a function has returned for all chunks."""

    joined: list[tf.Tensor]
    """Rows of all examples."""
    kept: list[Any]
    """To be handed to a later `in_chunks` with the same chunks."""
    sums: list[tf.Tensor]
    """Sums over all chunks."""


class _KeptRows(NamedTuple):
    """Rows that are kept chunk by chunk: an element of the array for each chunk."""

    array: tf.TensorArray
    shape: list[int | None]


def in_chunks(
    function: ChunkFunction,
    rows: Tensors,
    kept: Sequence[Any],
    outputs: ChunkOutputs,
    chunking: Chunking,
) -> AllChunksResult:
    """Call a function for all chunks, one after the other.

    Example:
        >>> def doubled(first, rows, kept):
        ...     return ChunkResult([2.0 * rows[0]], [], [])
        >>> chunking = Chunking(tf.constant(9), examples_per_chunk=8)
        >>> in_chunks(doubled, [x], [], ChunkOutputs([x]), chunking).joined

    Args:
        function: what to call.
        rows: tensors with the rows of all examples: the first dimension of each is a multiple of
            the number of examples. The first chunk waits for the first of these tensors.
        kept: what an earlier call with the same chunks has kept; empty if nothing.
        outputs: what the function returns.
        chunking: how the examples are cut.
    """
    if chunking.examples_per_chunk is None:
        result = function(tf.zeros([], tf.int32), rows, kept)
        sums = list(result.sums)
        if outputs.initial_sums is not None:
            sums = _added(outputs.initial_sums, sums)
        return AllChunksResult(list(result.joined), list(result.kept), sums)
    count = _ceil_divide(chunking.examples, chunking.examples_per_chunk)
    # A loop starts when its counter does, and zeros are made when nothing keeps them from it.
    # Without waiting for rows[0], in a backward pass the gradient that comes in, both would be
    # there from the beginning of the step.
    with tf.control_dependencies([rows[0]]):
        start = tf.identity(tf.zeros([], tf.int32))
        if outputs.initial_sums is not None:
            initial = list(outputs.initial_sums)
        elif chunking.xla:
            initial = [_zeros_after(rows[0], x.shape, x.dtype) for x in outputs.sums_like]
        else:
            initial = [fresh_zeros(x) for x in outputs.sums_like]
    size = _ceil_divide(chunking.examples, count) if chunking.xla else None
    loop = _ChunkLoop(function, kept, _Cut(chunking.examples, count, size))
    return loop.run(rows, start, outputs, initial)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The chunks of some examples.

    Attributes:
        examples: number of examples, int32 scalar.
        count: number of chunks, int32 scalar.
        size: for XLA, the examples of every chunk, int32 scalar. None elsewhere, where sizes may
            differ by one example.
    """

    examples: tf.Tensor
    count: tf.Tensor
    size: tf.Tensor | None

    def padded(self, x: tf.Tensor) -> tf.Tensor:
        """Append rows of zeros until all chunks have one size."""
        if self.size is None:
            return x
        wanted = self.size * self.count
        more = (wanted - self.examples) * (tf.shape(x)[0] // self.examples)
        return tf.concat([x, tf.zeros(tf.stack([more, *x.shape[1:]]), x.dtype)], axis=0)

    def first_example(self, index: tf.Tensor) -> tf.Tensor:
        """Index of a chunk's first example."""
        if self.size is not None:
            return index * self.size
        return index * self.examples // self.count

    def rows(self, x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """The rows of one chunk."""
        if self.size is not None:
            rows_per_chunk = tf.shape(x)[0] // self.count
            return take_rows(x, index * rows_per_chunk, rows_per_chunk)
        rows_per_example = tf.shape(x)[0] // self.examples
        first = index * self.examples // self.count
        end = (index + 1) * self.examples // self.count
        return x[first * rows_per_example : end * rows_per_example]

    def arrays(self, types: Sequence[tf.DType]) -> list[tf.TensorArray]:
        """Arrays with an element for each chunk."""
        return [tf.TensorArray(type_, size=self.count, infer_shape=False) for type_ in types]

    def arrays_like(self, tensors: Tensors, trigger: tf.Tensor) -> list[tf.TensorArray]:
        """Arrays for the rows of all chunks.

        XLA fills an array with zeros. It would do so for all layers when the step begins, if the
        zeros did not depend on a tensor that comes later.

        Args:
            tensors: with the rows of all examples.
            trigger: what is known before the first chunk.
        """
        arrays = self.arrays([x.dtype for x in tensors])
        if self.size is None:
            return arrays
        filled = []
        for array, x in zip(arrays, tensors, strict=True):
            rows = self.size * (tf.shape(x)[0] // self.examples)
            shape = tf.stack([self.count, rows, *x.shape[1:]])
            filled.append(array.unstack(_zeros_after(trigger, shape, x.dtype)))
        return filled

    def joined(self, rows: _KeptRows) -> tf.Tensor:
        """Put the rows of all chunks together."""
        if self.size is None:
            return tf.ensure_shape(rows.array.concat(), rows.shape)
        x = tf.reshape(rows.array.stack(), [-1, *rows.shape[1:]])
        return take_rows(x, 0, tf.shape(x)[0] // (self.size * self.count) * self.examples)


@dataclasses.dataclass(frozen=True)
class _ChunkLoop:
    """A loop that calls a function for each chunk."""

    function: ChunkFunction
    kept: Sequence[_KeptRows]
    cut: _Cut

    def run(
        self, rows: Tensors, start: tf.Tensor, outputs: ChunkOutputs, sums: list[tf.Tensor]
    ) -> AllChunksResult:
        """Run the loop from the chunk `start` on; `sums` are what its sums begin with."""
        rows = [self.cut.padded(x) for x in rows]
        # XLA's arrays have elements of one shape, so nothing can be taken out of them.
        emptied = self.cut.size is None and not tf.executing_eagerly()
        shapes: dict[str, list[list[int | None]]] = {}

        def one(
            index: tf.Tensor,
            joined: list[tf.TensorArray],
            kept: list[tf.TensorArray],
            sums: list[tf.Tensor],
            unread: list[tf.TensorArray],
        ) -> tuple[tf.Tensor, Any, Any, list[tf.Tensor], Any]:
            next_index = index + 1
            known, unread = self._take_kept(index, unread)
            first = self.cut.first_example(index)
            result = self.function(first, [self.cut.rows(x, index) for x in rows], known)
            shapes["joined"], shapes["kept"] = map(_row_shapes, (result.joined, result.kept))
            joined = _written(joined, index, result.joined)
            kept = _written(kept, index, result.kept)
            sums = _added(sums, result.sums)
            if self.cut.size is None:
                run_in_order([next_index, *(a.flow for a in (*joined, *kept, *unread)), *sums])
            return next_index, joined, kept, sums, unread

        _, joined, kept, sums, _ = tf.while_loop(
            lambda index, *_: index < self.cut.count,
            one,
            (
                start,
                self.cut.arrays_like(outputs.joined_like, rows[0]),
                self.cut.arrays(outputs.kept_types),
                sums,
                [rows.array for rows in self.kept] if emptied else [],
            ),
            # Chunks that run at the same time would hold the activations of each.
            parallel_iterations=1,
        )
        joined_rows = map(_KeptRows, joined, shapes["joined"])
        return AllChunksResult(
            [self.cut.joined(rows) for rows in joined_rows],
            list(map(_KeptRows, kept, shapes["kept"])),
            sums,
        )

    def _take_kept(
        self, index: tf.Tensor, unread: list[tf.TensorArray]
    ) -> tuple[list[tf.Tensor], list[tf.TensorArray]]:
        """Read what was kept of a chunk, and let the arrays `unread` forget it.

        An array would hold it until the last chunk is done.
        """
        arrays = unread or [rows.array for rows in self.kept]
        known = [
            tf.ensure_shape(array.read(index), rows.shape)
            for array, rows in zip(arrays, self.kept, strict=True)
        ]
        emptied = [
            array.write(index, tf.zeros([0], x.dtype))
            for array, x in zip(unread, known, strict=False)
        ]
        return known, emptied


def _zeros_after(
    trigger: tf.Tensor, shape: tf.TensorShape | tf.Tensor, type_: tf.DType
) -> tf.Tensor:
    """For XLA, make zeros when a tensor is known and not before."""
    return tf.fill(shape, after([trigger], tf.zeros([], type_)))


def _row_shapes(tensors: Tensors) -> list[list[int | None]]:
    return [[None, *x.shape[1:]] for x in tensors]


def _written(
    arrays: Sequence[tf.TensorArray], index: tf.Tensor, tensors: Tensors
) -> list[tf.TensorArray]:
    return [array.write(index, x) for array, x in zip(arrays, tensors, strict=True)]


def _added(totals: Tensors, terms: Tensors) -> list[tf.Tensor]:
    return [total + term for total, term in zip(totals, terms, strict=True)]


def _ceil_divide(number: tf.Tensor, divisor: tf.Tensor | int) -> tf.Tensor:
    return (number + divisor - 1) // divisor


def take_rows(x: tf.Tensor, first: tf.Tensor | int, count: tf.Tensor) -> tf.Tensor:
    """Cut out rows in a way that lets XLA work out their number when it compiles.

    Args:
        x: `[rows, ...]`.
        first: index of the first row, int32 scalar.
        count: number of rows, int32 scalar. For XLA it must follow from the shapes of tensors, and
            within a loop from the shapes of tensors within the loop.

    Returns:
        `[count, ...]`.
    """
    begin, size = tf.stack([first, *[0] * (x.shape.rank - 1)]), tf.stack([count, *x.shape[1:]])
    return tf.ensure_shape(tf.slice(x, begin, size), [None, *x.shape[1:]])
