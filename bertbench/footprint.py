"""Predicted peak memory of one optimizer step, part by part, without running it.

What `finetune` keeps alive is counted at every moment that can hold the peak: the backward pass of
each layer, the gradient of the embeddings, and the update. The prediction is the largest of them.

Sizes of the buffers that are counted, in bytes, float32, for a micro-batch of b sequences:

| name | shape | what |
| --- | --- | --- |
| T | `[b * s, h]` | a hidden state, a query, a key, a LayerNorm input |
| A | `[b, a, s, s]` | attention probabilities |
| F | `[b * s, f]` | the intermediate sublayer |
| E | the largest trained variable | word embeddings in every published model |

Measured against the allocator's peak on 2026-11-23 (TensorFlow 2.21, memory-capped CPU, BERT-Mini
to BERT-Base, both heads, accumulation 1 to 4; `benchmarks/footprint.py` measures again). The
rounding terms were chosen on 28 trials: median absolute error 2.0 %, from -6.5 % to +7.1 %. Five
trials, all of BERT-Medium with recomputed layers, were seen only after that: -2.4 % to +2.2 %.

What the allocator leaves unsplit changes with the history of the process, by up to 12 % between
equal trials of BERT-Mini. BERT-Tiny, of which nearly everything is word embeddings, was predicted
up to 14 % too high. Precisions other than float32, XLA and GPUs have not been measured.

This module does not import TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

from bertbench.workload import Levers, Workload
from finetune.config import BertConfig

_FLOAT_BYTES = 4
_ALIGNMENT_BYTES = 256  # TensorFlow's BFC allocator hands out multiples of this.

SAFETY_MARGIN = 0.08
"""Part of a prediction to add before comparing it with a budget that must not be exceeded: the
largest underprediction was 6.5 % of the peak, 7 % of the prediction."""

# finetune.modeling.transformer_layer, policy `none`.
_KEPT_HIDDEN = 8
"""T kept by a layer: query, key, value and context of the attention; x - mean and output of both
LayerNorms (the output of the second is the input of the next layer)."""
_KEPT_ATTENTION = 2
"""A kept by a layer: probabilities before and after dropout."""
_KEPT_INTERMEDIATE = {"gelu_tanh": 2, "gelu_erf": 2, "relu": 1}
"""F kept by a layer: input and output of the activation; a ReLU's gradient reads the latter."""

# The backward pass of one layer, on top of what the layer keeps.
_BACKWARD_INTERMEDIATE = 4
"""F: the gradient of the activation's output, and three terms of the GELU's gradient."""
_BACKWARD_HIDDEN = 2
"""T: the gradient that comes in, and that of the LayerNorm's input."""
_BACKWARD_ATTENTION = 3
"""A, when the intermediate sublayer is done with: gradients around dropout and softmax."""

_UPDATE_COPIES = 1
"""E during the update, beside the gradients: the weight decay. Gradients are clipped in place."""
_UPDATE_COPIES_ACCUMULATED = 2
"""The same above one accumulation step: accumulators are not clipped in place."""

# Bytes lost in chunks that the allocator hands out whole because they are less than twice what was
# asked for, in E. They depend on what was freed before and are the noise of this prediction.
_UNSPLIT_BACKWARD = 0.63
_UNSPLIT_UPDATE = 0.3
_UNSPLIT_UPDATE_ACCUMULATED = 1.5
_UNSPLIT_ACCUMULATORS = 0.8
"""In the backward pass above one accumulation step, in addition: zeros written to accumulators."""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Predicted bytes on the device at the moment of a step that needs most.

    Attributes:
        parts: bytes by part; all parts are alive at the same moment.
        phase: that moment: `backward of layer N`, `backward of embeddings` or `update`.
    """

    parts: Mapping[str, int]
    phase: str

    @property
    def peak_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, int]:
        """Bytes by part, for JSON."""
        return dict(self.parts)


def predict_footprint(
    workload: Workload, levers: Levers, micro_batch: int, *, device_kind: str = "cpu"
) -> Footprint:
    """Predict the peak of one optimizer step.

    Args:
        workload: model, head and sequence length.
        levers: lever settings.
        micro_batch: examples of one forward and backward pass, at least 1.
        device_kind: `cpu` or `gpu`; both are predicted alike so far.

    Returns:
        The parts at the moment with the highest peak.

    Raises:
        ValueError: `micro_batch` is below 1.
    """
    if micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}, below 1")
    moments = _moments(workload, levers, micro_batch)
    return max(moments, key=lambda footprint: footprint.peak_bytes)


def max_micro_batch(
    workload: Workload, levers: Levers, budget_bytes: int, *, device_kind: str = "cpu"
) -> int:
    """Find the largest micro-batch whose predicted peak is within a budget; 0 if there is none."""

    def fits(micro_batch: int) -> bool:
        predicted = predict_footprint(workload, levers, micro_batch, device_kind=device_kind)
        return predicted.peak_bytes <= budget_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclasses.dataclass(frozen=True)
class _Sizes:
    hidden: int  # T
    attention: int  # A
    intermediate: int  # F
    hidden_mask: int
    attention_mask: int

    def kept_without_intermediate(self) -> int:
        return (
            _KEPT_HIDDEN * self.hidden
            + 2 * self.hidden_mask
            + _KEPT_ATTENTION * self.attention
            + self.attention_mask
        )


@dataclasses.dataclass(frozen=True)
class _StateSizes:
    weights: int
    trained: int
    of_layer: tuple[int, ...]
    largest: int
    embeddings: int


@functools.lru_cache(maxsize=256)
def _state_sizes(workload: Workload) -> _StateSizes:
    """Bytes of the variables; the planner asks thousands of times for the same workload."""
    variables = {name: _variable_bytes(shape) for name, shape in workload.parameters.items()}
    trained = {name: size for name, size in variables.items() if workload.trained(name)}
    of_layer = [0] * workload.config.num_hidden_layers
    for name, size in trained.items():
        if name.startswith("bert/encoder/layer_"):
            of_layer[int(name.split("/")[2].removeprefix("layer_"))] += size
    return _StateSizes(
        weights=sum(variables.values()),
        trained=sum(trained.values()),
        of_layer=tuple(of_layer),
        largest=max(trained.values()),
        embeddings=sum(size for name, size in trained.items() if "/embeddings/" in name),
    )


def _sizes(config: BertConfig, seq_len: int, micro_batch: int) -> _Sizes:
    tokens = micro_batch * seq_len
    hidden = tokens * config.hidden_size
    attention = micro_batch * config.num_attention_heads * seq_len**2
    return _Sizes(
        hidden=_rounded(_FLOAT_BYTES * hidden),
        attention=_rounded(_FLOAT_BYTES * attention),
        intermediate=_rounded(_FLOAT_BYTES * tokens * config.intermediate_size),
        hidden_mask=_rounded(hidden) if config.hidden_dropout_prob else 0,
        attention_mask=_rounded(attention) if config.attention_probs_dropout_prob else 0,
    )


def _moments(workload: Workload, levers: Levers, micro_batch: int) -> list[Footprint]:
    config, layers = workload.config, workload.config.num_hidden_layers
    sizes = _sizes(config, workload.seq_len, micro_batch)
    accumulated = levers.accumulation_steps > 1
    state = _state_sizes(workload)
    of_layer, largest, embeddings = state.of_layer, state.largest, state.embeddings
    rows = micro_batch * levers.accumulation_steps
    always = {
        "weights": state.weights,
        "optimizer_state": 2 * state.trained,
        "accumulators": state.trained if accumulated else 0,
        # Three int32 [rows, s]; targets and weights are a few numbers a row.
        "inputs": 3 * _rounded(4 * rows * workload.seq_len),
    }
    unsplit = _UNSPLIT_BACKWARD + (_UNSPLIT_ACCUMULATORS if accumulated else 0.0)
    unsplit_backward = int(unsplit * largest)
    unsplit = _UNSPLIT_UPDATE_ACCUMULATED if accumulated else _UNSPLIT_UPDATE
    unsplit_update = int(unsplit * largest)
    intermediate = _KEPT_INTERMEDIATE[config.hidden_act] * sizes.intermediate
    whole_layer = sizes.kept_without_intermediate() + intermediate
    saved = [
        sizes.hidden if levers.checkpointing.of_layer(index) == "full" else whole_layer
        for index in range(layers)
    ]
    # The input of the embeddings' LayerNorm, and their dropout mask.
    embedded = sizes.hidden + sizes.hidden_mask
    working = max(
        _BACKWARD_INTERMEDIATE * sizes.intermediate,
        # The attention's turn comes when the intermediate sublayer's buffers are gone.
        _BACKWARD_ATTENTION * sizes.attention - intermediate,
    )
    working += _BACKWARD_HIDDEN * sizes.hidden
    moments = []
    gradients = state.trained - sum(of_layer) - embeddings
    for index in reversed(range(layers)):
        recomputed = whole_layer if levers.checkpointing.of_layer(index) == "full" else 0
        moments.append(
            Footprint(
                {
                    **always,
                    "gradients": 0 if accumulated else gradients,
                    "saved_activations": sum(saved[: index + 1]),
                    "layer_working_set": working + recomputed,
                    "embeddings_and_head": embedded,
                    "update_temporaries": 0,
                    "allocator_rounding": unsplit_backward,
                },
                f"backward of layer {index}",
            )
        )
        gradients += of_layer[index]
    copies = _UPDATE_COPIES_ACCUMULATED if accumulated else _UPDATE_COPIES
    return [
        *moments,
        Footprint(
            {
                **always,
                "gradients": embeddings if accumulated else gradients + embeddings,
                "saved_activations": 0,
                "layer_working_set": 0,
                "embeddings_and_head": embedded + 2 * sizes.hidden,
                "update_temporaries": 0,
                "allocator_rounding": unsplit_backward,
            },
            "backward of embeddings",
        ),
        Footprint(
            {
                **always,
                "gradients": 0 if accumulated else gradients + embeddings,
                "saved_activations": 0,
                "layer_working_set": 0,
                "embeddings_and_head": 0,
                "update_temporaries": copies * largest,
                "allocator_rounding": unsplit_update,
            },
            "update",
        ),
    ]


def _variable_bytes(shape: list[int]) -> int:
    return _rounded(_FLOAT_BYTES * math.prod(shape))


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
