"""One optimizer step, compiled: micro-batches, accumulation, clipping, update."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from finetune.model.modeling import ForwardPass, Variables
from finetune.model.ordering import run_in_order
from finetune.spec.config import has_no_gradient, is_trained
from finetune.spec.optimizers import EXACT_OPTIMIZER, PLACEMENTS
from finetune.spec.precisions import allow_tensor_float_32, compute_type, scales_loss
from finetune.spec.step_settings import PLAIN_STEP, ModelSpec, StepSettings
from finetune.train.batches import Batch, as_tensors, share_of, training_signature
from finetune.train.gradients import BatchPart, LossGradients
from finetune.train.optimization import (
    OptimizerSettings,
    OptimizerState,
    apply_gradients,
    create_state,
)

Numbers = tuple[tf.Tensor, tf.Tensor, tf.Tensor]
"""Loss, learning rate and norm of the gradients; float32 scalars."""

Combine = Callable[[Sequence[tf.Tensor]], Sequence[tf.Tensor]]
"""Adds up over all replicas what each of them has computed."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; float32 scalars.

    Attributes:
        loss: weighted mean of the examples' losses, before the update.
        learning_rate: learning rate of the update.
        gradient_norm: global norm of the gradients before clipping.
    """

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


def make_trainer(
    variables: Variables,
    spec: ModelSpec,
    optimizer: OptimizerSettings,
    settings: StepSettings = PLAIN_STEP,
    strategy: tf.distribute.Strategy | None = None,
) -> Trainer:
    """Create optimizer state and the compiled step for a model.

    The step takes an effective batch of `accumulation_steps * m` rows, for any micro-batch size m
    without building the graph again: the names in `INPUT_NAMES` (int32 `[rows, seq_len]`), the
    head's `TARGET_NAMES` (`[rows]`) and `weights` (float32 `[rows]`, 1 for an example, 0 for a row
    that only pads the last micro-batch; at least one must be above 0). The loss is the weighted
    sum of the examples' losses over the sum of the weights of the whole effective batch, so the
    cut into micro-batches does not change the update. Dropout masks belong to rows of the
    effective batch.

    From now on this process multiplies matrices in TensorFloat-32 only if the precision is `tf32`.

    Example:
        >>> spec = ModelSpec(preset("bert-tiny"), "squad", 128)
        >>> variables = create_variables(spec.config, spec.head)
        >>> optimizer = OptimizerSettings(learning_rate=5e-5, num_train_steps=1000)
        >>> trainer = make_trainer(variables, spec, optimizer, StepSettings(accumulation_steps=4))
        >>> trainer.step(pad_batch(examples, 32)).loss

    Args:
        variables: the model; changed by every step.
        spec: its configuration and head, and the length of the examples.
        optimizer: optimizer and schedule.
        settings: how a step is done.
        strategy: run on its replicas, each on its share of the effective batch's rows, with one
            all-reduce of the gradients for each step; the variables must have been created in its
            scope. None runs on one device.

    Returns:
        The trainer, at step 0. With `fp16` its step repeats itself with a smaller loss scale until
        the gradients are finite, see `finetune.train.loss_scaling`; if they cannot be, as if the
        loss is not finite, it updates nothing and reports what it found. It raises ValueError for
        a number of rows that is not a multiple of `accumulation_steps` times the number of
        replicas; see `finetune.train.batches.pad_batch`.

    Raises:
        ValueError: `accumulation_steps` is below 1, precision or placement is unknown, or XLA or
            replicas are asked for together with the optimizer's state on the host.
    """
    _check(settings, strategy)
    # A TPU compiles with XLA whoever asks for it.
    for_xla = settings.xla or isinstance(strategy, tf.distribute.TPUStrategy)
    allow_tensor_float_32(settings.precision)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        state = create_state(
            list(trained_variables(variables, spec).values()),
            optimizer.optimizer,
            scales_loss=scales_loss(settings.precision),
            placement=settings.placement,
        )
    update = make_update(
        variables, state, spec, optimizer, dataclasses.replace(settings, xla=for_xla)
    )
    signature = training_signature(spec)
    if strategy is None:
        compiled, replicas = _on_one_device(update, signature, settings.xla), 1
    else:
        compiled, replicas = _on_replicas(update, strategy), strategy.num_replicas_in_sync
    step = _Step(compiled, state, signature, settings.accumulation_steps, replicas)
    return Trainer(variables, state, step)


def trained_variables(variables: Variables, spec: ModelSpec) -> dict[str, tf.Variable]:
    """Those of a model's variables that training changes, by name."""
    return {name: v for name, v in variables.items() if is_trained(name, spec.head)}


def make_update(
    variables: Variables,
    state: OptimizerState,
    spec: ModelSpec,
    optimizer: OptimizerSettings,
    settings: StepSettings,
) -> Update:
    """Make what one replica does in a step; for arguments see `make_trainer`.

    With `settings.xla` it builds a graph that XLA can compile.
    """
    forward = ForwardPass(
        checkpointing=settings.checkpointing,
        compute_type=tf.as_dtype(compute_type(settings.precision)),
        xla=settings.xla,
    )
    trained = trained_variables(variables, spec)
    gradients = LossGradients(variables, trained, spec, forward, state, settings.seed)
    return Update(gradients, optimizer, settings.accumulation_steps)


def _check(settings: StepSettings, strategy: tf.distribute.Strategy | None) -> None:
    if settings.accumulation_steps < 1:
        raise ValueError(f"accumulation_steps is {settings.accumulation_steps}, below 1")
    placement = settings.placement
    if placement != PLACEMENTS[0] and (settings.xla or strategy is not None):
        raise ValueError(f"placement {placement!r} goes neither with XLA nor with replicas")


@dataclasses.dataclass(frozen=True)
class Update:
    """One replica's part of a step, on its rows of the effective batch.

    Attributes:
        gradients: how loss and gradients are computed.
        optimizer: optimizer and schedule.
        accumulation_steps: number of micro-batches.
    """

    gradients: LossGradients
    optimizer: OptimizerSettings
    accumulation_steps: int

    def __call__(self, part: BatchPart, combine: Combine) -> Numbers:
        """Do it; `combine` adds up what replicas have computed."""
        trained, spec = self.gradients.trained, self.gradients.spec
        loss, gradients = self.gradients.of_part(part, self.accumulation_steps)
        loss, *gradients = combine([loss, *gradients])
        # Where the gradient is 0 by algebra, it is rounding noise. The other optimizers divide a
        # gradient by its own size, noise too; AdamW has its epsilon.
        noisy = self.optimizer.optimizer != EXACT_OPTIMIZER
        gradients = [
            tf.zeros(v.shape, v.dtype)
            if noisy and has_no_gradient(name, spec.head, spec.config)
            else g
            for (name, v), g in zip(trained.items(), gradients, strict=True)
        ]
        rate, norm = apply_gradients(
            self.optimizer, self.gradients.state, list(trained.values()), gradients
        )
        return loss, rate, norm

    def of_whole_batch(self, batch: Batch) -> Numbers:
        """Do the step of the only replica."""
        part = BatchPart(batch, tf.zeros([], tf.int64), tf.reduce_sum(batch["weights"]))
        return self(part, lambda tensors: tensors)

    def of_share(
        self, batch: Batch, replica: tf.Tensor, replicas: int, combine: Combine
    ) -> Numbers:
        """Do one replica's part of a step.

        Args:
            batch: the effective batch of all replicas.
            replica: number of this one, int32 scalar.
            replicas: number of replicas.
            combine: adds up what the replicas have computed.
        """
        rows = share_of(batch, replica, replicas)
        first_row = tf.cast(replica * rows["weights"].shape[0], tf.int64)
        return self(BatchPart(rows, first_row, tf.reduce_sum(batch["weights"])), combine)


def _on_one_device(
    update: Update, signature: Mapping[str, tf.TensorSpec], xla: bool
) -> Callable[[Batch], Numbers]:
    @tf.function(input_signature=[signature], jit_compile=xla, autograph=False)
    def on_one_device(batch: Batch) -> Numbers:
        results = update.of_whole_batch(batch)
        if not xla:
            run_in_order(results)
        return results

    return on_one_device


def _on_replicas(update: Update, strategy: tf.distribute.Strategy) -> Callable[[Batch], Numbers]:
    replicas = strategy.num_replicas_in_sync

    def on_replica(batch: Batch) -> Numbers:
        context = tf.distribute.get_replica_context()
        return update.of_share(
            batch,
            context.replica_id_in_sync_group,
            replicas,
            lambda tensors: context.all_reduce(tf.distribute.ReduceOp.SUM, tensors),
        )

    @tf.function(autograph=False)
    def on_replicas(batch: Batch) -> Numbers:
        results = strategy.run(on_replica, args=(batch,))
        # All replicas report the same numbers.
        of_replicas = [strategy.experimental_local_results(value) for value in results]
        if not update.gradients.forward.xla:
            run_in_order([one for many in of_replicas for one in many], each_device=True)
        return tuple(many[0] for many in of_replicas)

    return on_replicas


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step on the host: it checks the batch, and repeats a step whose loss scale is too large.

    Attributes:
        compiled: the step's graph.
        state: gives the loss scale.
        signature: what the graph takes.
        accumulation_steps: micro-batches on each replica.
        replicas: number of replicas.
    """

    compiled: Callable[[Batch], Numbers]
    state: OptimizerState
    signature: Mapping[str, tf.TensorSpec]
    accumulation_steps: int
    replicas: int

    def __call__(self, batch: Batch) -> StepResult:
        """See `make_trainer`."""
        self._check_rows(len(batch["weights"]))
        tensors = as_tensors(batch, self.signature)
        while True:
            loss_scale = self.state.loss_scale
            scale = None if loss_scale is None else float(loss_scale.scale.numpy())
            result = StepResult(*self.compiled(tensors))
            # A smaller scale cannot help where the loss itself is not finite, or at scale 1.
            if scale is None or scale <= 1.0 or not np.isfinite(result.loss):
                return result
            if np.isfinite(result.gradient_norm):
                return result

    def _check_rows(self, rows: int) -> None:
        if rows % (self.accumulation_steps * self.replicas):
            cut = f"{self.accumulation_steps} micro-batches"
            if self.replicas > 1:
                cut += f" on each of {self.replicas} replicas"
            raise ValueError(f"a batch of {rows} rows cannot be cut into {cut}")
