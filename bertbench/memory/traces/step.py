"""Steps of any model and batch by their traces: what they ask for, and what they hold.

Nothing is run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from bertbench.core.workload import Levers, Setup, TrainingStep, Workload
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES, Memory, Replay, replay
from bertbench.memory.traces.loops import examples_of_block
from bertbench.memory.traces.trace import (
    ALL_LAYERS,
    FINAL,
    FIRST,
    LAYERS,
    LEAST,
    OTHER_LAYERS,
    Moment,
    StepTrace,
    Term,
    read_trace,
)
from bertbench.memory.traces.unroll import Written
from finetune.spec.checkpointing import examples_per_chunk
from finetune.spec.optimizers import EXACT_OPTIMIZER, PLACEMENTS, slot_shapes
from finetune.spec.precisions import EXACT_PRECISION, compute_type

KNOWN_ACTIVATIONS = ("gelu_tanh", "gelu_erf")
"""Both ask for the same, see `finetune.model.layers`."""


@functools.lru_cache(maxsize=64)
def state_requests(workload: Workload, optimizer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is asked for before the first step: the model's variables and the optimizer's slots.

    In the order of `finetune.model.modeling.create_variables`: the largest first, then random
    values for each; then the slots, variable by variable.
    """
    shapes = workload.parameters
    events: list[int] = []
    sizes: list[int] = []

    def ask(shape: Sequence[int]) -> int:
        sizes.append(4 * math.prod(shape))
        events.append(len(sizes) - 1)
        return len(sizes) - 1

    for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
        ask(shapes[name])
    for name, shape in shapes.items():
        if name.endswith("gamma"):
            events.append(~ask(shape))
        elif not name.endswith(("bias", "beta")):
            drawn, scaled, moved = ask(shape), ask(shape), ask(shape)
            events.extend((~scaled, ~drawn, ~moved))
    for name, shape in shapes.items():
        if workload.trained(name):
            for slot in slot_shapes(optimizer, shape).values():
                ask(slot)
    return tuple(events), tuple(sizes)


def different_words(workload: Workload, micro_batch: int) -> int:
    """How many different words the examples of a micro-batch have.

    The gradient of the word embeddings is summed for each word. This many are expected of random
    ones, as `bertbench.trials.worker.random_batch` draws them; text has fewer.
    """
    words = workload.config.vocab_size
    return round(-words * math.expm1(micro_batch * workload.seq_len * math.log1p(-1 / words)))


def dimensions_of(step: TrainingStep) -> dict[str, int]:
    """Values of the `DIMENSIONS`, but for the examples of a block."""
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


def layers_of(setup: Setup) -> dict[str, int]:
    """How many layers have the first policy, the other one, and any."""
    count, most = setup.levers.checkpointing.layers, setup.workload.config.num_hidden_layers
    first = most if count is None else min(count, most)
    return {LAYERS: first, OTHER_LAYERS: most - first, ALL_LAYERS: most}


def pattern_of(setup: Setup) -> str:
    """Name of the trace: optimizer, head, policies, and whether there are several micro-batches.

    A regressor has the classifier's: it differs by what is a few numbers for each example.
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
    """The trace of a step; None for levers or models that there is none of."""
    levers = setup.levers
    # TensorFloat-32 is another way to multiply the same tensors.
    float32 = compute_type(levers.precision) == compute_type(EXACT_PRECISION)
    if not float32 or levers.xla or levers.placement != PLACEMENTS[0]:
        return None
    if setup.workload.config.hidden_act not in KNOWN_ACTIVATIONS:
        return None
    trace = read_trace(pattern_of(setup))
    if trace is None:
        return None
    layers = layers_of(setup)
    enough = all(layers[over] >= count for over, count in trace.least_layers.items())
    return trace if enough else None


def blocks_of(policies: Sequence[str], seq_len: int, micro_batch: int) -> dict[str, list[int]]:
    """Examples of every block, by policy."""
    result = {}
    for policy in policies:
        count = -(-micro_batch // (examples_per_chunk(policy, seq_len) or micro_batch))
        result[policy] = [examples_of_block(micro_batch, count, index) for index in range(count)]
    return result


def sizes_of(trace: StepTrace, step: TrainingStep) -> Callable[[int], list[int]]:
    """Bytes of all sizes, for blocks of some examples; with 0 those of blocks are 0."""
    dimensions = dimensions_of(step)
    outside = [0 if size.of_block else size.size_bytes(dimensions) for size in trace.sizes]

    @functools.cache
    def sizes(examples: int) -> list[int]:
        if not examples:
            return outside
        dimensions["e"] = examples
        return [
            size.size_bytes(dimensions) if size.of_block else its_bytes
            for size, its_bytes in zip(trace.sizes, outside, strict=True)
        ]

    return sizes


def write_out(trace: StepTrace, step: TrainingStep) -> Written[int]:
    """Requests of two optimizer steps, in bytes."""
    sizes = sizes_of(trace, step)
    blocks = blocks_of(trace.policies, step.workload.seq_len, step.micro_batch)
    return Written(
        trace,
        layers_of(step.setup),
        {policy: len(its) for policy, its in blocks.items()},
        lambda policy, block: sizes(blocks[policy][block] if policy else 0),
    )


def step_requests(step: TrainingStep) -> tuple[list[int], list[int]] | None:
    """Everything that a trial asks for, from its first variable to the end of its second step.

    Returns:
        Events and sizes as `bertbench.memory.allocator.bfc.replay` takes them; None if there is no
        trace.
    """
    trace = trace_of(step.setup)
    if trace is None:
        return None
    written = write_out(trace, step)
    events, sizes = state_requests(step.workload, step.levers.optimizer)
    before = len(sizes)
    later = [event + before if event >= 0 else event - before for event in written.events]
    return [*events, *later], [*sizes, *written.sizes]


def left_out_bytes(setup: Setup) -> int:
    """Bytes, at most, that a step holds and its trace does not have.

    Zeros for biases of keys, which get no gradient with other optimizers than AdamW, and the
    gradient of the bias of a head with many outputs.
    """
    config, left_out = setup.workload.config, 0
    if setup.levers.optimizer != EXACT_OPTIMIZER:
        left_out += (2 * config.num_hidden_layers + 2) * allocated_bytes(4 * config.hidden_size)
    return left_out + 4 * allocated_bytes(4 * setup.workload.num_labels)


@functools.lru_cache(maxsize=4096)
def replay_step(step: TrainingStep, memory: Memory) -> Replay:
    """See whether a step of a batch fits in an allocator's memory.

    Raises:
        KeyError: there is no trace of it.
    """
    requests = step_requests(step)
    if requests is None:
        raise KeyError(pattern_of(step.setup))
    return replay(*requests, memory)


@dataclasses.dataclass(frozen=True)
class MomentBytes:
    """Bytes alive at a moment of a step, as a function of the numbers of layers.

    Attributes:
        number: of the moment, in its trace.
        least_layers: see `bertbench.memory.traces.trace.Moment`.
        constant: whatever the number of layers.
        each: for each layer of the first policy.
        each_other: for each of the others.
    """

    number: int
    least_layers: tuple[tuple[str, int], ...]
    constant: int
    each: int
    each_other: int


def moment_bytes(trace: StepTrace, step: TrainingStep) -> list[MomentBytes]:
    """Work out a trace's moments for a model, a batch and any number of layers.

    The model and the optimizer's state come on top, and so does what is lost in chunks that are
    handed out whole, and between chunks, which only a replay tells.
    """
    value_of = term_values(trace, step)
    blocks = blocks_of(trace.policies, step.workload.seq_len, step.micro_batch)
    result = []
    for number, moment in enumerate(trace.moments):
        policy, place = moment.block or ("", FIRST)
        if policy and len(blocks[policy]) < LEAST[place]:
            continue
        totals = [0, 0, 0]
        for term in moment.terms:
            one, all_ = value_of(moment, term)
            for index, (alone, each) in enumerate(term.counts):
                totals[index] += alone * one + each * all_
        result.append(MomentBytes(number, moment.least_layers, *totals))
    return result


def term_values(trace: StepTrace, step: TrainingStep) -> Callable[[Moment, Term], tuple[int, int]]:
    """How large what a term counts is: bytes of one, and of one for every block."""
    sizes = sizes_of(trace, step)
    blocks = blocks_of(trace.policies, step.workload.seq_len, step.micro_batch)

    @functools.cache
    def chunks(examples: int) -> list[int]:
        return [allocated_bytes(size) for size in sizes(examples)]

    @functools.cache
    def together(policy: str) -> list[int]:
        return [sum(its) for its in zip(*map(chunks, blocks[policy]), strict=True)]

    def value_of(moment: Moment, term: Term) -> tuple[int, int]:
        if not term.policy:
            return chunks(0)[term.size], 0
        its = blocks[term.policy]
        # The last two, for what is left of the one before is alive too.
        examples = max(its[-2:]) if moment.block == (term.policy, FINAL) else its[0]
        return chunks(examples)[term.size], together(term.policy)[term.size]

    return value_of


def highest(moments: Sequence[MomentBytes], layers: Mapping[str, int]) -> tuple[int, int]:
    """Most bytes alive, and the number of the moment."""
    return max(
        (m.constant + m.each * layers[LAYERS] + m.each_other * layers[OTHER_LAYERS], m.number)
        for m in moments
        if all(layers[over] >= count for over, count in m.least_layers)
    )


def allocated_bytes(size_bytes: int) -> int:
    """Bytes that a request takes; 0 for one that the small pieces serve."""
    if size_bytes <= MIN_ALLOCATION_BYTES:
        return 0
    return -(-size_bytes // MIN_ALLOCATION_BYTES) * MIN_ALLOCATION_BYTES


@functools.lru_cache(maxsize=256)
def state_bytes(workload: Workload, optimizer: str) -> int:
    """Chunks of the model and the optimizer's state."""
    events, sizes = state_requests(workload, optimizer)
    gone = {~event for event in events if event < 0}
    return sum(allocated_bytes(size) for number, size in enumerate(sizes) if number not in gone)


def traced_peak_bytes(step: TrainingStep) -> int | None:
    """Most bytes alive at once in a step, model and optimizer's state included.

    What the allocator loses comes on top: what it hands out too much, and what lies between chunks
    in pieces that are too small.

    Returns:
        None if there is no trace.
    """
    if trace_of(step.setup) is None:
        return None
    levers = step.levers
    moments = _moments(
        pattern_of(step.setup), step.workload, levers.accumulation_steps, step.micro_batch
    )
    most = highest(moments, layers_of(step.setup))[0]
    return most + state_bytes(step.workload, levers.optimizer)


@functools.lru_cache(maxsize=4096)
def _moments(
    pattern: str, workload: Workload, accumulation_steps: int, micro_batch: int
) -> list[MomentBytes]:
    """The same for any number of layers: a plan asks for all of them."""
    trace = read_trace(pattern)
    assert trace is not None
    setup = Setup(workload, Levers(accumulation_steps=accumulation_steps))
    return moment_bytes(trace, setup.step(micro_batch))
