"""Prediction: the compiled forward pass, and the loop over all examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from finetune.model.modeling import Variables, classifier_logits, encode, squad_logits
from finetune.spec.config import INPUT_NAMES
from finetune.spec.step_settings import ModelSpec
from finetune.train.batches import Batch, input_signature, pad_batch, share_of

_Forward = Callable[[Batch], tf.Tensor]


def make_predictor(
    variables: Variables, spec: ModelSpec, strategy: tf.distribute.Strategy | None = None
) -> Callable[[Batch], tf.Tensor]:
    """Make a compiled forward pass without dropout.

    Example:
        >>> predict = make_predictor(variables, ModelSpec(config, "squad", 384))
        >>> start_logits, end_logits = predict(batch)

    Args:
        variables: the model.
        spec: its configuration and head, and the length of the examples.
        strategy: share the rows out to its replicas, see `finetune.train.step.make_trainer`.

    Returns:
        A function of `INPUT_NAMES` arrays, which returns logits: `[2, b, s]` for SQuAD,
        `[b, labels]` for the classifier, `[b, 1]` for the regressor.
    """

    def forward(batch: Batch) -> tf.Tensor:
        sequence = encode(variables, spec.config, batch)
        if spec.head == "squad":
            return squad_logits(variables, sequence)
        return classifier_logits(variables, spec.config, sequence)

    if strategy is not None:
        return _on_replicas(forward, spec, strategy)
    signature = input_signature(spec)
    compiled = tf.function(forward, input_signature=[signature], autograph=False)

    def predict(batch: Batch) -> tf.Tensor:
        return compiled({name: batch[name] for name in signature})

    return predict


def _on_replicas(
    forward: _Forward, spec: ModelSpec, strategy: tf.distribute.Strategy
) -> Callable[[Batch], tf.Tensor]:
    replicas = strategy.num_replicas_in_sync

    def on_replica(batch: Batch) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        return forward(share_of(batch, context.replica_id_in_sync_group, replicas))

    @tf.function(autograph=False)
    def on_replicas(batch: Batch) -> tf.Tensor:
        shares = strategy.experimental_local_results(strategy.run(on_replica, args=(batch,)))
        return tf.concat(shares, axis=1 if spec.head == "squad" else 0)

    def predict(batch: Batch) -> tf.Tensor:
        examples = len(batch[INPUT_NAMES[0]])
        rows = -(-examples // replicas) * replicas
        padded = pad_batch({name: np.asarray(batch[name]) for name in INPUT_NAMES}, rows)
        logits = on_replicas({name: tf.constant(padded[name]) for name in INPUT_NAMES})
        return logits[:, :examples] if spec.head == "squad" else logits[:examples]

    return predict


def predict(
    predictor: Callable[[Batch], tf.Tensor],
    data: Mapping[str, np.ndarray],
    batch_size: int,
    *,
    on_batch: Callable[[int], None] = lambda examples: None,
) -> Iterator[np.ndarray]:
    """Run a model over all examples in their order.

    Args:
        predictor: from `make_predictor`.
        data: arrays with one row for each example.
        batch_size: examples at a time.
        on_batch: called with the number of examples of every finished batch.

    Yields:
        Logits, batch after batch.
    """
    num_examples = len(next(iter(data.values())))
    for start in range(0, num_examples, batch_size):
        batch = {name: value[start : start + batch_size] for name, value in data.items()}
        yield predictor(batch).numpy()
        on_batch(len(next(iter(batch.values()))))
