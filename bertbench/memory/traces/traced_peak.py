"""Peak of a step by its trace, without a replay: in a fraction of a millisecond.

A trace names the moments at which the live bytes can be highest, its candidate peaks. Each of them
is a sum over sizes, so that it is fast to compute for any number of layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from bertbench.core.workload import Levers, Setup, TrainingStep, Workload
from bertbench.memory.traces.archive import read_trace
from bertbench.memory.traces.step_requests import (
    allocated_bytes,
    chunks_of,
    layers_of,
    pattern_of,
    sizes_of,
    state_bytes,
    trace_of,
)
from bertbench.memory.traces.trace import (
    FINAL,
    FIRST,
    LAYERS,
    MIN_COUNT,
    OTHER_LAYERS,
    CandidatePeak,
    StepTrace,
    Term,
)


@dataclasses.dataclass(frozen=True)
class PeakBytes:
    """Live bytes at a candidate peak of a model and a batch, for any number of layers.

    The model and the optimizer's state are not in it.

    Attributes:
        number: of the candidate peak in its trace.
        min_layers: see `bertbench.memory.traces.trace.CandidatePeak`.
        constant_bytes: what does not depend on the number of layers.
        layer_bytes: for each layer of the first policy.
        other_layer_bytes: for each of the other layers.
    """

    number: int
    min_layers: tuple[tuple[str, int], ...]
    constant_bytes: int
    layer_bytes: int
    other_layer_bytes: int

    def live_bytes(self, layers: Mapping[str, int]) -> int:
        """Live bytes with numbers of layers by kind."""
        return (
            self.constant_bytes
            + self.layer_bytes * layers[LAYERS]
            + self.other_layer_bytes * layers[OTHER_LAYERS]
        )


def candidate_peaks(trace: StepTrace, step: TrainingStep) -> list[PeakBytes]:
    """Work out the candidate peaks of a trace for a model and a batch.

    The bytes are those of the allocations. How many more the allocator needs, because it hands
    pieces out whole and leaves small ones free, is known only from a replay.

    Returns:
        The candidate peaks that there are with this number of chunks.
    """
    value_of = term_bytes(trace, step)
    chunks = chunks_of(trace.policies, step.workload.seq_len, step.micro_batch)
    result = []
    for number, peak in enumerate(trace.peaks):
        policy, position = peak.chunk or ("", FIRST)
        if policy and len(chunks[policy]) < MIN_COUNT[position]:
            continue
        totals = [0, 0, 0]
        for term in peak.terms:
            one_bytes, all_bytes = value_of(peak, term)
            for index, (alone, per_chunk) in enumerate(term.counts):
                totals[index] += alone * one_bytes + per_chunk * all_bytes
        result.append(PeakBytes(number, peak.min_layers, *totals))
    return result


def term_bytes(
    trace: StepTrace, step: TrainingStep
) -> Callable[[CandidatePeak, Term], tuple[int, int]]:
    """Give the bytes of what a term counts.

    Returns:
        A function of a candidate peak and one of its terms. It returns the bytes of one allocation,
        and the bytes of one allocation in every chunk together (0 outside of chunks).
    """
    sizes = sizes_of(trace, step)
    chunks = chunks_of(trace.policies, step.workload.seq_len, step.micro_batch)

    @functools.cache
    def allocated(examples: int) -> list[int]:
        return [allocated_bytes(size) for size in sizes(examples)]

    @functools.cache
    def together(policy: str) -> list[int]:
        return [sum(each) for each in zip(*map(allocated, chunks[policy]), strict=True)]

    def value_of(peak: CandidatePeak, term: Term) -> tuple[int, int]:
        if not term.policy:
            return allocated(0)[term.size], 0
        examples = chunks[term.policy]
        # In the final chunk allocations of the chunk before it are live too, and chunks may differ
        # by one example.
        final = peak.chunk == (term.policy, FINAL)
        most = max(examples[-2:]) if final else examples[0]
        return allocated(most)[term.size], together(term.policy)[term.size]

    return value_of


def highest_peak(peaks: Sequence[PeakBytes], layers: Mapping[str, int]) -> tuple[int, int]:
    """Find the highest of the candidate peaks that there are with these numbers of layers.

    Returns:
        Its live bytes, and its number in the trace.
    """
    return max(
        (peak.live_bytes(layers), peak.number)
        for peak in peaks
        if all(layers[kind] >= count for kind, count in peak.min_layers)
    )


@functools.lru_cache(maxsize=4096)
def traced_peak_bytes(step: TrainingStep) -> int | None:
    """Most live bytes of a step, with the model and the optimizer's state.

    A replay finds a little more: the allocator hands some pieces out whole, and some free pieces
    are too small to be used.

    Returns:
        None if there is no trace.
    """
    if trace_of(step.setup) is None:
        return None
    levers = step.levers
    peaks = _peaks(
        pattern_of(step.setup), step.workload, levers.accumulation_steps, step.micro_batch
    )
    live_bytes, _ = highest_peak(peaks, layers_of(step.setup))
    return live_bytes + state_bytes(step.workload, levers.optimizer)


@functools.lru_cache(maxsize=4096)
def _peaks(
    pattern: str, workload: Workload, accumulation_steps: int, micro_batch: int
) -> list[PeakBytes]:
    # Kept by the pattern and not by the levers: a plan asks for `full:1`, `full:2` and so on, which
    # have the same candidate peaks.
    trace = read_trace(pattern)
    assert trace is not None
    setup = Setup(workload, Levers(accumulation_steps=accumulation_steps))
    return candidate_peaks(trace, setup.step(micro_batch))
