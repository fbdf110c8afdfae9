"""Gradient checkpointing: which activations a layer keeps for its backward pass.

Bytes per token that one layer keeps from its forward pass to its backward pass (float32),
in terms of h (hidden), a (attention heads), s (sequence length), f (intermediate), with dropout
on. A dropout mask is one byte an element.

| policy | stores | recomputes | kept bytes per token and layer |
| --- | --- | --- | --- |
| `none` | every input that a gradient kernel reads | GELU, dropped probabilities | 34h + 8f + 4as |
| `selective` | query, key, value, attention output, GELU's input, masks of both sublayers | \
probabilities and their mask, GELU, LayerNorm | 22h + 4f |
| `full` | the layer's input | the whole layer, for all examples at once | 4h |
| `nested` | the layer's input | the whole layer, for some examples at a time | 4h |

While a layer is being differentiated, `full` holds what `none` holds, for that layer alone.
`selective` and `nested` hold it for one chunk of examples of that layer, so what grows with the
micro-batch is hardly more than the last column.

Every policy is exact: see `finetune.model.recomputation`. This module does not import TensorFlow.
"""

from __future__ import annotations

import dataclasses

from finetune.errors import InputError

POLICIES = ("none", "selective", "full", "nested")
"""What may be done with a layer's activations, from most memory and least time to the reverse."""

CHUNK_TOKENS = {"selective": 1536, "nested": 768}
"""Most tokens of a chunk, by the policies that work in chunks. The smaller, the less memory and
the smaller the matrices: `nested` is for those who need the memory."""


def examples_per_chunk(policy: str, seq_len: int) -> int | None:
    """Most examples of a chunk, at least 1; None if the policy takes all at once."""
    if policy not in CHUNK_TOKENS:
        return None
    return max(1, CHUNK_TOKENS[policy] // seq_len)


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """A policy for the first layers, and one for the others.

    The first layers are the ones to checkpoint more: their activations live longest, and the last
    layer's are needed as soon as the backward pass begins.

    Attributes:
        policy: one of `POLICIES`.
        layers: how many layers from the first; None means all.
        others: policy of the other layers, one of `POLICIES`.
    """

    policy: str = "none"
    layers: int | None = None
    others: str = "none"

    def __str__(self) -> str:
        """Write it as the command line does: `full`, `full:18`, `nested:6+selective`."""
        text = self.policy if self.layers is None else f"{self.policy}:{self.layers}"
        return text if self.others == "none" else f"{text}+{self.others}"

    def of_layer(self, index: int) -> str:
        """Policy of one layer, counted from 0 at the embeddings."""
        return self.policy if self.layers is None or index < self.layers else self.others

    def chunked_policies(self, num_layers: int) -> list[str]:
        """Policies of a model's layers that work in chunks of examples, by name."""
        return sorted({self.of_layer(index) for index in range(num_layers)} & CHUNK_TOKENS.keys())


NO_CHECKPOINTING = Checkpointing()
"""Every layer keeps what its backward pass reads."""


def parse_checkpointing(text: str) -> Checkpointing:
    """Read `none`, `full`, `full:18` or `nested:6+selective`.

    Raises:
        InputError: not a known policy, or not a number of layers.
    """
    first, plus, others = text.strip().lower().partition("+")
    policy, colon, count = first.partition(":")
    known = policy in POLICIES and (not plus or (others in POLICIES[1:] and colon))
    if not known or (colon and (not count.isdecimal() or len(count) > 9 or policy == "none")):
        raise InputError(
            f"unknown checkpointing policy {text!r}",
            hint=f"use one of {', '.join(POLICIES)}, full:N for the first N layers, or "
            "full:N+selective to name a policy for the others too",
        )
    return Checkpointing(policy, int(count) if colon else None, others or "none")
