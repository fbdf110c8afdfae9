"""Step traces: what a step asks of TensorFlow's allocator, written down once for all models.

A *step trace* is the list of requests of the first two optimizer steps, with symbols for sizes and
with what is repeated for every layer and every block of examples written once. Traces are made from
recordings of small models (`bertbench.memory.traces.build.building`,
`benchmarks/record_step_traces.py`) and written out for a model and a batch by
`bertbench.memory.traces.step`.

Requests of up to 256 bytes are left out: `bertbench.memory.allocator.limit` gives those a place of
their own. The workspaces of some matrix products, which come and go at once, depend on the number
of cores and are only near (two cores, TensorFlow 2.21; some hundred kilobytes at most); all else is
exact.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from finetune.errors import InputError
from finetune.storage.json_files import json_text

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
    "t": "segment types",
    "l": "outputs of the head",
}
"""What sizes are products of."""

LAYERS, OTHER_LAYERS, ALL_LAYERS = "layers", "other layers", "all layers"
"""What is repeated: for layers with the first policy of a `Checkpointing`, for the others, or for
both alike."""

LAST, OLDEST, OLDEST_OF_LAYER = "last", "oldest", "oldest of the last layer"
"""Which allocation of a role ends: the newest one, the oldest one, or the oldest of those that the
layer made that was at work last."""

FIRST, SECOND, FINAL = 0, 1, -1
"""Which layer of a run, or block of a loop, a moment is in: what lies between grows or shrinks
evenly, so that nothing is highest there."""

LEAST = {FIRST: 1, SECOND: 3, FINAL: 2}
"""How many there must be for another one to be in such a place."""

PHASES = FORWARD, TURN, BACKWARD, EMBEDDINGS, UPDATE = (
    "forward pass",
    "end of the forward pass",
    "backward pass",
    "gradient of the embeddings",
    "update",
)

_FILE = "step_traces.zip"
_DAMAGE = (
    OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, LookupError,
    ValueError, OverflowError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""What reading a damaged archive raises, by the place of the damage."""


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

    @functools.cached_property
    def of_examples(self) -> bool:
        """Whether it grows with the examples of a micro-batch or of a block."""
        return any(name in "ne" for name, _ in self.powers)

    @functools.cached_property
    def of_block(self) -> bool:
        """Whether it grows with the examples of a block."""
        return any(name == "e" for name, _ in self.powers)

    @functools.cached_property
    def of_layers(self) -> bool:
        """Whether it is as wide as something in a layer."""
        return any(name in "haf" for name, _ in self.powers)

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
class Term:
    """How often allocations of a size are alive at a moment, as a function of layers and blocks.

    Attributes:
        size: number of the size.
        policy: in whose blocks they were made; empty outside of blocks.
        counts: how many there are, and how many for every block: whatever the number of layers,
            for each layer of the first policy, and for each of the others.
    """

    size: int
    policy: str
    counts: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is alive when a request has been met, and the next thing to happen is an end.

    Attributes:
        phase: of the step, one of `PHASES`.
        least_layers: with fewer layers there is no such moment.
        block: policy and position (`FIRST`, `SECOND`, `FINAL`) of the block that it is in.
        terms: everything that is alive, but for the model and the optimizer's state.
    """

    phase: str
    least_layers: tuple[tuple[str, int], ...]
    block: tuple[str, int] | None
    terms: tuple[Term, ...]


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """Two optimizer steps in symbols.

    Attributes:
        sizes: by number.
        ends: for each role which of its allocations ends first.
        items: in order.
        moments: those at which most may be alive.
    """

    sizes: tuple[Size, ...]
    ends: tuple[str, ...]
    items: tuple[Item, ...]
    moments: tuple[Moment, ...] = ()

    @functools.cached_property
    def least_layers(self) -> dict[str, int]:
        """How many layers of each kind there must be to write it out."""
        runs = [item for item in self.items if isinstance(item, Repeated)]
        return {
            over: max((-run.more for run in runs if run.over == over), default=0)
            for over in (LAYERS, OTHER_LAYERS, ALL_LAYERS)
        }

    @functools.cached_property
    def policies(self) -> list[str]:
        """Policies that work in blocks, by name."""
        bodies = [item.body if isinstance(item, Repeated) else (item,) for item in self.items]
        inner = (one for body in bodies for one in body)
        return sorted({one.policy for one in inner if isinstance(one, Blocks)})


def traces_to_bytes(traces: Mapping[str, StepTrace]) -> bytes:
    """Write traces: an archive with a file for each, so that one is read without the others."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, trace in sorted(traces.items()):
            text = json_text(_trace_values(trace), separators=(",", ":"))
            archive.writestr(zipfile.ZipInfo(f"{name}.json"), text, zipfile.ZIP_DEFLATED, 9)
    return written.getvalue()


def traces_from_bytes(data: bytes) -> dict[str, StepTrace]:
    """Read what `traces_to_bytes` wrote."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {
            name.removesuffix(".json"): _trace(json.loads(archive.read(name)))
            for name in archive.namelist()
        }


@functools.cache
def _archive() -> zipfile.ZipFile:
    path = resources.files("bertbench.memory.traces").joinpath(_FILE)
    return zipfile.ZipFile(io.BytesIO(path.read_bytes()))


@functools.cache
def read_trace(pattern: str) -> StepTrace | None:
    """One of the traces that come with this package, by `bertbench.memory.traces.step.pattern_of`.

    Raises:
        InputError: the package's file of them is damaged.
    """
    name = f"{pattern}.json"
    try:
        there = name in _archive().namelist()
        return _trace(json.loads(_archive().read(name))) if there else None
    except _DAMAGE as error:
        # The archive has a checksum of each trace, so none that is damaged is taken for whole.
        raise InputError(
            f"damaged ({error})",
            path=str(resources.files("bertbench.memory.traces").joinpath(_FILE)),
            hint="install bertbench again",
        ) from error


def _trace(values: Mapping[str, Any]) -> StepTrace:
    return StepTrace(
        tuple(Size(a, b, tuple(sorted(powers.items()))) for a, b, powers in values["sizes"]),
        tuple(values["ends"]),
        tuple(_items(values["items"])),
        tuple(
            Moment(
                phase,
                tuple((over, count) for over, count in least),
                None if block is None else (block[0], block[1]),
                tuple(
                    Term(size, policy, ((a, b), (c, d), (e, f)))
                    for size, policy, a, b, c, d, e, f in terms
                ),
            )
            for phase, least, block, terms in values["moments"]
        ),
    )


def _trace_values(trace: StepTrace) -> dict[str, Any]:
    return {
        "sizes": [[s.constant_bytes, s.factor, dict(s.powers)] for s in trace.sizes],
        "ends": trace.ends,
        "items": [_item_values(item) for item in trace.items],
        "moments": [
            [
                moment.phase,
                moment.least_layers,
                moment.block,
                [[t.size, t.policy, *(n for pair in t.counts for n in pair)] for t in moment.terms],
            ]
            for moment in trace.moments
        ],
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
