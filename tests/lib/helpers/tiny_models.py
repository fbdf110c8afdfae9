"""Models and batches small enough that a test may train them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from finetune.model.dropout import DropoutKey
from finetune.model.modeling import ForwardPass, create_variables
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import BertConfig, is_trained
from finetune.spec.step_settings import ModelSpec, StepSettings
from finetune.train.gradients import example_losses
from finetune.train.inference import make_predictor
from finetune.train.optimization import OptimizerSettings
from finetune.train.step import Trainer, make_trainer

CONFIG = BertConfig(
    vocab_size=31,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
    # As large as those of a trained model; 0.02 would leave attention uniform at this width.
    initializer_range=0.3,
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.3,
)
SETTINGS = OptimizerSettings(1e-3, 10, 2)
NUM_LABELS = 3
WEIGHTS_SEED = 5

Arrays = dict[str, np.ndarray]


def random_batch(rows: int, seq_len: int, *, seed: int = 0) -> Arrays:
    """Draw examples for either head; all but the first are padded to differing lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, seq_len + 1, rows)
    lengths[0] = seq_len
    mask = (np.arange(seq_len) < lengths[:, None]).astype(np.int32)
    return {
        "input_ids": rng.integers(1, CONFIG.vocab_size, (rows, seq_len)).astype(np.int32) * mask,
        "input_mask": mask,
        "segment_ids": rng.integers(0, 2, (rows, seq_len)).astype(np.int32) * mask,
        "start_positions": (rng.random(rows) * lengths).astype(np.int32),
        "end_positions": (rng.random(rows) * lengths).astype(np.int32),
        "label_ids": rng.integers(0, NUM_LABELS, rows).astype(np.int32),
        "label_values": np.random.default_rng([seed, 1]).normal(size=rows).astype(np.float32),
        "weights": np.ones(rows, np.float32),
    }


def rows_of(batch: Mapping[str, np.ndarray], rows: slice) -> Arrays:
    return {name: value[rows] for name, value in batch.items()}


def tiny_trainer(
    head: str,
    seq_len: int,
    *,
    policy: str = "none",
    config: BertConfig = CONFIG,
    settings: OptimizerSettings = SETTINGS,
    **step_settings: Any,
) -> Trainer:
    """Make a trainer whose weights depend on nothing but the head and the configuration.

    `step_settings` are those of `StepSettings`.
    """
    return make_trainer(
        create_variables(config, head, num_labels=NUM_LABELS, seed=WEIGHTS_SEED),
        ModelSpec(config, head, seq_len),
        settings,
        StepSettings(checkpointing=parse_checkpointing(policy), **step_settings),
    )


def values_of(trainer: Trainer) -> Arrays:
    return {name: variable.numpy() for name, variable in trainer.variables.items()}


def losses_of(head: str, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Losses and logits of a new model without dropout."""
    variables = create_variables(CONFIG, head, num_labels=NUM_LABELS, seed=WEIGHTS_SEED)
    losses = example_losses(variables, CONFIG, head, batch)
    predict = make_predictor(variables, ModelSpec(CONFIG, head, batch["input_ids"].shape[1]))
    tensors = {name: tf.constant(value) for name, value in batch.items()}
    return losses.numpy(), predict(tensors).numpy()


def gradients_of_losses(
    variables: Mapping[str, tf.Variable],
    head: str,
    batch: Mapping[str, np.ndarray],
    policy: str,
    *,
    first_row: int = 0,
    compute_type: tf.DType = tf.float32,
) -> dict[str, tf.Tensor]:
    """Gradients of the sum of a batch's losses, with dropout, by the names of the variables."""
    trained = {name: v for name, v in variables.items() if is_trained(name, head)}
    key = DropoutKey(3, tf.constant(2, tf.int64), tf.constant(first_row, tf.int64))
    with tf.GradientTape() as tape:
        losses = example_losses(
            variables,
            CONFIG,
            head,
            {name: tf.constant(value) for name, value in batch.items()},
            ForwardPass(key, parse_checkpointing(policy), compute_type),
        )
    assert losses.dtype == tf.float32
    gradients = tape.gradient(losses, list(trained.values()))
    return {
        name: tf.convert_to_tensor(gradient)
        for name, gradient in zip(trained, gradients, strict=True)
    }


def norm_of(arrays: Arrays) -> float:
    """Norm of all arrays as one vector."""
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays.values())))


def reset(trainer: Trainer, values: Arrays) -> None:
    """Start again at step 0 from some weights, sparing a test the time to compile another step."""
    for name, variable in trainer.variables.items():
        variable.assign(values[name])
    for moment in trainer.state.variables:
        moment.assign(np.zeros(moment.shape, np.float32))
    trainer.state.step.assign(0)


def operations_before(tensors: Iterable[tf.Tensor]) -> set[tf.Operation]:
    """Operations that tensors of a graph depend on; no others are run for them."""
    found: set[tf.Operation] = set()
    waiting = [tensor.op for tensor in tensors]
    while waiting:
        operation = waiting.pop()
        if operation not in found:
            found.add(operation)
            waiting += [tensor.op for tensor in operation.inputs] + operation.control_inputs
    return found


def operations_needed(graph: tf.Graph) -> Counter[str]:
    """Count by type the operations that a function's results depend on."""
    return Counter(operation.type for operation in operations_before(graph.outputs))


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run steps without compiling them, which for these models takes a tenth of the time."""
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)
