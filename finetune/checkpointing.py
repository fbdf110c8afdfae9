"""Gradient checkpointing: which activations a layer keeps for its backward pass.

Bytes per token that one layer keeps from its forward pass to its backward pass (float32),
in terms of h (hidden), a (attention heads), s (sequence length), f (intermediate), with dropout
on. A dropout mask is one byte an element.

| policy | stores | recomputes | kept bytes per token and layer |
| --- | --- | --- | --- |
| `none` | every input that a gradient kernel reads | GELU | 34h + 8f + 9as |
| `full` | the layer's input | the whole layer, once | 4h |

While a `full` layer is being differentiated it holds what `none` holds, for that layer alone.

The recomputed forward pass must draw the dropout masks of the first one. `tf.recompute_grad`
around a stateful random op does not: it draws new masks, and the gradient belongs to another
function than the loss. Here every mask is a function of tensors that are passed in
(`finetune.dropout`), so both passes agree by construction.

This module imports TensorFlow only when a graph is built, so that policies can be read and
compared without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from finetune.errors import InputError

POLICIES = ("none", "full")
"""What may be done with a layer's activations, from most memory and least time to the reverse."""


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """A policy for the first `layers` layers; the others are not checkpointed.

    The first layers are the ones to checkpoint: their activations live longest, and the last
    layer's are needed as soon as the backward pass begins.

    Attributes:
        policy: one of `POLICIES`.
        layers: how many layers from the first; None means all.
    """

    policy: str = "none"
    layers: int | None = None

    def __str__(self) -> str:
        """Write it as the command line does: `full`, `full:18`."""
        return self.policy if self.layers is None else f"{self.policy}:{self.layers}"

    def of_layer(self, index: int) -> str:
        """Policy of one layer, counted from 0 at the embeddings."""
        return self.policy if self.layers is None or index < self.layers else "none"

    def checkpointed_layers(self, num_layers: int) -> int:
        """How many of a model's layers are recomputed."""
        if self.policy == "none":
            return 0
        return num_layers if self.layers is None else min(self.layers, num_layers)


NO_CHECKPOINTING = Checkpointing()
"""Every layer keeps what its backward pass reads."""


def parse_checkpointing(text: str) -> Checkpointing:
    """Read `none`, `full` or `full:18`.

    Raises:
        InputError: not a known policy, or not a number of layers.
    """
    policy, separator, count = text.strip().lower().partition(":")
    if policy not in POLICIES or (separator and (not count.isdigit() or policy == "none")):
        raise InputError(
            f"unknown checkpointing policy {text!r}",
            hint=f"use one of {', '.join(POLICIES)}, or full:N for the first N layers",
        )
    return Checkpointing(policy, int(count) if separator else None)


def recompute(layer: Callable[..., Any], x: Any, *constants_and_weights: Any) -> Any:
    """Call a pure function so that its backward pass runs its forward pass again.

    Unlike `tf.recompute_grad` this copies `x` alone, not every weight, to keep the optimizer of
    the graph from merging the two forward passes.

    Args:
        layer: a pure function of tensors, called as `layer(x, *constants_and_weights)`. What
            else it needs (the dropout key) it may capture, as long as no gradient is wanted.
        x: the activation that enters; float.
        *constants_and_weights: the other tensors that gradients are wanted for or that differ
            per call.

    Returns:
        What `layer` returns, one float tensor; for the backward pass only the arguments are kept.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def checkpointed(x: Any, *others: Any) -> Any:
        def gradient(dy: Any) -> list[Any]:
            # A value that depends on dy and is 0 unless dy is broken. Without it the graph
            # optimizer would see two equal computations and keep the first one's activations,
            # and XLA would move the second one before the loss.
            first = tf.reshape(dy, [-1])[0]
            zero = tf.where(tf.equal(first, first), 0.0, first)
            again = x + tf.cast(zero, x.dtype)
            with tf.GradientTape() as tape:
                tape.watch(again)
                tape.watch(others)
                y = layer(again, *others)
            dx, *dothers = tape.gradient(y, [again, *others], output_gradients=dy)
            # Nothing waits for a weight's gradient until the update, and TensorFlow prefers the
            # operation that became ready last: without this the layers below would be recomputed
            # first, and all their activations would live at once.
            with tf.control_dependencies([d for d in dothers if d is not None]):
                return [tf.identity(dx), *dothers]

        return layer(x, *others), gradient

    return checkpointed(x, *constants_and_weights)
