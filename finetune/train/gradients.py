"""Losses of examples, and the gradients of an effective batch, one micro-batch after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import tensorflow as tf

from finetune.model.barriers import barriers
from finetune.model.chunks import take_rows
from finetune.model.dropout import DropoutKey
from finetune.model.encoder_layer import layer_weight_names
from finetune.model.layers import fresh_zeros
from finetune.model.modeling import (
    PLAIN_FORWARD,
    ForwardPass,
    Variables,
    classifier_logits,
    encode,
    squad_logits,
)
from finetune.model.ordering import run_in_order
from finetune.spec.config import BertConfig
from finetune.spec.step_settings import ModelSpec
from finetune.train.batches import Batch
from finetune.train.optimization import OptimizerState


def example_losses(
    variables: Variables,
    config: BertConfig,
    head: str,
    batch: Batch,
    forward: ForwardPass = PLAIN_FORWARD,
) -> tf.Tensor:
    """Loss of each example, float32 `[b]`.

    For a class its cross-entropy; for an answer the mean of the cross-entropies of start and end
    position, as in the original's `run_classifier.py` and `run_squad.py`; for a regression the
    squared error. A position outside the sequence adds nothing, as the original's one-hot rows of
    zeros.

    Args:
        variables: the model.
        config: its configuration.
        head: its head, one of `finetune.spec.config.HEADS`.
        batch: int32 `[b, s]` under `INPUT_NAMES`, `[b]` under the head's `TARGET_NAMES`.
        forward: how to compute the encoder.
    """
    sequence = encode(variables, config, batch, forward)
    if head == "squad":
        start_logits, end_logits = tf.unstack(squad_logits(variables, sequence))
        return 0.5 * (
            _cross_entropy(start_logits, batch["start_positions"])
            + _cross_entropy(end_logits, batch["end_positions"])
        )
    logits = classifier_logits(variables, config, sequence, forward.dropout_key)
    if head == "regressor":
        return tf.math.squared_difference(logits[:, 0], batch["label_values"])
    return _cross_entropy(logits, batch["label_ids"])


def _cross_entropy(logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    inside = tf.logical_and(target >= 0, target < tf.shape(logits)[1])
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.where(inside, target, 0), logits=logits
    )
    return losses * tf.cast(inside, tf.float32)


@dataclasses.dataclass(frozen=True)
class BatchPart:
    """Some rows of an effective batch.

    Attributes:
        rows: inputs, targets and weights of these rows.
        first_row: index of the first of them within the effective batch, int64 scalar.
        total_weight: sum of the weights of the whole effective batch, float32 scalar.
    """

    rows: Batch
    first_row: tf.Tensor
    total_weight: tf.Tensor

    def micro_batch(self, index: tf.Tensor, count: int) -> BatchPart:
        """One of `count` micro-batches of equal size."""
        size = tf.shape(self.rows["weights"])[0] // count
        start = index * size
        rows = {name: take_rows(value, start, size) for name, value in self.rows.items()}
        return BatchPart(rows, self.first_row + tf.cast(start, tf.int64), self.total_weight)


@dataclasses.dataclass(frozen=True)
class LossGradients:
    """The loss of a part of an effective batch, with the gradients of all trained variables.

    Attributes:
        variables: the model.
        trained: those of its variables that are trained, by name.
        spec: configuration and head.
        forward: how to compute the forward pass; dropout keys and sums are filled in here.
        state: gives the number of the step, which dropout depends on, and the loss scale.
        seed: seed of the dropout masks.
    """

    variables: Variables
    trained: Mapping[str, tf.Variable]
    spec: ModelSpec
    forward: ForwardPass
    state: OptimizerState
    seed: int

    def of_part(
        self, part: BatchPart, accumulation_steps: int
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Compute loss and gradients.

        Args:
            part: some rows.
            accumulation_steps: number of micro-batches that the rows are cut into.

        Returns:
            The part's share of the effective batch's mean loss, float32 scalar, and the gradients
            of all trained variables, dense and in their order.
        """
        if accumulation_steps > 1:
            return self._accumulated(part, accumulation_steps)
        loss, gradients = self._of_micro_batch(part)
        return loss, [
            tf.zeros_like(v) if g is None else tf.convert_to_tensor(g)
            for v, g in zip(self.trained.values(), gradients, strict=True)
        ]

    @tf.autograph.experimental.do_not_convert
    def _of_micro_batch(
        self, part: BatchPart, gradient_sums: Mapping[str, tf.Tensor] | None = None
    ) -> tuple[tf.Tensor, list[tf.Tensor | tf.IndexedSlices | None]]:
        trained, loss_scale = list(self.trained.values()), self.state.loss_scale
        key = DropoutKey(self.seed, self.state.step.read_value(), part.first_row)
        forward = dataclasses.replace(self.forward, dropout_key=key, gradient_sums=gradient_sums)
        with barriers(self.forward.xla):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(trained)
                losses = example_losses(
                    self.variables, self.spec.config, self.spec.head, part.rows, forward
                )
                loss = tf.reduce_sum(losses * part.rows["weights"]) / part.total_weight
                scaled = loss if loss_scale is None else loss * loss_scale.scale
            return loss, tape.gradient(scaled, trained)

    def _accumulated(self, part: BatchPart, count: int) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Add up the gradients of `count` micro-batches, one after the other."""
        added = self._added_in_the_backward_pass()
        names, xla = list(self.trained), self.forward.xla

        def one(
            index: tf.Tensor, loss: tf.Tensor, sums: list[tf.Tensor]
        ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
            micro_loss, gradients = self._of_micro_batch(
                part.micro_batch(index, count), dict(zip(names, sums, strict=True))
            )
            sums = [
                g if name in added else _plus(total, g, xla)
                for name, total, g in zip(names, sums, gradients, strict=True)
            ]
            loss += micro_loss
            if not xla:
                run_in_order([loss, *sums])
            return index + 1, loss, sums

        _, loss, sums = tf.while_loop(
            lambda index, *_: index < count,
            one,
            # The sums are tensors that the loop passes on, not variables. TensorFlow adds to both
            # in place, but only tensors can be clipped in place and freed one by one in the update.
            (tf.zeros([], tf.int32), tf.zeros([]), [fresh_zeros(v) for v in self.trained.values()]),
            # Iterations that overlap would hold two sets of activations.
            parallel_iterations=1,
        )
        return loss, sums

    def _added_in_the_backward_pass(self) -> set[str]:
        """Variables whose gradients come out of the backward pass added to the sums so far."""
        return {
            name
            for index in range(self.spec.config.num_hidden_layers)
            if self.forward.checkpointing.of_layer(index) != "none"
            for name in layer_weight_names(index)
        }


def _plus(total: tf.Tensor, gradient: tf.Tensor | tf.IndexedSlices | None, xla: bool) -> tf.Tensor:
    """Add a gradient to a sum that nothing else reads, in place.

    The gradient of an embedding table is a row for each token; it is added row by row, without
    making a table of it first.
    """
    if gradient is None:
        return total
    if not isinstance(gradient, tf.IndexedSlices):
        return total + gradient
    if xla:
        return tf.tensor_scatter_nd_add(total, gradient.indices[:, None], gradient.values)
    # A scatter copies the table. InplaceAdd does not, but on a GPU it adds all rows at once: each
    # of them may be named only once.
    names, positions = tf.unique(gradient.indices)
    rows = tf.math.unsorted_segment_sum(gradient.values, positions, tf.size(names))
    return tf.raw_ops.InplaceAdd(x=total, i=names, v=rows)
