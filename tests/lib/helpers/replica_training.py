"""Trains on two replicas, in a process of its own, because TensorFlow must first be told of them.

Prints the relative difference of the weights and the losses to those of one device.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tensorflow as tf

# Two devices out of the one CPU.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

from finetune.model.modeling import create_variables  # noqa: E402
from finetune.spec.checkpointing import parse_checkpointing  # noqa: E402
from finetune.spec.step_settings import ModelSpec, StepSettings  # noqa: E402
from finetune.train.batches import pad_batch  # noqa: E402
from finetune.train.inference import make_predictor  # noqa: E402
from finetune.train.step import Trainer, make_trainer  # noqa: E402
from helpers.tiny_models import (  # noqa: E402
    CONFIG,
    NUM_LABELS,
    SETTINGS,
    WEIGHTS_SEED,
    norm_of,
    random_batch,
    values_of,
)

SEQ_LEN = 6


def make(strategy: tf.distribute.Strategy | None, steps: int, policy: str, head: str) -> Trainer:
    def build() -> dict[str, tf.Variable]:
        return create_variables(CONFIG, head, num_labels=NUM_LABELS, seed=WEIGHTS_SEED)

    if strategy is None:
        variables = build()
    else:
        with strategy.scope():
            variables = build()
    settings = StepSettings(steps, parse_checkpointing(policy), seed=3)
    return make_trainer(variables, ModelSpec(CONFIG, head, SEQ_LEN), SETTINGS, settings, strategy)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("an operation that does not compile for a TPU")


def main() -> None:
    results = {}
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for name, steps, policy, head in (
        ("plain", 1, "none", "squad"),
        ("accumulated", 2, "full", "classifier"),
        ("as on a TPU", 2, "nested", "squad"),
    ):
        if name == "as on a TPU":
            tf.distribute.TPUStrategy = tf.distribute.MirroredStrategy
            # XLA has neither.
            tf.raw_ops.InplaceAdd = tf.TensorArray.concat = refuse
        one, two = make(None, 1, "none", head), make(strategy, steps, policy, head)
        losses = []
        for seed in range(4):
            # Seven examples: a padded row is in the second replica's share.
            batch = {
                key: value
                for key, value in random_batch(7, SEQ_LEN, seed=seed).items()
                if key != "weights"
            }
            first, second = one.step(pad_batch(batch, 7)), two.step(pad_batch(batch, 8))
            losses.append(abs(float(second.loss) / float(first.loss) - 1))
        # The rows of a padded share of another size than in training.
        data = random_batch(5, SEQ_LEN, seed=9)
        logits = [
            make_predictor(t.variables, ModelSpec(CONFIG, head, SEQ_LEN), s)(data).numpy()
            for t, s in ((one, None), (two, strategy))
        ]
        expected, trained = values_of(one), values_of(two)
        difference = {n: trained[n] - expected[n] for n in expected}
        copies = [
            float(np.abs(np.subtract(*[local.numpy() for local in v.values])).max())
            for v in two.variables.values()
        ]
        results[name] = {
            "weights": norm_of(difference) / norm_of(expected),
            "loss": max(losses),
            "logits": float(np.abs(logits[1] - logits[0]).max()),
            "between_replicas": max(copies),
            "step": int(two.state.step.numpy()),
        }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
