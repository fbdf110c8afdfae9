"""Find the candidate peaks of a step trace: moments at which the live bytes can be highest.

From one layer to the next the live bytes rise or fall by the same number, and so they do from one
chunk to the next. Two things follow. The peak is in one of the first two layers or in the last one,
and likewise for chunks. And the numbers of live allocations are linear in the numbers of layers and
chunks: a trace that is unrolled for a few small numbers tells them for all others.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from bertbench.core.workload import Levers, Setup, Workload
from bertbench.memory.traces.trace import (
    ALL_LAYERS,
    BACKWARD,
    EMBEDDINGS,
    FINAL,
    FIRST,
    FORWARD,
    LAYERS,
    MIN_COUNT,
    OTHER_LAYERS,
    SECOND,
    TURN,
    UPDATE,
    CandidatePeak,
    PerLayer,
    StepTrace,
    Term,
)
from bertbench.memory.traces.traced_peak import candidate_peaks, highest_peak
from bertbench.memory.traces.unroll import Section, Unrolled

_CHUNKS = 4
"""Number of chunks for which a trace is unrolled; with four the first, the second and the final one
are different chunks."""

_MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 64, 128, 512)
"""Micro-batches for which the highest candidate peaks are kept."""

_Symbol = tuple[int, str]
"""Number of a size, and the policy in whose chunks it was allocated; "" outside of chunks."""

_Counts = Mapping[_Symbol, int]
"""Live allocations of each symbol."""


@dataclasses.dataclass(frozen=True)
class _Moment:
    """A moment of a step, named so that the name is the same for any number of layers and chunks.

    Attributes:
        item: number of the trace's item.
        layer: position of the layer: `FIRST`, `SECOND` or `FINAL`.
        chunk: policy and position of the chunk; None outside of chunks.
        part: see `bertbench.memory.traces.unroll.Section`.
        event: number of the event in its section.
    """

    item: int
    layer: int
    chunk: tuple[str, int] | None
    part: int
    event: int


def find_peaks(trace: StepTrace) -> tuple[CandidatePeak, ...]:
    """Find the candidate peaks of a trace.

    A moment is left out if at another moment no fewer bytes are live, whatever the model.

    Args:
        trace: any `peaks` that it has are ignored.

    Returns:
        Candidate peaks in the order in which they come first.
    """
    repeated = [item for item in trace.items if isinstance(item, PerLayer)]
    least = max([3, *(3 - item.extra for item in repeated)])
    mixed = any(item.kind == OTHER_LAYERS for item in repeated)
    layers = {"": (least, least if mixed else 0)}
    layers[LAYERS] = layers[""][0] + 1, layers[""][1]
    if mixed:
        layers[OTHER_LAYERS] = least, least + 1
    unrolled = {
        (kind, policy): _live_counts(trace, first, others, policy)
        for kind, (first, others) in layers.items()
        for policy in ("", *trace.policies)
    }
    directions = _directions(trace, unrolled["", ""])
    found: dict[CandidatePeak, None] = {}
    for moment in unrolled["", ""]:
        live = {which: moments[moment] for which, moments in unrolled.items()}
        terms = [
            term
            for symbol in sorted({symbol for counts in live.values() for symbol in counts})
            if (term := _term(symbol, live, layers[""])) is not None
        ]
        activations = any(
            trace.sizes[term.size].of_examples and trace.sizes[term.size].of_layers
            for term in terms
        )
        phase = _phase(moment.item, directions) if activations else UPDATE
        found[_peak(trace, phase, moment, terms)] = None
    return _without_lower(found)


def _directions(trace: StepTrace, moments: Mapping[_Moment, _Counts]) -> list[tuple[int, bool]]:
    """Tell the layers of forward passes from those of backward passes.

    In a forward pass the second layer has more live activations than the first.

    Returns:
        Numbers of items, in order, and whether they are layers of a forward pass.
    """

    def activations(live: _Counts) -> int:
        return sum(count for (size, _), count in live.items() if trace.sizes[size].of_examples)

    found: dict[int, int] = {}
    for moment, live in moments.items():
        later = moments.get(dataclasses.replace(moment, layer=SECOND))
        layered = isinstance(trace.items[moment.item], PerLayer)
        if moment.layer == FIRST and later is not None and layered:
            found.setdefault(moment.item, activations(later) - activations(live))
    return [(item, more > 0) for item, more in sorted(found.items()) if more]


def _phase(item: int, directions: Sequence[tuple[int, bool]]) -> str:
    """Name the phase of an item by the layers before and after it."""
    before = [forward for number, forward in directions if number <= item]
    after = [forward for number, forward in directions if number >= item]
    if not before or before[-1]:
        return TURN if before and after and not after[0] else FORWARD
    return BACKWARD if after and not after[0] else EMBEDDINGS


def keep_highest(trace: StepTrace, workloads: Iterable[Workload]) -> StepTrace:
    """Keep the candidate peaks that are highest for some workload, micro-batch and depth.

    These are a few of hundreds. For a model of unusual proportions another moment may be the peak;
    then the peak without a replay is too low.
    """
    found: set[int] = set()
    # The number of micro-batches decides only the size of the inputs, which are small.
    levers = Levers(accumulation_steps=2)
    mixed = any(isinstance(item, PerLayer) and item.kind == OTHER_LAYERS for item in trace.items)
    for workload, micro_batch in itertools.product(workloads, _MICRO_BATCHES):
        peaks = candidate_peaks(trace, Setup(workload, levers).step(micro_batch))
        most = workload.config.num_hidden_layers
        for first in range(1, most) if mixed else (most,):
            layers = {LAYERS: first, OTHER_LAYERS: most - first, ALL_LAYERS: most}
            found.add(highest_peak(peaks, layers)[1])
    return dataclasses.replace(trace, peaks=tuple(trace.peaks[index] for index in sorted(found)))


def _live_counts(
    trace: StepTrace, first: int, others: int, more_chunks: str
) -> dict[_Moment, _Counts]:
    """Count the live allocations before each release.

    Args:
        trace: the trace to unroll.
        first: number of layers with the first policy.
        others: number of the other layers.
        more_chunks: policy that has one chunk more than the others; "" for none.
    """
    chunks = {policy: _CHUNKS + (policy == more_chunks) for policy in trace.policies}
    layers = {LAYERS: first, OTHER_LAYERS: others, ALL_LAYERS: first + others}
    numbers = range(len(trace.sizes))
    unrolled = Unrolled(
        trace, layers, chunks, lambda policy, _: [(number, policy) for number in numbers]
    )
    ends = [section.event for section in unrolled.sections[1:]] + [len(unrolled.events)]
    live: collections.Counter[_Symbol] = collections.Counter()
    moments: dict[_Moment, _Counts] = {}
    for section, end in zip(unrolled.sections, ends, strict=True):
        begin = _begin(section)
        for index in range(section.event, end):
            event = unrolled.events[index]
            live[unrolled.sizes[max(event, ~event)]] += 1 if event >= 0 else -1
            last = index + 1 == end or unrolled.events[index + 1] < 0
            if begin is not None and event >= 0 and last:
                moments[dataclasses.replace(begin, event=index - section.event)] = dict(live)
    return moments


def _begin(section: Section) -> _Moment | None:
    """Name the first moment of a section; None if its layer or chunk has no named position."""

    def position(index: int, count: int) -> int | None:
        return {FIRST: FIRST, SECOND: SECOND, count - 1: FINAL}.get(index)

    layer = position(*section.layer) if section.layer[1] > 1 else FIRST
    chunk = None
    if section.chunk is not None:
        in_loop = position(*section.chunk[1:])
        if in_loop is None:
            return None
        chunk = section.chunk[0], in_loop
    return None if layer is None else _Moment(section.item, layer, chunk, section.part, 0)


def _term(
    symbol: _Symbol,
    live: Mapping[tuple[str, str], _Counts],
    layers: tuple[int, int],
) -> Term | None:
    """Work out how the number of a symbol's live allocations depends on layers and chunks.

    Args:
        symbol: the symbol.
        live: numbers of live allocations at a moment, by the kind of layers and the policy of which
            there is one more.
        layers: numbers of layers of both kinds where there is not one more.

    Returns:
        None if there is never a live allocation.
    """
    size, policy = symbol

    def of_chunks(kind: str) -> tuple[int, int]:
        """Number without chunks, and number for each chunk, with one more layer of a kind."""
        count = live[kind, ""].get(symbol, 0)
        each = live[kind, policy].get(symbol, 0) - count if policy else 0
        return count - _CHUNKS * each, each

    base = of_chunks("")
    slopes = []
    for kind in (LAYERS, OTHER_LAYERS):
        more = of_chunks(kind) if (kind, "") in live else base
        slopes.append((more[0] - base[0], more[1] - base[1]))
    (first, first_each), (other, other_each) = slopes
    constant = (
        base[0] - layers[0] * first - layers[1] * other,
        base[1] - layers[0] * first_each - layers[1] * other_each,
    )
    counts = constant, slopes[0], slopes[1]
    return Term(size, policy, counts) if any(itertools.chain(*counts)) else None


def _peak(trace: StepTrace, phase: str, moment: _Moment, terms: Sequence[Term]) -> CandidatePeak:
    item = trace.items[moment.item]
    least: tuple[tuple[str, int], ...] = ()
    if isinstance(item, PerLayer):
        least = ((item.kind, MIN_COUNT[moment.layer] - item.extra),)
    return CandidatePeak(phase, least, moment.chunk, tuple(terms))


def _without_lower(peaks: Iterable[CandidatePeak]) -> tuple[CandidatePeak, ...]:
    """Leave out peaks that another one is never below."""
    kept: list[CandidatePeak] = []
    for peak in peaks:
        if not any(_covers(other, peak) for other in kept):
            kept = [other for other in kept if not _covers(peak, other)] + [peak]
    return tuple(kept)


def _after(chunk: tuple[str, int]) -> list[tuple[str, int]]:
    """Chunks that exist only if this one does, and that are not larger."""
    policy, position = chunk
    return [(policy, SECOND), (policy, FINAL)] if position == FIRST else []


def _covers(one: CandidatePeak, other: CandidatePeak) -> bool:
    """Whether a peak exists wherever another one does, and is never below it.

    Both are compared for at least one layer of each kind that they count. All chunks together are
    no smaller than one of them.
    """
    least = dict(other.min_layers)
    if any(count > max(least.get(kind, 0), 1) for kind, count in one.min_layers):
        return False
    if one.chunk is not None and other.chunk not in (one.chunk, *_after(one.chunk)):
        return False
    counts = {(term.size, term.policy): term.counts for term in one.terms}
    nothing = ((0, 0),) * 3
    for term in other.terms:
        counts.setdefault((term.size, term.policy), nothing)
    its_counts = {(term.size, term.policy): term.counts for term in other.terms}
    for symbol, (constant, first, others) in counts.items():
        lower = its_counts.get(symbol, nothing)
        slopes = [(a - c, b - d) for (a, b), (c, d) in zip((first, others), lower[1:], strict=True)]
        # With one layer of the first kind; the slopes are for each more.
        at_one = (
            constant[0] - lower[0][0] + slopes[0][0],
            constant[1] - lower[0][1] + slopes[0][1],
        )
        if any(each < 0 or alone + each < 0 for alone, each in (*slopes, at_one)):
            return False
    return True
