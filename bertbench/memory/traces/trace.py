"""The values of a step trace: what a step asks of TensorFlow's allocator, for models of any size.

A *step trace* is the list of allocations and releases of the first two optimizer steps. Sizes are
products of dimensions such as the hidden size. What every layer and every chunk of examples
repeats is written once. `bertbench.memory.traces.step_requests` unrolls a trace: for a model and a
micro-batch it gives the list of all requests, in bytes.

Traces are made from recordings of small models (`bertbench.memory.traces.build.make_trace`). They
come with the package (`bertbench.memory.traces.archive`).

Requests of up to 256 bytes are left out, because `bertbench.memory.allocator.budget` sets small
pieces aside for them. All others are right to the byte, but for the workspaces of some matrix
products, which are freed at once. Those depend on the number of cores and differ by some hundred
kilobytes at most (measured on two cores with TensorFlow 2.21).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

DIMENSIONS = {
    "n": "examples of the micro-batch",
    "e": "examples of the chunk",
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
"""Dimensions that a size can be a product of."""

LAYERS, OTHER_LAYERS, ALL_LAYERS = "layers", "other layers", "all layers"
"""Kinds of layers: those with the first policy of a `Checkpointing`, those with its second policy,
and both together."""

NEWEST, OLDEST, OLDEST_OF_LAYER = "newest", "oldest", "oldest of the last layer"
"""Which live allocation of a site is freed first: the newest, the oldest, or the oldest of those
that the last layer made."""

FIRST, SECOND, FINAL = 0, 1, -1
"""Positions of a layer among layers, or of a chunk among chunks. From the second to the final one
the live bytes rise or fall evenly, so that no layer or chunk between them can have the peak."""

MIN_COUNT = {FIRST: 1, SECOND: 3, FINAL: 2}
"""How many layers or chunks there must be for one to have this position and no other."""

PHASES = FORWARD, TURN, BACKWARD, EMBEDDINGS, UPDATE = (
    "forward pass",
    "end of the forward pass",
    "backward pass",
    "gradient of the embeddings",
    "update",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of an allocation as a formula: `constant_bytes + factor * product of dimensions`.

    Attributes:
        constant_bytes: the part that depends on no dimension.
        factor: bytes for each unit of the product.
        powers: name and power of each dimension in the product.
    """

    constant_bytes: float
    factor: float
    powers: tuple[tuple[str, int], ...]

    @functools.cached_property
    def of_examples(self) -> bool:
        """Whether it grows with the examples of a micro-batch or of a chunk."""
        return any(name in "ne" for name, _ in self.powers)

    @functools.cached_property
    def of_chunk(self) -> bool:
        """Whether it grows with the examples of a chunk."""
        return any(name == "e" for name, _ in self.powers)

    @functools.cached_property
    def of_layers(self) -> bool:
        """Whether it grows with a width of a layer: hidden size, heads or intermediate size."""
        return any(name in "haf" for name, _ in self.powers)

    def size_bytes(self, dimensions: Mapping[str, int]) -> int:
        """Bytes for values of the dimensions."""
        product = math.prod(dimensions[name] ** power for name, power in self.powers)
        return max(round(self.constant_bytes + self.factor * product), 0)


@dataclasses.dataclass(frozen=True)
class Allocate:
    """An allocation.

    Attributes:
        site: number of its *allocation site*. Allocations have the same site if the same code makes
            them, in each layer and each chunk, and the same code frees them. There can be many live
            allocations of a site, for example one for each layer.
        size: number of its size among `StepTrace.sizes`.
    """

    site: int
    size: int


@dataclasses.dataclass(frozen=True)
class Free:
    """The release of an allocation.

    Attributes:
        site: of the allocation; `StepTrace.free_order` says which of its allocations it is.
        all_of_layer: free all that the last layer still has of this site, one for each chunk.
    """

    site: int
    all_of_layer: bool = False


@dataclasses.dataclass(frozen=True)
class PerChunk:
    """Events that are repeated for every chunk of examples.

    Attributes:
        policy: checkpointing policy that works in these chunks.
        body: events of one chunk.
    """

    policy: str
    body: tuple[Allocate | Free, ...]


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """Events that are repeated for every layer of a kind.

    Attributes:
        kind: one of `LAYERS`, `OTHER_LAYERS` and `ALL_LAYERS`.
        extra: repetitions in addition to the number of layers; negative if the first or the last
            layers differ from the others and are written apart.
        body: events of one layer.
    """

    kind: str
    extra: int
    body: tuple[Allocate | Free | PerChunk, ...]


Item = Allocate | Free | PerChunk | PerLayer


@dataclasses.dataclass(frozen=True)
class Term:
    """How many allocations of a size are live at a peak, by the numbers of layers and chunks.

    Attributes:
        size: number of the size.
        policy: policy whose chunks made them; empty outside of chunks.
        counts: three pairs: for the step, for each layer of the first kind, and for each of the
            other kind. A pair has a number, and a number for each chunk.
    """

    size: int
    policy: str
    counts: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class CandidatePeak:
    """A moment of the step at which the live bytes can be highest: a release follows it.

    Attributes:
        phase: one of `PHASES`.
        min_layers: kind and number of the layers that a model needs to have this moment.
        chunk: policy and position (`FIRST`, `SECOND` or `FINAL`) of the chunk that it is in.
        terms: all live allocations, without the model and the optimizer's state.
    """

    phase: str
    min_layers: tuple[tuple[str, int], ...]
    chunk: tuple[str, int] | None
    terms: tuple[Term, ...]


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """Two optimizer steps, for models and batches of any size.

    Attributes:
        sizes: formulas of the sizes, which events name by their numbers.
        free_order: for each site, which of its live allocations is freed first.
        items: events in order.
        peaks: moments that can have the peak.
    """

    sizes: tuple[Size, ...]
    free_order: tuple[str, ...]
    items: tuple[Item, ...]
    peaks: tuple[CandidatePeak, ...] = ()

    @functools.cached_property
    def min_layers(self) -> dict[str, int]:
        """How many layers of each kind a model needs to be unrolled."""
        repeated = [item for item in self.items if isinstance(item, PerLayer)]
        return {
            kind: max((-item.extra for item in repeated if item.kind == kind), default=0)
            for kind in (LAYERS, OTHER_LAYERS, ALL_LAYERS)
        }

    @functools.cached_property
    def policies(self) -> list[str]:
        """Names of the policies that work in chunks."""
        bodies = [item.body if isinstance(item, PerLayer) else (item,) for item in self.items]
        inner = (one for body in bodies for one in body)
        return sorted({one.policy for one in inner if isinstance(one, PerChunk)})
