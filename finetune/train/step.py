"""One optimizer step, compiled: micro-batches, accumulation, clipping, update."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from finetune.model.chunks import take_rows
from finetune.model.dropout import DropoutKey
from finetune.model.layers import fresh_zeros
from finetune.model.modeling import (
    Variables,
    classifier_logits,
    encode,
    layer_weight_names,
    squad_logits,
)
from finetune.model.ordering import run_in_order
from finetune.spec.checkpointing import NO_CHECKPOINTING, Checkpointing
from finetune.spec.config import INPUT_NAMES, TARGET_NAMES, BertConfig, has_no_gradient, is_trained
from finetune.spec.optimizers import EXACT_OPTIMIZER, PLACEMENTS
from finetune.spec.precisions import (
    EXACT_PRECISION,
    allow_tensor_float_32,
    compute_type,
    scales_loss,
)
from finetune.train.optimization import (
    OptimizerSettings,
    OptimizerState,
    apply_gradients,
    create_state,
)

Batch = Mapping[str, "np.ndarray | tf.Tensor"]
_Combine = Callable[[Sequence[tf.Tensor]], Sequence[tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; float32 scalars."""

    loss: tf.Tensor
    learning_rate: tf.Tensor
    gradient_norm: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A model ready to be trained.

    Attributes:
        variables: the model.
        state: optimizer state.
        step: does one optimizer step on an effective batch, see `make_trainer`.
    """

    variables: Variables
    state: OptimizerState
    step: Callable[[Batch], StepResult]


def example_losses(
    variables: Variables,
    config: BertConfig,
    head: str,
    batch: Batch,
    *,
    dropout_key: DropoutKey | None = None,
    checkpointing: Checkpointing = NO_CHECKPOINTING,
    totals: Mapping[str, tf.Tensor] | None = None,
    compute_type: tf.DType = tf.float32,
    xla: bool = False,
) -> tf.Tensor:
    """Loss of each example, float32 `[b]`.

    Cross-entropy of the class, or the mean of the cross-entropies of start and end position,
    as in the original's `run_classifier.py` and `run_squad.py`; for a regression the squared
    error. A position outside the sequence adds nothing, as the original's one-hot rows of zeros.

    Args:
        variables: the model.
        config: its configuration.
        head: its head.
        batch: int32 `[b, s]` under `INPUT_NAMES`, `[b]` under the head's `TARGET_NAMES`.
        dropout_key: None for no dropout.
        checkpointing: policy per layer.
        totals: see `finetune.model.modeling.encode`.
        compute_type: likewise.
        xla: likewise.
    """
    sequence = encode(
        variables,
        config,
        *(batch[name] for name in INPUT_NAMES),
        dropout_key=dropout_key,
        checkpointing=checkpointing,
        totals=totals,
        compute_type=compute_type,
        xla=xla,
    )

    def cross_entropy(logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        inside = tf.logical_and(target >= 0, target < tf.shape(logits)[1])
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=tf.where(inside, target, 0), logits=logits
        )
        return losses * tf.cast(inside, tf.float32)

    if head == "squad":
        start_logits, end_logits = tf.unstack(squad_logits(variables, sequence))
        return 0.5 * (
            cross_entropy(start_logits, batch["start_positions"])
            + cross_entropy(end_logits, batch["end_positions"])
        )
    logits = classifier_logits(variables, config, sequence, dropout_key)
    if head == "regressor":
        return tf.math.squared_difference(logits[:, 0], batch["label_values"])
    return cross_entropy(logits, batch["label_ids"])


def make_trainer(
    variables: Variables,
    config: BertConfig,
    head: str,
    seq_len: int,
    settings: OptimizerSettings,
    *,
    accumulation_steps: int = 1,
    checkpointing: Checkpointing = NO_CHECKPOINTING,
    precision: str = EXACT_PRECISION,
    xla: bool = False,
    placement: str = PLACEMENTS[0],
    seed: int = 0,
    strategy: tf.distribute.Strategy | None = None,
) -> Trainer:
    """Create optimizer state and the compiled step for a model.

    The step takes an effective batch of `accumulation_steps * m` rows, for any micro-batch size m
    without retracing: the names in `INPUT_NAMES` (int32 `[rows, seq_len]`), the head's
    `TARGET_NAMES` (`[rows]`) and `weights` (float32 `[rows]`, 1 for an example, 0 for a row
    that only pads the last micro-batch; at least one must be above 0). The loss is the weighted
    sum of the examples' losses over the sum of the weights of the whole effective batch, so the
    cut into micro-batches does not change the update. Dropout masks belong to rows of the
    effective batch.

    Args:
        variables: the model; changed by every step.
        config: its configuration.
        head: its head.
        seq_len: tokens per example.
        settings: optimizer and schedule.
        accumulation_steps: micro-batches per step. Above 1 the sums of their gradients, 4 bytes a
            parameter, live from the first micro-batch on; otherwise gradients come to life
            while activations are given back.
        checkpointing: policy per layer.
        precision: one of `finetune.spec.precisions.PRECISIONS`. From now on this process's matrix
            products are TensorFloat-32 only if that is asked for.
        xla: compile with XLA; it compiles once for every micro-batch size.
        placement: one of `finetune.spec.optimizers.PLACEMENTS`, of the optimizer's state.
        seed: of the dropout masks, at least 0.
        strategy: run on its replicas, each on its share of the effective batch's rows, with one
            all-reduce of the gradients per step; the variables must have been created in its
            scope. None runs on one device.

    Returns:
        The trainer, at step 0. With `fp16` its step repeats itself with a smaller loss scale until
        the gradients are finite, see `finetune.train.loss_scaling`; if they cannot be, as if the
        loss is not finite, it updates nothing and reports what it found. It raises ValueError for
        a number of rows that is not a multiple of `accumulation_steps` times the number of
        replicas; see `pad_batch`.

    Raises:
        ValueError: `accumulation_steps` is below 1, precision or placement is unknown, or XLA or
            replicas are to go with state on the host.
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps is {accumulation_steps}, below 1")
    if placement != PLACEMENTS[0] and (xla or strategy is not None):
        raise ValueError(f"placement {placement!r} goes neither with XLA nor with replicas")
    activation_type = tf.as_dtype(compute_type(precision))
    allow_tensor_float_32(precision)
    # A TPU compiles with XLA whoever asks for it.
    for_xla = xla or isinstance(strategy, tf.distribute.TPUStrategy)
    names = [name for name in variables if is_trained(name, head)]
    trained = [variables[name] for name in names]
    # Variables whose gradients come out of the backward pass added to the sums so far.
    summed = {
        name
        for index in range(config.num_hidden_layers)
        if checkpointing.of_layer(index) != "none"
        for name in layer_weight_names(index)
    }
    # The other optimizers divide a gradient by its own size, noise too; AdamW has its epsilon.
    noise = {
        name
        for name in names
        if settings.optimizer != EXACT_OPTIMIZER and has_no_gradient(name, head, config)
    }
    replicas = 1 if strategy is None else strategy.num_replicas_in_sync
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        state = create_state(
            trained,
            settings.optimizer,
            scales_loss=scales_loss(precision),
            placement=placement,
        )

    @tf.autograph.experimental.do_not_convert
    def micro_gradients(
        batch: Batch,
        first_row: tf.Tensor,
        total_weight: tf.Tensor,
        totals: Mapping[str, tf.Tensor] | None = None,
    ) -> tuple[tf.Tensor, list[tf.Tensor | tf.IndexedSlices | None]]:
        key = DropoutKey(seed, state.step.read_value(), first_row)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trained)
            losses = example_losses(
                variables,
                config,
                head,
                batch,
                dropout_key=key,
                checkpointing=checkpointing,
                totals=totals,
                compute_type=activation_type,
                xla=for_xla,
            )
            loss = tf.reduce_sum(losses * batch["weights"]) / total_weight
            scaled = loss if state.loss_scale is None else loss * state.loss_scale.scale
        return loss, tape.gradient(scaled, trained)

    def whole_gradients(
        batch: Batch, first_row: tf.Tensor, total_weight: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        loss, gradients = micro_gradients(batch, first_row, total_weight)
        return loss, [
            tf.zeros_like(v) if g is None else tf.convert_to_tensor(g)
            for v, g in zip(trained, gradients, strict=True)
        ]

    def accumulated_gradients(
        batch: Batch, first_row: tf.Tensor, total_weight: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        def one(
            index: tf.Tensor, loss: tf.Tensor, sums: list[tf.Tensor]
        ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
            micro_batch = tf.shape(batch["weights"])[0] // accumulation_steps
            start = index * micro_batch
            rows = {name: take_rows(value, start, micro_batch) for name, value in batch.items()}
            micro_loss, gradients = micro_gradients(
                rows,
                first_row + tf.cast(start, tf.int64),
                total_weight,
                dict(zip(names, sums, strict=True)),
            )
            sums = [
                g if name in summed else _plus(total, g, for_xla)
                for name, total, g in zip(names, sums, gradients, strict=True)
            ]
            loss += micro_loss
            if not for_xla:
                run_in_order([loss, *sums])
            return index + 1, loss, sums

        _, loss, sums = tf.while_loop(
            lambda index, *_: index < accumulation_steps,
            one,
            # Sums that the loop hands on, not variables: they are added to in place too, but the
            # update can clip them in place and give each back as soon as it is applied.
            (tf.zeros([], tf.int32), tf.zeros([]), [fresh_zeros(v) for v in trained]),
            # Overlapping iterations would hold two sets of activations.
            parallel_iterations=1,
        )
        return loss, sums

    gradients_of = whole_gradients if accumulation_steps == 1 else accumulated_gradients

    signature = {
        **{name: tf.TensorSpec([None, seq_len], tf.int32) for name in INPUT_NAMES},
        **{
            name: tf.TensorSpec([None], tf.float32 if name == "label_values" else tf.int32)
            for name in TARGET_NAMES[head]
        },
        "weights": tf.TensorSpec([None], tf.float32),
    }

    def update(
        batch: Batch, first_row: tf.Tensor, total_weight: tf.Tensor, combine: _Combine
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """One replica's part of the step, on its rows of the effective batch."""
        loss, gradients = gradients_of(batch, first_row, total_weight)
        loss, *gradients = combine([loss, *gradients])
        gradients = [
            tf.zeros(v.shape, v.dtype) if name in noise else g
            for name, v, g in zip(names, trained, gradients, strict=True)
        ]
        rate, norm = apply_gradients(settings, state, trained, gradients)
        return loss, rate, norm

    @tf.function(input_signature=[signature], jit_compile=xla, autograph=False)
    def on_one_device(batch: Batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        total_weight = tf.reduce_sum(batch["weights"])
        results = update(batch, tf.zeros([], tf.int64), total_weight, lambda tensors: tensors)
        if not xla:
            run_in_order(results)
        return results

    def on_replica(batch: Batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group
        rows = _share(batch, replica, replicas)
        total_weight = tf.reduce_sum(batch["weights"])
        first_row = tf.cast(replica * rows["weights"].shape[0], tf.int64)
        return update(
            rows,
            first_row,
            total_weight,
            lambda tensors: context.all_reduce(tf.distribute.ReduceOp.SUM, tensors),
        )

    @tf.function(autograph=False)
    def on_replicas(batch: Batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        assert strategy is not None
        results = strategy.run(on_replica, args=(batch,))
        # All replicas report the same numbers.
        of_replicas = [strategy.experimental_local_results(value) for value in results]
        if not for_xla:
            run_in_order([one for many in of_replicas for one in many], each_device=True)
        return tuple(many[0] for many in of_replicas)

    def step(batch: Batch) -> StepResult:
        rows = len(batch["weights"])
        if rows % (accumulation_steps * replicas):
            cut = f"{accumulation_steps} micro-batches"
            if replicas > 1:
                cut += f" on each of {replicas} replicas"
            raise ValueError(f"a batch of {rows} rows cannot be cut into {cut}")
        tensors = {name: _as_tensor(batch[name], spec.dtype) for name, spec in signature.items()}
        compiled = on_one_device if strategy is None else on_replicas
        while True:
            scale = None if state.loss_scale is None else float(state.loss_scale.scale.numpy())
            result = StepResult(*compiled(tensors))
            # What is not finite at the smallest scale, or in the loss itself, is not for a smaller
            # scale to mend.
            if scale is None or scale <= 1.0 or not np.isfinite(result.loss):
                return result
            if np.isfinite(result.gradient_norm):
                return result

    return Trainer(variables, state, step)


def pad_batch(batch: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Append rows of weight 0 until an effective batch has `rows` rows.

    The rows repeat the last example, so that no computation meets an empty sequence.

    Args:
        batch: arrays with one row an example; without `weights`, every row weighs 1.
        rows: at least the number of examples.

    Returns:
        Arrays of `rows` rows, `weights` among them.

    Raises:
        ValueError: there are more examples than rows, or none.
    """
    examples = len(next(iter(batch.values())))
    if not 1 <= examples <= rows:
        raise ValueError(f"cannot pad {examples} examples to {rows} rows")
    padded = {"weights": np.ones(examples, np.float32), **batch}
    index = np.minimum(np.arange(rows), examples - 1)
    padded = {name: value[index] for name, value in padded.items()}
    padded["weights"][examples:] = 0
    return padded


def make_predictor(
    variables: Variables,
    config: BertConfig,
    head: str,
    seq_len: int,
    *,
    strategy: tf.distribute.Strategy | None = None,
) -> Callable[[Batch], tf.Tensor]:
    """Make a compiled forward pass without dropout.

    Args:
        variables: the model.
        config: its configuration.
        head: its head.
        seq_len: tokens per example.
        strategy: share the rows out to its replicas, see `make_trainer`.

    Returns:
        A function of `INPUT_NAMES` arrays: logits `[2, b, s]` for SQuAD, `[b, labels]` for
        the classifier, `[b, 1]` for the regressor.
    """
    signature = {name: tf.TensorSpec([None, seq_len], tf.int32) for name in INPUT_NAMES}

    def forward(batch: Batch) -> tf.Tensor:
        sequence = encode(variables, config, *(batch[name] for name in INPUT_NAMES))
        if head == "squad":
            return squad_logits(variables, sequence)
        return classifier_logits(variables, config, sequence)

    compiled = tf.function(forward, input_signature=[signature], autograph=False)

    def predict(batch: Batch) -> tf.Tensor:
        return compiled({name: batch[name] for name in signature})

    if strategy is None:
        return predict
    replicas = strategy.num_replicas_in_sync

    def on_replica(batch: Batch) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        return forward(_share(batch, context.replica_id_in_sync_group, replicas))

    @tf.function(autograph=False)
    def on_replicas(batch: Batch) -> tf.Tensor:
        shares = strategy.experimental_local_results(strategy.run(on_replica, args=(batch,)))
        return tf.concat(shares, axis=1 if head == "squad" else 0)

    def predict_on_replicas(batch: Batch) -> tf.Tensor:
        examples = len(batch[INPUT_NAMES[0]])
        rows = -(-examples // replicas) * replicas
        padded = pad_batch({name: np.asarray(batch[name]) for name in signature}, rows)
        logits = on_replicas({name: tf.constant(padded[name]) for name in signature})
        return logits[:, :examples] if head == "squad" else logits[:examples]

    return predict_on_replicas


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


def _as_tensor(array: np.ndarray | tf.Tensor, type_: tf.DType) -> tf.Tensor:
    """Copy an array into a tensor in TensorFlow's own memory.

    `tf.constant` does so only if the array, or a copy of it, happens not to begin at a multiple of
    64 bytes, so that what a step needs would depend on chance.
    """
    values = np.asarray(array, type_.as_numpy_dtype)
    return tf.reshape(tf.io.decode_raw(values.tobytes(), type_), values.shape)


def _share(batch: Batch, replica: tf.Tensor, replicas: int) -> dict[str, tf.Tensor]:
    """One replica's rows of a batch; their number is static, as TPUs want it."""
    share = next(iter(batch.values())).shape[0] // replicas
    return {
        name: tf.ensure_shape(
            value[replica * share : (replica + 1) * share], [share, *value.shape[1:]]
        )
        for name, value in batch.items()
    }
