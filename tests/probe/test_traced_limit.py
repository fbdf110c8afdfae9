"""Where memory ends for a step that there is a trace of."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, published_workload
from bertbench.memory.allocator.limit import memory_of
from bertbench.probe.traced_limit import TracedStep
from finetune.spec.checkpointing import parse_checkpointing


@settings(max_examples=40)
@given(
    mebibytes=st.integers(90, 600),
    seq_len=st.sampled_from([32, 64, 128]),
    policy=st.sampled_from(["none", "selective", "full"]),
    kind=st.sampled_from(["cpu", "gpu"]),
    at_most=st.none() | st.integers(1, 100),
)
def test_the_limit_is_the_last_of_several_that_fit(
    mebibytes: int, seq_len: int, policy: str, kind: str, at_most: int | None
) -> None:
    workload = published_workload("bert-tiny", seq_len)
    levers = Levers(parse_checkpointing(policy))
    step = TracedStep(workload, levers, memory_of(kind, mebibytes * MIB_BYTES))
    limit = step.limit() if at_most is None else step.limit(at_most)
    assert all(step.replayed(batch).fits for batch in range(max(limit - 3, 1), limit + 1))
    if limit != at_most:
        assert not step.replayed(limit + 1).fits
    assert at_most is None or limit <= at_most
