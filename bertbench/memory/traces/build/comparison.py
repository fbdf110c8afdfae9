"""Compare a step trace with what a real step has asked of the allocator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from bertbench.memory.traces.build.samples import Sample, Steps
from bertbench.memory.traces.step_requests import step_requests, unroll_step
from bertbench.memory.traces.trace import StepTrace
from bertbench.memory.traces.unroll import NothingLiveError

_WORDS_ERROR = 0.02
"""Largest relative error of a size that depends on the number of different words: a trace has the
expected number."""

_COMPARED_BYTES, _MICRO_BATCH_ERROR = 65_536, 0.03
"""For a model that is no sample: smallest request that is compared, as workspaces depend on the
number of cores; and the largest error of a size where gradients are summed by words."""


def matches(trace: StepTrace, sample: Sample) -> bool:
    """Whether a trace, unrolled, is what a sample has recorded.

    All sizes must be the same to the byte, but for those that depend on the number of different
    words.
    """
    steps = Steps(sample)
    try:
        unrolled = unroll_step(trace, sample.step)
    except NothingLiveError:
        return False
    told = _in_any_order(unrolled.events, unrolled.sizes)
    recorded = _in_any_order(steps.events, steps.sizes)

    def alike(one: int | frozenset[int], other: int | frozenset[int]) -> bool:
        if isinstance(one, int) and isinstance(other, int):
            return math.isclose(one, other, rel_tol=_WORDS_ERROR)
        return one == other

    return len(told) == len(recorded) and all(map(alike, told, recorded))


def first_difference(sample: Sample) -> str | None:
    """Find the first large allocation that the package's trace of a step has otherwise.

    Args:
        sample: a recording of any model that there is a trace of.

    Returns:
        What differs; None if nothing does.

    Raises:
        ValueError: there is no trace of the step.
    """
    requests = step_requests(sample.step)
    if requests is None:
        raise ValueError("there is no trace of this step")
    recording = sample.recording
    told = _large(*requests)
    recorded = _large(recording.events, recording.sizes)
    error = _MICRO_BATCH_ERROR if sample.step.levers.accumulation_steps > 1 else 0.0
    for number, (one, other) in enumerate(itertools.zip_longest(told, recorded, fillvalue=0)):
        if not math.isclose(one, other, rel_tol=error):
            return f"large allocation {number} has {other:,} bytes, and {one:,} by the trace"
    return None


def _large(events: Sequence[int], sizes: Sequence[int]) -> list[int]:
    made = (sizes[event] for event in events if event >= 0)
    return [size_bytes for size_bytes in made if size_bytes > _COMPARED_BYTES]


def _in_any_order(events: Sequence[int], sizes: Sequence[int]) -> list[int | frozenset[int]]:
    """Sizes of allocations, and sets of the allocations that are freed one after the other."""
    number: dict[int, int] = {}
    result: list[int | frozenset[int]] = []
    for event in events:
        if event >= 0:
            number[event] = len(number)
            result.append(sizes[event])
        elif result and isinstance(result[-1], frozenset):
            result[-1] |= {number[~event]}
        else:
            result.append(frozenset({number[~event]}))
    return result
