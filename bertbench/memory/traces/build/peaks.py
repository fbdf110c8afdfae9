"""Find the peaks of a step trace at which most may be alive, whatever the model and the batch.

Between one layer and the next, and between one chunk and the next, what is alive grows or shrinks
evenly, and so it does with the number of layers and of chunks. So a few small numbers of them, with
symbols for sizes, tell how much is alive at each peak for all others; and only the first layers
and chunks and the last ones can be where it is most.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from bertbench.core.workload import Levers, Setup, Workload
from bertbench.memory.traces.peaks import candidate_peaks, highest_peak
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
from bertbench.memory.traces.unroll import Section, Unrolled

_CHUNKS = 4
"""Enough for first, second and final ones to be different ones."""

_MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 64, 128, 512)

_Symbol = tuple[int, str]
"""Number of a size, and the policy in whose chunks it was asked for."""

_Key = tuple[int, int | None, tuple[str, int] | None, int, int]
"""Item, place of the layer, policy and place of the chunk, part, request: the same for all numbers
of layers and chunks."""


def find_peaks(trace: StepTrace) -> tuple[CandidatePeak, ...]:
    """Find the peaks of a trace, without those at which no more is alive than at another.

    Args:
        trace: any `peaks` that it has are ignored.

    Returns:
        Moments in the order in which they come first.
    """
    runs = [item for item in trace.items if isinstance(item, PerLayer)]
    least = max([3, *(3 - run.extra for run in runs)])
    mixed = any(run.kind == OTHER_LAYERS for run in runs)
    layers = {"": (least, least if mixed else 0)}
    layers[LAYERS] = layers[""][0] + 1, layers[""][1]
    if mixed:
        layers[OTHER_LAYERS] = least, least + 1
    samples = {
        (over, policy): _alive(trace, first, others, policy)
        for over, (first, others) in layers.items()
        for policy in ("", *trace.policies)
    }
    directions = _directions(trace, samples["", ""])
    found: dict[CandidatePeak, None] = {}
    for key in samples["", ""]:
        alive = {sample: peaks[key] for sample, peaks in samples.items()}
        terms = [
            term
            for symbol in sorted({symbol for counts in alive.values() for symbol in counts})
            if (term := _term(symbol, alive, layers[""])) is not None
        ]
        activations = any(
            trace.sizes[term.size].of_examples and trace.sizes[term.size].of_layers
            for term in terms
        )
        phase = _phase(key[0], directions) if activations else UPDATE
        found[_peak(trace, phase, key, terms)] = None
    return _highest(found)


def _directions(
    trace: StepTrace, peaks: Mapping[_Key, Mapping[_Symbol, int]]
) -> list[tuple[int, bool]]:
    """Which items are layers of a forward pass (True) or of a backward pass.

    In a forward pass more is alive in the second layer than in the first.
    """

    def activations(alive: Mapping[_Symbol, int]) -> int:
        return sum(count for (size, _), count in alive.items() if trace.sizes[size].of_examples)

    found: dict[int, int] = {}
    for (item, layer, chunk, part, place), alive in peaks.items():
        later = peaks.get((item, SECOND, chunk, part, place))
        if layer == FIRST and later is not None and isinstance(trace.items[item], PerLayer):
            found.setdefault(item, activations(later) - activations(alive))
    return [(item, more > 0) for item, more in sorted(found.items()) if more]


def _phase(item: int, directions: Sequence[tuple[int, bool]]) -> str:
    before = [forward for number, forward in directions if number <= item]
    after = [forward for number, forward in directions if number >= item]
    if not before or before[-1]:
        return TURN if before and after and not after[0] else FORWARD
    return BACKWARD if after and not after[0] else EMBEDDINGS


def keep_highest(trace: StepTrace, workloads: Iterable[Workload]) -> StepTrace:
    """Keep the peaks that are the highest for some of many workloads, batches and layers.

    A few out of hundreds. Another model, of unusual proportions, may be highest elsewhere; what is
    worked out is then too low.
    """
    found: set[int] = set()
    # What is of all micro-batches is small, however many there are.
    levers = Levers(accumulation_steps=2)
    mixed = any(isinstance(item, PerLayer) and item.kind == OTHER_LAYERS for item in trace.items)
    for workload, micro_batch in itertools.product(workloads, _MICRO_BATCHES):
        peaks = candidate_peaks(trace, Setup(workload, levers).step(micro_batch))
        most = workload.config.num_hidden_layers
        for first in range(1, most) if mixed else (most,):
            layers = {LAYERS: first, OTHER_LAYERS: most - first, ALL_LAYERS: most}
            found.add(highest_peak(peaks, layers)[1])
    return dataclasses.replace(trace, peaks=tuple(trace.peaks[index] for index in sorted(found)))


def _alive(
    trace: StepTrace, first: int, others: int, more_chunks: str
) -> dict[_Key, Mapping[_Symbol, int]]:
    """How often each symbol is alive at the peaks of a small number of layers and chunks."""
    chunks = {policy: _CHUNKS + (policy == more_chunks) for policy in trace.policies}
    layers = {LAYERS: first, OTHER_LAYERS: others, ALL_LAYERS: first + others}
    numbers = range(len(trace.sizes))
    written = Unrolled(
        trace, layers, chunks, lambda policy, _: [(number, policy) for number in numbers]
    )
    ends = [section.event for section in written.sections[1:]] + [len(written.events)]
    alive: collections.Counter[_Symbol] = collections.Counter()
    peaks: dict[_Key, Mapping[_Symbol, int]] = {}
    for section, end in zip(written.sections, ends, strict=True):
        key = _key(section)
        for place in range(section.event, end):
            event = written.events[place]
            alive[written.sizes[max(event, ~event)]] += 1 if event >= 0 else -1
            last = place + 1 == end or written.events[place + 1] < 0
            if key is not None and event >= 0 and last:
                here = (*key, place - section.event)
                peaks[here] = dict(alive)
    return peaks


def _key(section: Section) -> tuple[int, int | None, tuple[str, int] | None, int] | None:
    """Where a section is; None if it is between the second and the final one."""

    def place(index: int, count: int) -> int | None:
        places = {FIRST: FIRST, SECOND: SECOND, count - 1: FINAL}
        return places.get(index)

    layer, chunk = FIRST, None
    if section.layer[1] > 1:
        found = place(*section.layer)
        if found is None:
            return None
        layer = found
    if section.chunk is not None:
        found = place(*section.chunk[1:])
        if found is None:
            return None
        chunk = section.chunk[0], found
    return section.item, layer, chunk, section.part


def _term(
    symbol: _Symbol,
    alive: Mapping[tuple[str, str], Mapping[_Symbol, int]],
    layers: tuple[int, int],
) -> Term | None:
    """Work out how a count depends on layers and chunks; None if it is always 0."""
    size, policy = symbol

    def of_chunks(over: str) -> tuple[int, int]:
        """Count, and count for each chunk, with some number of layers."""
        count = alive[over, ""].get(symbol, 0)
        each = alive[over, policy].get(symbol, 0) - count if policy else 0
        return count - _CHUNKS * each, each

    base = of_chunks("")
    slopes = []
    for over in (LAYERS, OTHER_LAYERS):
        more = of_chunks(over) if (over, "") in alive else base
        slopes.append((more[0] - base[0], more[1] - base[1]))
    (first, first_each), (other, other_each) = slopes
    constant = (
        base[0] - layers[0] * first - layers[1] * other,
        base[1] - layers[0] * first_each - layers[1] * other_each,
    )
    counts = constant, slopes[0], slopes[1]
    return Term(size, policy, counts) if any(itertools.chain(*counts)) else None


def _peak(trace: StepTrace, phase: str, key: _Key, terms: Sequence[Term]) -> CandidatePeak:
    item_number, layer, chunk, _, _ = key
    item = trace.items[item_number]
    least: tuple[tuple[str, int], ...] = ()
    if isinstance(item, PerLayer) and layer is not None:
        least = ((item.kind, MIN_COUNT[layer] - item.extra),)
    return CandidatePeak(phase, least, chunk, tuple(terms))


def _highest(peaks: Iterable[CandidatePeak]) -> tuple[CandidatePeak, ...]:
    """Leave out peaks of which another tells that as much is alive, at least."""
    kept: list[CandidatePeak] = []
    for peak in peaks:
        if not any(_covers(other, peak) for other in kept):
            kept = [other for other in kept if not _covers(peak, other)] + [peak]
    return tuple(kept)


def _after(chunk: tuple[str, int]) -> list[tuple[str, int]]:
    """PerChunk that there are only if there is this one, and that are not larger."""
    policy, place = chunk
    return [(policy, SECOND), (policy, FINAL)] if place == FIRST else []


def _covers(one: CandidatePeak, other: CandidatePeak) -> bool:
    """Whether there is `one` whenever there is `other`, and as much is alive then.

    There is a layer of each kind that is counted, and the chunks together are not smaller than one.
    """
    least = dict(other.min_layers)
    if any(count > max(least.get(over, 0), 1) for over, count in one.min_layers):
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
        # With one layer of the first policy, and for each more.
        at_one = (
            constant[0] - lower[0][0] + slopes[0][0],
            constant[1] - lower[0][1] + slopes[0][1],
        )
        if any(each < 0 or alone + each < 0 for alone, each in (*slopes, at_one)):
            return False
    return True
