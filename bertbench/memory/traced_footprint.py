"""Peak memory of a step by its trace, part by part.

| part | what |
| --- | --- |
| weights | the model's variables |
| optimizer_state | moments, two for each variable with AdamW |
| accumulators | sums of the micro-batches' gradients, where there are several |
| gradients | of variables, where there is one micro-batch, and what they are added up from |
| saved_activations | what grows with the number of layers: kept for the backward pass |
| working_set | of the layer in flight, of embeddings and head: the same for any number of layers |
| inputs | tokens, masks and targets of all micro-batches |
| small_tensors | scalars and the like, and the places that are set aside for them |
| allocator | what is lost in pieces that the allocator hands out whole; only with a replay |
"""

from __future__ import annotations

import collections
import math

from bertbench.core.workload import TrainingStep, Workload
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES, Memory
from bertbench.memory.footprint import Footprint
from bertbench.memory.traces.step_requests import (
    allocated_bytes,
    layers_of,
    replay_step,
    state_requests,
    trace_of,
)
from bertbench.memory.traces.trace import LAYERS, OTHER_LAYERS, UPDATE, StepTrace, Term
from bertbench.memory.traces.traced_peak import candidate_peaks, highest_peak, term_bytes

_SMALL_TENSORS = 22
"""Of each variable, at the peak; of 256 bytes each."""


def traced_footprint(
    step: TrainingStep, memory: Memory, *, replayed: bool = True
) -> Footprint | None:
    """Predict the peak of one optimizer step, part by part.

    Args:
        step: workload, levers and micro-batch.
        memory: what the allocator has.
        replayed: replay the step, so that what the allocator loses is known too.

    Returns:
        The parts at the moment with the most live bytes; None if there is no trace, or if a replay
        runs out of memory.
    """
    workload, trace = step.workload, trace_of(step.setup)
    if trace is None:
        return None
    layers = layers_of(step.setup)
    _, number = highest_peak(candidate_peaks(trace, step), layers)
    peak = trace.peaks[number]
    value_of = term_bytes(trace, step)
    parts: collections.Counter[str] = collections.Counter(
        dict.fromkeys(
            ("weights", "optimizer_state", "accumulators", "gradients", "saved_activations",
             "working_set", "inputs", "small_tensors"),
            0,
        )
    )  # fmt: skip
    parts.update(_state(workload, step.levers.optimizer))
    for term in peak.terms:
        one, all_ = value_of(peak, term)
        constant, *each = (alone * one + per_chunk * all_ for alone, per_chunk in term.counts)
        of_layers = each[0] * layers[LAYERS] + each[1] * layers[OTHER_LAYERS]
        if constant < 0:
            # The layer in flight has given back what it had kept.
            constant, of_layers = 0, of_layers + constant
        of_layer, other = _parts_of(trace, term)
        parts[of_layer] += of_layers
        parts[other] += constant
    beyond = max(parts["gradients"] - _trained_bytes(workload), 0)
    if step.levers.accumulation_steps > 1:
        # They are in the place of gradients from the first micro-batch on.
        parts["accumulators"] = parts["gradients"] - beyond
        parts["gradients"] = beyond
    elif peak.phase == UPDATE:
        parts["gradients"] -= beyond
        parts["working_set"] += beyond
    small = _SMALL_TENSORS * len(workload.parameters) * MIN_ALLOCATION_BYTES
    parts["small_tensors"] = memory.held_bytes + min(small, memory.held_bytes)
    if replayed:
        ending = replay_step(step, memory)
        if not ending.fits:
            return None
        known = sum(parts.values()) - parts["small_tensors"] + memory.held_bytes
        parts["allocator"] = ending.peak_bytes - known
    return Footprint(dict(parts), peak.phase)


def _parts_of(trace: StepTrace, term: Term) -> tuple[str, str]:
    """Parts of what grows with the number of layers, and of what does not."""
    size = trace.sizes[term.size]
    names = {name for name, _ in size.powers}
    if size.of_examples and size.of_layers:
        return "saved_activations", "working_set"
    if "r" in names or size.of_examples:
        return "inputs", "inputs"
    return "gradients", "gradients"


def _state(workload: Workload, optimizer: str) -> dict[str, int]:
    """Bytes of the model's variables and of the optimizer's slots."""
    events, sizes = state_requests(workload, optimizer)
    gone = {~event for event in events if event < 0}
    kept = [allocated_bytes(size) for number, size in enumerate(sizes) if number not in gone]
    weights = len(workload.parameters)
    return {"weights": sum(kept[:weights]), "optimizer_state": sum(kept[weights:])}


def _trained_bytes(workload: Workload) -> int:
    shapes = workload.parameters
    return sum(allocated_bytes(4 * math.prod(shapes[n])) for n in shapes if workload.trained(n))
