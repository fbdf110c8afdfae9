"""Where memory ends for a step that there is a trace of."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.memory.prediction import TracePrediction
from bertbench.memory.room import Room
from bertbench.memory.traces.step_requests import replay_step
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
    setup = Setup(published_workload("bert-tiny", seq_len), Levers(parse_checkpointing(policy)))
    room = Room(kind, mebibytes * MIB_BYTES)
    predicted = TracePrediction(setup, room)
    limit = predicted.max_micro_batch() if at_most is None else predicted.max_micro_batch(at_most)

    def fits(batch: int) -> bool:
        return replay_step(setup.step(batch), room.memory()).fits

    assert all(fits(batch) for batch in range(max(limit - 3, 1), limit + 1))
    if limit != at_most:
        assert not fits(limit + 1)
    assert at_most is None or limit <= at_most
