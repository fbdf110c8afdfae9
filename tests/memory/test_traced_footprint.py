"""Footprints by step traces: parts that add up, and peaks that were measured."""

from __future__ import annotations

import math

import pytest

from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.memory.allocator.bfc import Memory
from bertbench.memory.allocator.budget import memory_of
from bertbench.memory.traced_footprint import traced_footprint
from bertbench.memory.traces.step_requests import replay_step
from bertbench.memory.traces.trace import UPDATE
from bertbench.memory.traces.traced_peak import traced_peak_bytes
from finetune.spec.checkpointing import parse_checkpointing

PLENTY = memory_of("cpu", 16 * GIB_BYTES)
POLICIES = ("none", "selective", "full", "nested", "selective:4", "nested:3")


def footprint(policy: str, micro_batch: int, steps: int = 1, **other: object) -> dict[str, int]:
    workload = published_workload("bert-base", 128)
    found = traced_footprint(
        Setup(workload, Levers(parse_checkpointing(policy), steps)).step(micro_batch),
        PLENTY,
        **other,  # type: ignore[arg-type]
    )
    assert found is not None
    return dict(found.parts)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("steps", [1, 3])
def test_parts_add_up_to_what_is_alive(policy: str, steps: int) -> None:
    workload = published_workload("bert-base", 128)
    levers = Levers(parse_checkpointing(policy), steps)
    step = Setup(workload, levers).step(13)
    parts = footprint(policy, 13, steps, replayed=False)
    alive_bytes = traced_peak_bytes(step)
    assert sum(parts.values()) - parts["small_tensors"] == alive_bytes
    assert all(size >= 0 for size in parts.values())
    # With a replay, what the allocator loses comes on top.
    exact = footprint(policy, 13, steps)
    peak_bytes = replay_step(step, PLENTY).peak_bytes
    small_bytes = exact["small_tensors"] - PLENTY.held_bytes
    assert sum(exact.values()) == peak_bytes + small_bytes
    assert 0 <= exact["allocator"] < 0.05 * peak_bytes


def test_state_takes_sixteen_bytes_a_trained_parameter() -> None:
    workload = published_workload("bert-base", 128)
    counts = {name: math.prod(shape) for name, shape in workload.parameters.items()}
    trained = sum(count for name, count in counts.items() if workload.trained(name))
    for steps in (1, 4):
        parts = footprint("full", 2, steps, replayed=False)
        assert parts["weights"] == pytest.approx(4 * sum(counts.values()), rel=1e-3)
        assert parts["optimizer_state"] == pytest.approx(8 * trained, rel=1e-3)
        held = parts["accumulators"] if steps > 1 else parts["gradients"]
        assert held == pytest.approx(4 * trained, rel=0.01)


def test_checkpointing_keeps_less_and_holds_more_at_once() -> None:
    parts = {policy: footprint(policy, 32, 2, replayed=False) for policy in POLICIES}
    saved = [parts[policy]["saved_activations"] for policy in ("none", "selective", "full")]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > 5 * saved[2]
    assert parts["full"]["working_set"] > parts["none"]["working_set"]
    # In chunks of a few examples.
    assert parts["nested"]["working_set"] < parts["full"]["working_set"]
    # 12 layers keep their input, a float for every token and dimension.
    assert saved[2] == pytest.approx(12 * 4 * 32 * 128 * 768, rel=0.2)


def test_an_update_may_need_most() -> None:
    workload = published_workload("bert-base", 64)
    found = traced_footprint(Setup(workload, Levers()).step(1), PLENTY, replayed=False)
    assert found is not None
    assert found.phase == UPDATE
    assert found.parts["saved_activations"] == 0


def test_no_trace_and_no_room() -> None:
    workload = published_workload("bert-base", 128)
    assert traced_footprint(Setup(workload, Levers(precision="bf16")).step(4), PLENTY) is None
    assert traced_footprint(Setup(workload, Levers()).step(64), Memory((4 * GIB_BYTES,))) is None
