"""What a step of any model and batch asks of TensorFlow's allocator, known before it runs.

A *step trace* is the list of requests of the first two optimizer steps, with symbols for sizes and
with what is repeated for every layer and every block of examples written once. Traces are made from
recordings of small models (`bertbench.trace_building`, `benchmarks/record_step_traces.py`); written
out for a model and a batch, and replayed through a model of the allocator
(`bertbench.allocations`), they tell where the step would run out of memory, fragmentation included.

Requests of up to 256 bytes are left out: `bertbench.allocator_limit` gives those a place of their
own. The workspaces of some matrix products, which come and go at once, depend on the number of
cores and are only near (two cores, TensorFlow 2.21; some hundred kilobytes at most); all else is
exact.

This module does not import TensorFlow.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from bertbench.allocations import Memory, Replay, replay
from bertbench.repetition import examples_of_block
from bertbench.workload import Levers, Workload
from finetune.checkpointing import examples_per_block
from finetune.optimizers import slot_shapes

DIMENSIONS = {
    "n": "examples of the micro-batch",
    "e": "examples of the block at hand",
    "r": "examples of all micro-batches",
    "s": "tokens per example",
    "h": "hidden size",
    "a": "attention heads",
    "f": "intermediate size",
    "v": "vocabulary",
    "u": "different words in the first micro-batch",
    "w": "different words in the second",
    "p": "positions",
}
"""What sizes are products of."""

LAYERS, OTHER_LAYERS, ALL_LAYERS = "layers", "other layers", "all layers"
"""What is repeated: for layers with the first policy of a `Checkpointing`, for the others, or for
both alike."""

LAST, OLDEST, OLDEST_OF_LAYER = "last", "oldest", "oldest of the last layer"
"""Which allocation of a role ends: the newest one, the oldest one, or the oldest of those that the
layer made that was at work last."""

_FILE = "step_traces.bin"


@dataclasses.dataclass(frozen=True)
class Size:
    """A size in symbols.

    Attributes:
        constant_bytes: what does not depend on anything.
        factor: of the product.
        powers: of the dimensions in the product.
    """

    constant_bytes: float
    factor: float
    powers: tuple[tuple[str, int], ...]

    def size_bytes(self, dimensions: Mapping[str, int]) -> int:
        """Size for values of the dimensions."""
        product = math.prod(dimensions[name] ** power for name, power in self.powers)
        return max(round(self.constant_bytes + self.factor * product), 0)


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request for memory, of which the roles' numbers tell which allocation ends where."""

    role: int
    size: int


@dataclasses.dataclass(frozen=True)
class End:
    """An allocation of a role ends; with `all_of_layer` all that are left of the last layer."""

    role: int
    all_of_layer: bool = False


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What is repeated for every block of examples, by the policy that works in them."""

    policy: str
    body: tuple[Ask | End, ...]


@dataclasses.dataclass(frozen=True)
class Repeated:
    """What is repeated for layers: for `more` layers more than there are of that kind."""

    over: str
    more: int
    body: tuple[Ask | End | Blocks, ...]


Item = Ask | End | Blocks | Repeated


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """Two optimizer steps in symbols.

    Attributes:
        sizes: by number.
        ends: for each role which of its allocations ends first.
        items: in order.
    """

    sizes: tuple[Size, ...]
    ends: tuple[str, ...]
    items: tuple[Item, ...]

    def write_out(
        self, dimensions: Mapping[str, int], layers: Mapping[str, int], seq_len: int
    ) -> tuple[list[int], list[int]] | None:
        """Requests of a model and a batch.

        Args:
            dimensions: values of all `DIMENSIONS` but the examples of a block.
            layers: how many there are of each kind, see `layers_of`.
            seq_len: tokens per example.

        Returns:
            Events and sizes as `bertbench.allocations.replay` takes them; None if there are fewer
            layers than the trace can be written out for.
        """
        if any(layers[i.over] + i.more < 0 for i in self.items if isinstance(i, Repeated)):
            return None
        return _Writer(self, dimensions, seq_len).write(layers)


class _Writer:
    def __init__(self, trace: StepTrace, dimensions: Mapping[str, int], seq_len: int) -> None:
        self._trace, self._seq_len = trace, seq_len
        self._dimensions = dict(dimensions)
        # Those of a block are worked out for each.
        self._fixed = [
            None if any(name == "e" for name, _ in size.powers) else size.size_bytes(dimensions)
            for size in trace.sizes
        ]
        self._alive: list[collections.deque[tuple[int, int]]] = [
            collections.deque() for _ in trace.ends
        ]
        self._layer = 0
        self._events: list[int] = []
        self._sizes: list[int] = []

    def write(self, layers: Mapping[str, int]) -> tuple[list[int], list[int]]:
        for item in self._trace.items:
            if isinstance(item, Repeated):
                for _ in range(layers[item.over] + item.more):
                    self._layer += 1
                    self._body(item.body)
                self._layer += 1
            else:
                self._body((item,))
        return self._events, self._sizes

    def _body(self, items: Sequence[Ask | End | Blocks]) -> None:
        for item in items:
            if isinstance(item, Blocks):
                batch = self._dimensions["n"]
                blocks = -(-batch // (examples_per_block(item.policy, self._seq_len) or batch))
                for block in range(blocks):
                    self._dimensions["e"] = examples_of_block(batch, blocks, block)
                    self._body(item.body)
            elif isinstance(item, Ask):
                size_bytes = self._fixed[item.size]
                if size_bytes is None:
                    size_bytes = self._trace.sizes[item.size].size_bytes(self._dimensions)
                self._alive[item.role].append((self._layer, len(self._sizes)))
                self._events.append(len(self._sizes))
                self._sizes.append(size_bytes)
            else:
                self._end(item)

    def _end(self, item: End) -> None:
        alive = self._alive[item.role]
        layer = alive[-1][0]
        if item.all_of_layer:
            while alive and alive[-1][0] == layer:
                self._events.append(~alive.pop()[1])
            return
        ends = self._trace.ends[item.role]
        if ends == LAST:
            self._events.append(~alive.pop()[1])
        elif ends == OLDEST:
            self._events.append(~alive.popleft()[1])
        else:
            index = next(i for i, (its_layer, _) in enumerate(alive) if its_layer == layer)
            self._events.append(~alive[index][1])
            del alive[index]


def state_requests(workload: Workload, optimizer: str) -> tuple[list[int], list[int]]:
    """What is asked for before the first step: the model's variables and the optimizer's slots.

    In the order of `finetune.modeling.create_variables`: the largest first, then random values for
    each; then the slots, variable by variable.
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
    return events, sizes


def different_words(workload: Workload, micro_batch: int) -> int:
    """How many different words the examples of a micro-batch have.

    The gradient of the word embeddings is summed for each word. This many are expected of random
    ones, as `bertbench.trial_step.random_batch` draws them; text has fewer.
    """
    words = workload.config.vocab_size
    return round(-words * math.expm1(micro_batch * workload.seq_len * math.log1p(-1 / words)))


def dimensions_of(workload: Workload, levers: Levers, micro_batch: int) -> dict[str, int]:
    """Values of the `DIMENSIONS`, but for the examples of a block."""
    config, words = workload.config, different_words(workload, micro_batch)
    return {
        "u": words,
        "w": words,
        "n": micro_batch,
        "r": micro_batch * levers.accumulation_steps,
        "s": workload.seq_len,
        "h": config.hidden_size,
        "a": config.num_attention_heads,
        "f": config.intermediate_size,
        "v": config.vocab_size,
        "p": config.max_position_embeddings,
    }


def layers_of(workload: Workload, levers: Levers) -> dict[str, int]:
    """How many layers have the first policy, the other one, and any."""
    count, most = levers.checkpointing.layers, workload.config.num_hidden_layers
    first = most if count is None else min(count, most)
    return {LAYERS: first, OTHER_LAYERS: most - first, ALL_LAYERS: most}


def pattern_of(workload: Workload, levers: Levers) -> str:
    """Name of the trace: head, policies, and whether there are several micro-batches."""
    layers = layers_of(workload, levers)
    policies = [levers.checkpointing.policy] * bool(layers[LAYERS])
    if layers[OTHER_LAYERS] and levers.checkpointing.others not in policies:
        policies.append(levers.checkpointing.others)
    accumulated = "accumulated" if levers.accumulation_steps > 1 else "at once"
    return f"{workload.head} {'+'.join(policies)} {accumulated}"


def step_requests(
    workload: Workload, levers: Levers, micro_batch: int
) -> tuple[list[int], list[int]] | None:
    """Everything that a trial asks for, from its first variable to the end of its second step.

    Returns:
        Events and sizes; None for levers or models that there is no trace of.
    """
    known = Levers(levers.checkpointing, levers.accumulation_steps)
    if levers != known:
        return None
    trace = read_traces().get(pattern_of(workload, levers))
    if trace is None or workload.config.hidden_act != "gelu_tanh":
        return None
    layers = layers_of(workload, levers)
    written = trace.write_out(
        dimensions_of(workload, levers, micro_batch), layers, workload.seq_len
    )
    if written is None:
        return None
    events, sizes = state_requests(workload, levers.optimizer)
    before = len(sizes)
    events += [event + before if event >= 0 else event - before for event in written[0]]
    return events, sizes + written[1]


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step of a workload at any batch, for `bertbench.extrapolation.largest_batch`.

    Attributes:
        workload: what is trained.
        levers: lever settings that there is a trace for.
        batch: where to begin.
        largest: there is no batch above which nothing is known.
    """

    workload: Workload
    levers: Levers
    batch: int
    largest: int | None = None

    def replay(self, batch: int, memory: Memory) -> Replay:
        """Replay the requests of a batch.

        Raises:
            KeyError: there is no trace.
        """
        requests = step_requests(self.workload, self.levers, batch)
        if requests is None:
            raise KeyError(pattern_of(self.workload, self.levers))
        return replay(*requests, memory)


def traces_to_bytes(traces: Mapping[str, StepTrace]) -> bytes:
    """Write traces, compressed."""
    values = {name: _trace_values(trace) for name, trace in sorted(traces.items())}
    return zlib.compress(json.dumps(values, separators=(",", ":")).encode(), 9)


def traces_from_bytes(data: bytes) -> dict[str, StepTrace]:
    """Read what `traces_to_bytes` wrote."""
    return {
        name: StepTrace(
            tuple(Size(a, b, tuple(sorted(powers.items()))) for a, b, powers in values["sizes"]),
            tuple(values["ends"]),
            tuple(_items(values["items"])),
        )
        for name, values in json.loads(zlib.decompress(data)).items()
    }


@functools.cache
def read_traces() -> dict[str, StepTrace]:
    """The traces that come with this package, by `pattern_of`."""
    path = resources.files("bertbench").joinpath(_FILE)
    return traces_from_bytes(path.read_bytes())


def _trace_values(trace: StepTrace) -> dict[str, Any]:
    return {
        "sizes": [[s.constant_bytes, s.factor, dict(s.powers)] for s in trace.sizes],
        "ends": trace.ends,
        "items": [_item_values(item) for item in trace.items],
    }


def _item_values(item: Item) -> Any:
    """[role, size] for a request, a role for an end, ~role for all of a layer's ends."""
    if isinstance(item, Ask):
        return [item.role, item.size]
    if isinstance(item, End):
        return ~item.role if item.all_of_layer else item.role
    body = [_item_values(inner) for inner in item.body]
    if isinstance(item, Blocks):
        return {"policy": item.policy, "body": body}
    return {"over": item.over, "more": item.more, "body": body}


def _items(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, int):
            yield End(value) if value >= 0 else End(~value, True)
        elif isinstance(value, list):
            yield Ask(*value)
        elif "policy" in value:
            yield Blocks(value["policy"], tuple(_items(value["body"])))
        else:
            yield Repeated(value["over"], value["more"], tuple(_items(value["body"])))
