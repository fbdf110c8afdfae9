"""Traces of other optimizers, made out of AdamW's."""

from __future__ import annotations

import collections
import dataclasses
import math

import pytest

from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.memory.traces.archive import read_trace
from bertbench.memory.traces.build.samples import UnlikeError
from bertbench.memory.traces.build.variants import with_optimizer
from bertbench.memory.traces.step_requests import trace_of, unroll_step
from bertbench.memory.traces.trace import StepTrace
from bertbench.trials.measure import TrialSettings, measure_step
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.optimizers import OPTIMIZERS

SETTINGS = [
    (head, policy, steps)
    for head in ("squad", "classifier")
    for policy in ("none", "selective", "full:2", "nested:2+selective")
    for steps in (1, 2)
]


def workload_of(head: str) -> Workload:
    """One in which no two kinds of variables have a size in common."""
    workload = published_workload("bert-mini", 64, head)
    config = dataclasses.replace(
        workload.config, intermediate_size=1000, vocab_size=5000, max_position_embeddings=600
    )
    return dataclasses.replace(workload, config=config)


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
@pytest.mark.parametrize(("head", "policy", "steps"), SETTINGS)
def test_every_variable_has_the_update_of_the_optimizer(
    optimizer: str, head: str, policy: str, steps: int
) -> None:
    """After the decay of a matrix two more tensors of its size, with both optimizers."""
    workload = workload_of(head)
    published = Levers(parse_checkpointing(policy), steps)
    alike = dataclasses.replace(published, optimizer=optimizer)
    requests, left = [], []
    for levers in (published, alike):
        setup = Setup(workload, levers)
        trace = trace_of(setup)
        assert trace is not None
        written = unroll_step(trace, setup.step(70))
        requests.append(collections.Counter(written.sizes))
        ended = {~event for event in written.events if event < 0}
        left.append(len(written.sizes) - len(ended))
    assert left[0] == left[1]  # all gradients are let go of
    more = requests[1] - requests[0]
    assert not requests[0] - requests[1]
    matrices = collections.Counter(
        4 * math.prod(shape)
        for name, shape in workload.parameters.items()
        if workload.trained(name) and len(shape) == 2
    )
    for size_bytes, count in matrices.items():
        assert more[size_bytes] == 2 * 2 * count, size_bytes


def test_a_trace_without_an_update_is_refused() -> None:
    trace = read_trace("squad none at once")
    assert trace is not None
    half = StepTrace(trace.sizes, trace.free_order, trace.items[: len(trace.items) // 3])
    with pytest.raises(UnlikeError, match="0 updates in two steps"):
        with_optimizer(half, "lion")


def test_the_archive_has_what_is_made_of_its_traces() -> None:
    trace, lion = read_trace("squad nested at once"), read_trace("lion squad nested at once")
    assert trace is not None
    assert lion is not None
    made = with_optimizer(trace, "lion")
    assert dataclasses.replace(lion, peaks=()) == made


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("head", ["squad", "classifier", "regressor"])
@pytest.mark.parametrize(("policy", "steps"), [("none", 1), ("nested:2+selective", 2)])
def test_a_real_step_has_the_peak_that_is_predicted(
    optimizer: str, head: str, policy: str, steps: int
) -> None:
    workload = published_workload("bert-mini", 64, head)
    levers = Levers(parse_checkpointing(policy), steps, optimizer=optimizer)
    budget = make_budget(resolve_device("cpu"), GIB_BYTES)
    trial = measure_step(Setup(workload, levers).step(70), budget, TrialSettings(steps=2))
    room = Room("cpu", budget.budget_bytes)
    predicted = predict_memory(Setup(workload, levers), room).footprint(70)
    assert trial.peak_bytes == pytest.approx(predicted.peak_bytes, rel=1e-3)
