"""The trace of a training step: which one it has, its requests in bytes, and their replay.

Nothing is run, and TensorFlow is not imported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from bertbench.core.workload import Setup, TrainingStep, Workload
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES, Memory, Replay, replay
from bertbench.memory.traces.archive import read_trace
from bertbench.memory.traces.loops import examples_of_chunk
from bertbench.memory.traces.trace import ALL_LAYERS, LAYERS, OTHER_LAYERS, StepTrace
from bertbench.memory.traces.unroll import Unrolled
from finetune.spec.checkpointing import examples_per_chunk
from finetune.spec.optimizers import EXACT_OPTIMIZER, PLACEMENTS, slot_shapes
from finetune.spec.precisions import EXACT_PRECISION, compute_type

KNOWN_ACTIVATIONS = ("gelu_tanh", "gelu_erf")
"""Activations that there are traces for. Both make the same requests, see
`finetune.model.layers`."""


def pattern_of(setup: Setup) -> str:
    """Name of a setup's trace: optimizer, head, policies, and whether gradients are accumulated.

    A regressor has the classifier's trace: they differ by a few numbers for each example.
    """
    layers, levers, head = layers_of(setup), setup.levers, setup.workload.head
    policies = [levers.checkpointing.policy] * bool(layers[LAYERS])
    if layers[OTHER_LAYERS] and levers.checkpointing.others not in policies:
        policies.append(levers.checkpointing.others)
    accumulated = "accumulated" if levers.accumulation_steps > 1 else "at once"
    optimizer = "" if levers.optimizer == EXACT_OPTIMIZER else f"{levers.optimizer} "
    head = "classifier" if head == "regressor" else head
    return f"{optimizer}{head} {'+'.join(policies)} {accumulated}"


def trace_of(setup: Setup) -> StepTrace | None:
    """The trace of a setup; None if there is none for these levers or this model."""
    levers = setup.levers
    # TensorFloat-32 changes how tensors are multiplied, not which tensors there are.
    float32 = compute_type(levers.precision) == compute_type(EXACT_PRECISION)
    if not float32 or levers.xla or levers.placement != PLACEMENTS[0]:
        return None
    if setup.workload.config.hidden_act not in KNOWN_ACTIVATIONS:
        return None
    trace = read_trace(pattern_of(setup))
    if trace is None:
        return None
    layers = layers_of(setup)
    enough = all(layers[kind] >= count for kind, count in trace.min_layers.items())
    return trace if enough else None


def layers_of(setup: Setup) -> dict[str, int]:
    """Number of layers by kind: with the first policy, with the other one, and in all."""
    count, most = setup.levers.checkpointing.layers, setup.workload.config.num_hidden_layers
    first = most if count is None else min(count, most)
    return {LAYERS: first, OTHER_LAYERS: most - first, ALL_LAYERS: most}


def chunks_of(policies: Sequence[str], seq_len: int, micro_batch: int) -> dict[str, list[int]]:
    """Number of examples in each chunk, by policy."""
    result = {}
    for policy in policies:
        count = -(-micro_batch // (examples_per_chunk(policy, seq_len) or micro_batch))
        result[policy] = [examples_of_chunk(micro_batch, count, index) for index in range(count)]
    return result


def dimensions_of(step: TrainingStep) -> dict[str, int]:
    """Values of the `bertbench.memory.traces.trace.DIMENSIONS`, without the examples of a chunk."""
    workload, micro_batch = step.workload, step.micro_batch
    config, words = workload.config, different_words(workload, micro_batch)
    return {
        "u": words,
        "w": words,
        "n": micro_batch,
        "r": micro_batch * step.levers.accumulation_steps,
        "s": workload.seq_len,
        "h": config.hidden_size,
        "a": config.num_attention_heads,
        "f": config.intermediate_size,
        "v": config.vocab_size,
        "p": config.max_position_embeddings,
        "t": config.type_vocab_size,
        "l": {"squad": 2, "regressor": 1}.get(workload.head, workload.num_labels),
    }


def different_words(workload: Workload, micro_batch: int) -> int:
    """Expected number of different words in a micro-batch of random words.

    The gradient of the word embeddings has a row for each of them. Trials draw random words, see
    `bertbench.trials.worker.random_batch`; a text has fewer different ones.
    """
    words = workload.config.vocab_size
    return round(-words * math.expm1(micro_batch * workload.seq_len * math.log1p(-1 / words)))


def sizes_of(trace: StepTrace, step: TrainingStep) -> Callable[[int], list[int]]:
    """Work out the sizes of a trace.

    Returns:
        A function of the examples in a chunk. It returns the bytes of all sizes by their numbers;
        with 0 examples, for outside of chunks, the sizes of chunks are 0.
    """
    dimensions = dimensions_of(step)
    outside = [0 if size.of_chunk else size.size_bytes(dimensions) for size in trace.sizes]

    @functools.cache
    def sizes(examples: int) -> list[int]:
        if not examples:
            return outside
        dimensions["e"] = examples
        return [
            size.size_bytes(dimensions) if size.of_chunk else its_bytes
            for size, its_bytes in zip(trace.sizes, outside, strict=True)
        ]

    return sizes


def unroll_step(trace: StepTrace, step: TrainingStep) -> Unrolled[int]:
    """Unroll a trace of two optimizer steps, with sizes in bytes."""
    sizes = sizes_of(trace, step)
    chunks = chunks_of(trace.policies, step.workload.seq_len, step.micro_batch)
    return Unrolled(
        trace,
        layers_of(step.setup),
        {policy: len(examples) for policy, examples in chunks.items()},
        lambda policy, number: sizes(chunks[policy][number] if policy else 0),
    )


@functools.lru_cache(maxsize=64)
def state_requests(workload: Workload, optimizer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Requests before the first step: the model's variables and the optimizer's slots.

    The order is that of `finetune.model.modeling.create_variables`: the variables, the largest
    first; then random values for each of them; then the slots of each variable.

    Returns:
        Events and sizes, as `bertbench.memory.allocator.bfc.replay` takes them.
    """
    shapes = workload.parameters
    events: list[int] = []
    sizes: list[int] = []

    def allocate(shape: Sequence[int]) -> int:
        sizes.append(4 * math.prod(shape))
        events.append(len(sizes) - 1)
        return len(sizes) - 1

    for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
        allocate(shapes[name])
    for name, shape in shapes.items():
        if name.endswith("gamma"):
            events.append(~allocate(shape))
        elif not name.endswith(("bias", "beta")):
            drawn, scaled, moved = allocate(shape), allocate(shape), allocate(shape)
            events.extend((~scaled, ~drawn, ~moved))
    for name, shape in shapes.items():
        if workload.trained(name):
            for slot in slot_shapes(optimizer, shape).values():
                allocate(slot)
    return tuple(events), tuple(sizes)


@functools.lru_cache(maxsize=256)
def state_bytes(workload: Workload, optimizer: str) -> int:
    """Allocated bytes of the model and the optimizer's state."""
    events, sizes = state_requests(workload, optimizer)
    freed = {~event for event in events if event < 0}
    return sum(allocated_bytes(size) for number, size in enumerate(sizes) if number not in freed)


# They are long, and asked for again and again only while a search changes the memory of one step.
@functools.lru_cache(maxsize=2)
def step_requests(step: TrainingStep) -> tuple[Sequence[int], Sequence[int]] | None:
    """All requests of a trial, from the first variable to the end of the second step.

    Returns:
        Events and sizes, as `bertbench.memory.allocator.bfc.replay` takes them; None if there is no
        trace.
    """
    trace = trace_of(step.setup)
    if trace is None:
        return None
    unrolled = unroll_step(trace, step)
    events, sizes = state_requests(step.workload, step.levers.optimizer)
    before = len(sizes)
    later = [event + before if event >= 0 else event - before for event in unrolled.events]
    return (*events, *later), (*sizes, *unrolled.sizes)


@functools.lru_cache(maxsize=4096)
def replay_step(step: TrainingStep, memory: Memory) -> Replay:
    """Replay the requests of a step: does it fit in an allocator's memory?

    Raises:
        KeyError: there is no trace of the step.
    """
    requests = step_requests(step)
    if requests is None:
        raise KeyError(pattern_of(step.setup))
    return replay(*requests, memory)


def left_out_bytes(setup: Setup) -> int:
    """Bytes, at most, that a step holds and its trace leaves out.

    With other optimizers than AdamW the biases of keys get no gradient, and zeros stand for it. And
    the gradient of the bias of a head with many outputs is above 256 bytes.
    """
    config, left_out = setup.workload.config, 0
    if setup.levers.optimizer != EXACT_OPTIMIZER:
        left_out += (2 * config.num_hidden_layers + 2) * allocated_bytes(4 * config.hidden_size)
    return left_out + 4 * allocated_bytes(4 * setup.workload.num_labels)


def allocated_bytes(size_bytes: int) -> int:
    """Bytes that the allocator takes for a request; 0 if the small pieces serve it."""
    if size_bytes <= MIN_ALLOCATION_BYTES:
        return 0
    return -(-size_bytes // MIN_ALLOCATION_BYTES) * MIN_ALLOCATION_BYTES
