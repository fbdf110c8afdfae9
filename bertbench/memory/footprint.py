"""Predicted peak memory of one optimizer step, part by part, without running it.

What `finetune` keeps alive is counted at every moment that can hold the peak: the backward pass of
each layer, the gradient of the embeddings, and the update. The prediction is the largest of them.

Sizes of the buffers that are counted, for a micro-batch of b sequences, in numbers of 4 bytes or,
with bfloat16, of 2:

| name | shape | what |
| --- | --- | --- |
| T | `[b * s, h]` | a hidden state, a query, a key, a LayerNorm input |
| A | `[b, a, s, s]` | attention probabilities |
| F | `[b * s, f]` | the intermediate sublayer |
| E | the largest trained variable | word embeddings in every published model |

Measured against the allocator's peak on 2026-11-25 (TensorFlow 2.21, memory-capped CPU in one
region, BERT-Tiny to BERT-Medium and BERT-Base, both heads, all policies, accumulation 1 to 4;
`benchmarks/footprint.py` measures again). The numbers of buffers below follow from the code of
`finetune`; these trials decided which of them are alive at the same moment. Of 84 trials the median
absolute error is 1.0 %, 71 are within 5 %, and all between -12.8 % (BERT-Small, seq 64, four
micro-batches of 4, where the allocator loses most in chunks that it hands out whole, which is not
predicted; the next is -7.0 %) and +10.8 % (BERT-Mini, `nested`, batch 128).

With bfloat16 and float16 (BERT-Mini, `none` and `selective`) predictions are between -6.1 % and
0 %; with Lion and Adafactor (`nested`, BERT-Small and BERT-Base) between -1.4 % and 0 %.

For a step that XLA compiles the same buffers are counted, because `finetune.model.barriers` makes
XLA keep the same ones; `bertbench.memory.compiled_prediction` says how far that holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

from bertbench.core.workload import Setup, TrainingStep, Workload
from finetune.spec.checkpointing import examples_per_chunk
from finetune.spec.config import BertConfig
from finetune.spec.optimizers import slot_shapes
from finetune.spec.precisions import EXACT_PRECISION, compute_bytes

_FLOAT_BYTES = 4
_ALIGNMENT_BYTES = 256  # TensorFlow's BFC allocator hands out multiples of this.

# finetune.model.modeling, a layer with policy `none`.
_KEPT_HIDDEN = 8
"""T kept by a layer: query, key, value and context of the attention; x - mean and output of both
LayerNorms (the output of the second is the input of the next layer)."""
_KEPT_ATTENTION = 1
"""A kept by a layer: probabilities, with the sign of minus where dropout took them."""
_KEPT_INTERMEDIATE = {"gelu_tanh": 2, "gelu_erf": 2, "relu": 1}
"""F kept by a layer: input and output of the activation; a ReLU's gradient reads the latter."""

# The same, policy `selective`: `finetune.model.modeling`'s calls of `keep`.
_KEPT_HIDDEN_SELECTIVE = 5
"""T: the layer's input, query, key, value, attention output. One F comes to it, GELU's input."""

# The backward pass of one layer, on top of what the layer keeps.
_BACKWARD_INTERMEDIATE = 2
"""F: the gradient of the activation's output and two terms of the GELU's gradient, less the
activation's output, which is gone when its product's weights have their gradient."""
_BACKWARD_HIDDEN = 2
"""T: the gradient that comes in, and that of the LayerNorm's input."""
_BACKWARD_ATTENTION = 2
"""A, when the intermediate sublayer is done with: the dropped probabilities, and their gradient."""

_CHUNK_RESULTS = 3
"""T of all examples while a layer is differentiated in chunks: the gradient that comes in, and
the one that leaves, chunk by chunk and put together."""

_UPDATE_COPIES = {"adamw": 1, "lion": 2, "adafactor": 1}
"""Copies of the variable at hand during its update: the weight decay; Lion's two averages;
Adafactor's squared gradient. Gradients are clipped in place and given back when they have been
applied."""

_ALL_REDUCE_COPIES = {"cpu": 2.0, "gpu": 2.0, "tpu": 0.6}
"""Copies of all gradients while replicas add them up. Of GPUs from TensorFlow's sources, not
measured: NcclAllReduce packs them into one tensor and reduces it to another. Of a TPU by the
compiler of a TPU v2: 0.6 for BERT-Small on eight cores, none for BERT-Tiny."""

ACTIVATION_PARTS = ("saved_activations", "layer_working_set", "embeddings_and_head")
"""Parts that grow with the micro-batch, but for the inputs."""

_PARTS_OF_A_MOMENT = (
    "gradients",
    "saved_activations",
    "layer_working_set",
    "embeddings_and_head",
    "update_temporaries",
)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Predicted bytes on the device at the moment of a step that needs most.

    Attributes:
        parts: bytes by part; all parts are alive at the same moment.
        phase: that moment: `backward of layer N`, `backward of embeddings` or `update`.
        host_bytes: needed of the host's memory, if the optimizer's state is there.
    """

    parts: Mapping[str, int]
    phase: str
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, int]:
        """Bytes by part, for JSON."""
        return dict(self.parts)


def predict_footprint(step: TrainingStep, *, activation_factor: float = 1.0) -> Footprint:
    """Predict the peak of one optimizer step.

    Args:
        step: with a micro-batch of at least 1 example.
        activation_factor: what activations are multiplied by, where tensors take more memory than
            their elements.

    Returns:
        The parts at the moment with the highest peak.

    Raises:
        ValueError: `micro_batch` is below 1.
    """
    if step.micro_batch < 1:
        raise ValueError(f"micro_batch is {step.micro_batch}, below 1")
    moments = [_with_larger(one, activation_factor) for one in _moments(step)]
    highest = max(moments, key=lambda footprint: footprint.peak_bytes)
    if step.levers.placement != "host":
        return highest
    state = _state_sizes(step.workload, step.levers.optimizer)
    # A gradient on its way to the host, and the change on its way back.
    return dataclasses.replace(highest, host_bytes=state.slots + 2 * state.largest)


def all_reduce_footprint(step: TrainingStep, *, device_kind: str) -> Footprint:
    """Predict what is alive while the replicas of a step add up their gradients.

    Args:
        step: of each replica.
        device_kind: `cpu`, `gpu` or `tpu`.
    """
    always, state = _always(step)
    parts = {
        **always,
        "accumulators": 0,
        "gradients": state.trained,
        "all_reduce": int(_ALL_REDUCE_COPIES[device_kind] * state.trained),
    }
    return Footprint(parts, "sum over the replicas")


def inference_bytes(setup: Setup, examples: int) -> int:
    """Predict the live bytes while the model answers examples between two steps of its training.

    Beside the model and the optimizer's state these are the tensors of one layer: its input, query,
    key, value and attention scores, or its input with the activation's input and output.
    Measured on 2026-12-01 (BERT-Mini, sequence lengths 64, 128 and 512, two heads, 8 and 32
    examples): the same within 0.1 %.
    """
    workload, levers = setup.workload, setup.levers
    state = _state_sizes(workload, levers.optimizer)
    sizes = _sizes(workload.config, workload.seq_len, examples, EXACT_PRECISION)
    slots = 0 if levers.placement == "host" else state.slots
    of_layer = max(
        4 * sizes.hidden + sizes.attention,
        sizes.hidden + 2 * sizes.intermediate,
    )
    return state.weights + slots + of_layer


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes of the buffers, in the type of activations."""

    hidden: int  # T
    attention: int  # A
    intermediate: int  # F
    hidden_mask: int

    def kept_without_intermediate(self) -> int:
        return _KEPT_HIDDEN * self.hidden + 2 * self.hidden_mask + _KEPT_ATTENTION * self.attention


@dataclasses.dataclass(frozen=True)
class _StateSizes:
    weights: int
    trained: int
    slots: int
    of_layer: tuple[int, ...]
    largest: int
    second: int
    embeddings: int


@functools.lru_cache(maxsize=256)
def _state_sizes(workload: Workload, optimizer: str) -> _StateSizes:
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
        slots=sum(
            _variable_bytes(slot)
            for name, shape in workload.parameters.items()
            if name in trained
            for slot in slot_shapes(optimizer, shape).values()
        ),
        of_layer=tuple(of_layer),
        largest=max(trained.values()),
        second=max(size for name, size in trained.items() if not name.endswith("word_embeddings")),
        embeddings=sum(size for name, size in trained.items() if "/embeddings/" in name),
    )


def _sizes(config: BertConfig, seq_len: int, micro_batch: int, precision: str) -> _Sizes:
    each = compute_bytes(precision)
    tokens = micro_batch * seq_len
    hidden = tokens * config.hidden_size
    attention = micro_batch * config.num_attention_heads * seq_len**2
    return _Sizes(
        hidden=_rounded(each * hidden),
        attention=_rounded(each * attention),
        intermediate=_rounded(each * tokens * config.intermediate_size),
        hidden_mask=_rounded(hidden) if config.hidden_dropout_prob else 0,
    )


def _always(step: TrainingStep) -> tuple[dict[str, int], _StateSizes]:
    """What is alive from the first micro-batch on, and the sizes of the state."""
    workload, levers = step.workload, step.levers
    state = _state_sizes(workload, levers.optimizer)
    rows = step.micro_batch * levers.accumulation_steps
    always = {
        "weights": state.weights,
        "optimizer_state": 0 if levers.placement == "host" else state.slots,
        "accumulators": state.trained if levers.accumulation_steps > 1 else 0,
        # Three int32 [rows, s]; targets and weights are a few numbers a row.
        "inputs": 3 * _rounded(4 * rows * workload.seq_len),
    }
    return always, state


def _moments(step: TrainingStep) -> list[Footprint]:
    """What is alive at every moment that can hold the peak, in the order of time."""
    config, levers = step.workload.config, step.levers
    always, state = _always(step)
    accumulated = levers.accumulation_steps > 1
    sizes = _sizes(config, step.workload.seq_len, step.micro_batch, levers.precision)
    layers = _layer_bytes(step, sizes, state)
    # The sum that enters the embeddings' LayerNorm, and their dropout mask.
    embedded = sizes.hidden + sizes.hidden_mask
    # The embeddings are gathered, and their gradients scattered, in float32 always.
    tokens = step.micro_batch * step.workload.seq_len
    wide_hidden = _rounded(_FLOAT_BYTES * tokens * config.hidden_size)
    moments = []
    gradients = state.trained - sum(state.of_layer) - state.embeddings
    for index in reversed(range(len(layers))):
        moments.append(
            _moment(
                f"backward of layer {index}",
                always,
                gradients=0 if accumulated else gradients,
                saved_activations=sum(saved for saved, _ in layers[: index + 1]),
                layer_working_set=layers[index][1],
                embeddings_and_head=embedded,
            )
        )
        gradients += state.of_layer[index]
    gradients += state.embeddings
    of_embeddings = _moment(
        "backward of embeddings",
        always,
        gradients=0 if accumulated else gradients,
        embeddings_and_head=embedded + 2 * wide_hidden,
    )
    copies = _UPDATE_COPIES[levers.optimizer]
    update = _moment(
        "update",
        always,
        accumulators=0,
        gradients=gradients,
        update_temporaries=copies * state.second,
    )
    # Last, when all other gradients are freed.
    last_update = _moment(
        "update of the word embeddings",
        always,
        accumulators=0,
        gradients=state.largest,
        update_temporaries=copies * state.largest,
    )
    return [*moments, of_embeddings, update, last_update]


def _moment(phase: str, always: Mapping[str, int], **parts: int) -> Footprint:
    """A footprint of parts that are always alive, and of those of the moment; others are 0."""
    others = dict.fromkeys(_PARTS_OF_A_MOMENT, 0)
    return Footprint({**always, **others, **parts}, phase)


def _with_larger(moment: Footprint, activation_factor: float) -> Footprint:
    """Multiply what is alive of the activations at a moment."""
    if activation_factor == 1.0:
        return moment
    parts = {
        name: int(activation_factor * size) if name in ACTIVATION_PARTS else size
        for name, size in moment.parts.items()
    }
    return dataclasses.replace(moment, parts=parts)


def _layer_bytes(step: TrainingStep, sizes: _Sizes, state: _StateSizes) -> list[tuple[int, int]]:
    """For each layer: bytes kept for its backward pass, and those that this pass needs on top."""
    config, checkpointing = step.workload.config, step.levers.checkpointing
    policies = [checkpointing.of_layer(index) for index in range(config.num_hidden_layers)]
    of_policy = {
        policy: (
            _saved_bytes(policy, config, sizes),
            _working_bytes(policy, step, sizes, state),
        )
        for policy in set(policies)
    }
    return [of_policy[policy] for policy in policies]


def _working_bytes(policy: str, step: TrainingStep, sizes: _Sizes, state: _StateSizes) -> int:
    """Bytes of a layer's backward pass on top of what the policy keeps."""
    config, seq_len, levers = step.workload.config, step.workload.seq_len, step.levers
    if policy == "none":
        return _backward_bytes(config, sizes)
    if policy == "full":
        return _saved_bytes("none", config, sizes) + _backward_bytes(config, sizes)
    limit = examples_per_chunk(policy, seq_len) or step.micro_batch
    chunk = _sizes(config, seq_len, min(step.micro_batch, limit), levers.precision)
    # Of the weights' gradients: sums over the chunks, unless the accumulators are what is added to,
    # and a term to be added.
    sums = 0 if levers.accumulation_steps > 1 else max(state.of_layer)
    term = _variable_bytes([config.hidden_size, config.intermediate_size])
    return (
        _saved_bytes("none", config, chunk)
        # What the policy keeps is kept chunk by chunk, so that this chunk's needs no copy; the
        # layer's input does.
        - (_saved_bytes(policy, config, chunk) - chunk.hidden)
        + _backward_bytes(config, chunk)
        + _CHUNK_RESULTS * sizes.hidden
        + sums
        + term
    )


def _saved_bytes(policy: str, config: BertConfig, sizes: _Sizes) -> int:
    """Bytes that a layer keeps from its forward to its backward pass."""
    if policy == "none":
        intermediate = _KEPT_INTERMEDIATE[config.hidden_act] * sizes.intermediate
        return sizes.kept_without_intermediate() + intermediate
    if policy == "selective":
        return _KEPT_HIDDEN_SELECTIVE * sizes.hidden + sizes.intermediate + 2 * sizes.hidden_mask
    return sizes.hidden


def _backward_bytes(config: BertConfig, sizes: _Sizes) -> int:
    """Bytes of a layer's backward pass on top of what `none` keeps."""
    intermediate = _KEPT_INTERMEDIATE[config.hidden_act] * sizes.intermediate
    return _BACKWARD_HIDDEN * sizes.hidden + max(
        _BACKWARD_INTERMEDIATE * sizes.intermediate,
        # The attention's turn comes when the intermediate sublayer's buffers are gone.
        _BACKWARD_ATTENTION * sizes.attention - intermediate,
    )


def _variable_bytes(shape: list[int]) -> int:
    return _rounded(_FLOAT_BYTES * math.prod(shape))


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
