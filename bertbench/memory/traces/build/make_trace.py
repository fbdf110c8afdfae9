"""Make step traces out of recordings of small models.

Each recording differs from a base in one respect. One more layer tells what a layer allocates
(`bertbench.memory.traces.build.layers`). Chunks of examples are found by their loops
(`bertbench.memory.traces.loops`). Another value of a dimension tells which sizes grow with it
(`bertbench.memory.traces.build.sizes`). And the order in which allocations are freed is the same in
all layers (`bertbench.memory.traces.build.sites`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from bertbench.memory.traces.build.comparison import matches
from bertbench.memory.traces.build.layers import (
    Repetition,
    find_repetitions,
    joined,
    separated,
)
from bertbench.memory.traces.build.peak_search import find_peaks
from bertbench.memory.traces.build.samples import Sample, StepItem, Steps, UnlikeError, step_items
from bertbench.memory.traces.build.sites import Sites, find_sites
from bertbench.memory.traces.build.sizes import find_sizes
from bertbench.memory.traces.step_requests import layers_of
from bertbench.memory.traces.trace import (
    ALL_LAYERS,
    Allocate,
    Free,
    Item,
    PerChunk,
    PerLayer,
    StepTrace,
)


def build_trace(
    base: Sample, more_layers: Mapping[str, Sample], varied: Mapping[str, Sample]
) -> StepTrace:
    """Make a trace.

    Args:
        base: a sample with at least four layers of each kind.
        more_layers: by kind of layers, a sample with one more layer of that kind.
        varied: by dimension, a sample with another value of it. The number of examples must be one
            that the number of chunks does not divide.

    Returns:
        A trace that, unrolled, is what the samples have recorded.

    Raises:
        UnlikeError: the recordings do not have this structure.
    """
    steps = Steps(base)
    items = step_items(steps)
    repetitions: list[Repetition] = []
    for kind, sample in more_layers.items():
        count = layers_of(base.step.setup)[kind]
        repetitions += find_repetitions(items, step_items(Steps(sample)), kind, count)
    repetitions = separated(joined(repetitions, layers_of(base.step.setup)[ALL_LAYERS]))
    sites = find_sites(steps, items, repetitions)
    sizes, size_of = find_sizes(base, steps, items, varied)
    written = _write_items(steps, items, repetitions, sites, size_of)
    trace = StepTrace(sizes, tuple(sites.free_order.values()), written)
    for sample in (base, *more_layers.values()):
        if not matches(trace, sample):
            number = sample.step.workload.config.num_hidden_layers
            raise UnlikeError(f"with {number} layers the trace is not what was recorded")
    return dataclasses.replace(trace, peaks=find_peaks(trace))


def _write_items(
    steps: Steps,
    items: Sequence[StepItem],
    repetitions: Sequence[Repetition],
    sites: Sites,
    size_of: Sequence[int],
) -> tuple[Item, ...]:
    """Write the items of a trace: of each repetition the first period alone."""
    site_number = {site: number for number, site in enumerate(sites.free_order)}

    def event_at(position: int) -> Allocate | Free:
        event = steps.events[position]
        site = site_number[sites.of_event[position]]
        return Allocate(site, size_of[event]) if event >= 0 else Free(site)

    def item_of(item: StepItem) -> Allocate | Free | PerChunk:
        if item.policy is not None:
            return PerChunk(item.policy, tuple(map(event_at, item.events[: item.length])))
        if item.token[0] == "all":
            return Free(site_number[sites.of_event[item.events[0]]], all_of_layer=True)
        return event_at(item.events[0])

    result: list[Item] = []
    index = 0
    by_left = {one.left: one for one in repetitions}
    while index < len(items):
        one = by_left.get(index)
        if one is None:
            result.append(item_of(items[index]))
            index += 1
            continue
        body = tuple(map(item_of, items[index : index + one.length]))
        result.append(PerLayer(one.kind, one.periods - one.count, body))
        index += one.periods * one.length
    return tuple(result)
