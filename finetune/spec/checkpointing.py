"""Gradient checkpointing: which activations a layer keeps for its backward pass.

The last column counts the bytes that one layer keeps for each token from its forward pass to its
backward pass, in float32 and with dropout. h is the hidden size, a the number of attention heads,
s the sequence length, f the intermediate size. A dropout mask takes one byte for each element.

| policy | stores | recomputes | kept bytes per token and layer |
| --- | --- | --- | --- |
| `none` | every input that a gradient kernel reads | GELU, dropped probabilities | 34h + 8f + 4as |
| `selective` | query, key, value, attention output, GELU's input, masks of both sublayers | \
probabilities and their mask, GELU, LayerNorm | 22h + 4f |
| `full` | the layer's input | the whole layer, for all examples at once | 4h |
| `nested` | the layer's input | the whole layer, for some examples at a time | 4h |

During the backward pass of a layer, `full` holds what `none` holds, for that layer alone.
`selective` and `nested` hold it for one chunk of examples of that layer, so the bytes that grow
with the micro-batch are hardly more than those of the last column.

Every policy is exact: see `finetune.model.recomputation`.
"""

from __future__ import annotations

import dataclasses

from finetune.errors import InputError

POLICIES = ("none", "selective", "full", "nested")
"""The policies, from the one with the most memory and the least time to the opposite."""

CHUNK_TOKENS = {"selective": 1536, "nested": 768}
"""Most tokens of a chunk, for each policy that works in chunks. A smaller chunk needs less memory,
but its matrices are smaller too, and so slower: `nested` is for those who need the memory."""


def examples_per_chunk(policy: str, seq_len: int) -> int | None:
    """Return the most examples of a chunk, at least 1.

    Example:
        >>> examples_per_chunk("nested", 384)
        2

    Args:
        policy: one of `POLICIES`.
        seq_len: tokens of each example.

    Returns:
        None if the policy takes all examples at once.
    """
    if policy not in CHUNK_TOKENS:
        return None
    return max(1, CHUNK_TOKENS[policy] // seq_len)


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """A policy for the first layers, and one for the others.

    It pays to checkpoint the first layers more: their activations live longest. Those of the last
    layer are needed as soon as the backward pass begins.

    Attributes:
        policy: one of `POLICIES`.
        layers: number of layers, from the first, that have this policy; None means all.
        others: policy of the other layers, one of `POLICIES`.
    """

    policy: str = "none"
    layers: int | None = None
    others: str = "none"

    def __str__(self) -> str:
        """Write it as on the command line: `full`, `full:18`, `nested:6+selective`."""
        text = self.policy if self.layers is None else f"{self.policy}:{self.layers}"
        return text if self.others == "none" else f"{text}+{self.others}"

    def of_layer(self, index: int) -> str:
        """Return the policy of one layer; layer 0 is the one after the embeddings."""
        return self.policy if self.layers is None or index < self.layers else self.others

    def chunked_policies(self, num_layers: int) -> list[str]:
        """Return the policies that work in chunks of examples, of a model's layers; sorted."""
        return sorted({self.of_layer(index) for index in range(num_layers)} & CHUNK_TOKENS.keys())


NO_CHECKPOINTING = Checkpointing()
"""Every layer keeps all that its backward pass reads."""


def parse_checkpointing(text: str) -> Checkpointing:
    """Read `none`, `full`, `full:18` or `nested:6+selective`.

    Example:
        >>> parse_checkpointing("nested:6+selective").of_layer(6)
        'selective'

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
