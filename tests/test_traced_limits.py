"""How a probe comes by the limit of a device whose kernels are not those that were traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertbench import probing
from bertbench.allocator_limit import empty_memory, memory_of
from bertbench.bytes import GIB_BYTES, MIB_BYTES
from bertbench.devices import Budget, Device, make_budget
from bertbench.ledger_file import open_ledger
from bertbench.probing import Cell, probe_cell
from bertbench.traced_limits import TracedStep
from bertbench.trial import Trial
from bertbench.workload import Levers, Workload, published_workload
from finetune.checkpointing import parse_checkpointing

GPU = Device("gpu", 0, "Card", "GPU-1", 24 * GIB_BYTES, 23 * GIB_BYTES, driver="1")
BUDGET = make_budget(GPU, 1024 * MIB_BYTES)


def probe(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    policy: str,
    more_share: float,
    more_bytes: int = 0,
) -> tuple[Cell, int]:
    """Probe a GPU that needs more, or less, than the trace says; what its true limit is."""
    workload, levers = published_workload("bert-mini", 128), Levers(parse_checkpointing(policy))
    step = TracedStep(workload, levers, empty_memory(BUDGET))

    def peak_bytes(batch: int) -> int:
        return int(step.peak_bytes(batch) * (1 + more_share)) + more_bytes

    def fits(batch: int) -> bool:
        more = peak_bytes(batch) - step.peak_bytes(batch)
        memory = memory_of("gpu", BUDGET.budget_bytes - more)
        return TracedStep(workload, levers, memory).replayed(batch).fits

    def measured(
        workload: Workload,
        levers: Levers,
        budget: Budget,
        batches: Sequence[int],
        *,
        on_trial: Callable[[Trial], None],
        **_: Any,
    ) -> list[Trial]:
        trials: list[Trial] = []
        for batch in batches:
            outcome = "fits" if fits(batch) else "oom"
            trials.append(Trial(batch, outcome, peak_bytes(batch) if outcome == "fits" else None))
            on_trial(trials[-1])
            if outcome == "oom":
                break
        return trials

    monkeypatch.setattr(probing, "measure_batches", measured)
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        cell = probe_cell(ledger, BUDGET, workload, levers)
    certificate = cell.result.certificate
    assert certificate is not None
    assert certificate.fits is not None
    assert certificate.fits.batch == cell.result.max_batch
    assert fits(cell.result.max_batch)
    assert not fits(cell.result.max_batch + 1)
    assert certificate.oom.batch == cell.result.max_batch + 1
    return cell, sum(trial.outcome == "oom" for trial in cell.result.trials)


@settings(max_examples=40, deadline=None)
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


@pytest.mark.parametrize("policy", ["none", "selective", "full", "nested"])
@pytest.mark.parametrize("more_share", [-0.02, 0.0, 0.01, 0.025])
def test_kernels_with_other_workspaces_cost_one_trial_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy: str, more_share: float
) -> None:
    cell, out_of_memory = probe(monkeypatch, tmp_path, policy, more_share)
    assert cell.result.measured <= 4
    assert out_of_memory <= 2


def test_a_workspace_of_constant_size_is_told_exactly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cell, out_of_memory = probe(monkeypatch, tmp_path, "nested", 0.0, more_bytes=8 * MIB_BYTES)
    assert cell.result.measured == 3
    assert out_of_memory == 1


@pytest.mark.parametrize(("policy", "most"), [("none", 5), ("nested", 14)])
@pytest.mark.parametrize("more_share", [0.06, 0.5])
def test_a_device_that_needs_much_more_is_asked_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy: str, most: int, more_share: float
) -> None:
    """The first trial runs out of memory, and two small ones tell what the trace does not.

    Nothing is recorded here of what they ask for; for layers in blocks peaks alone tell little.
    """
    cell, _ = probe(monkeypatch, tmp_path, policy, more_share)
    first, second, third, *_ = cell.result.trials
    assert first.outcome == "oom"
    assert (second.outcome, third.outcome) == ("fits", "fits")
    assert third.batch < first.batch / 2
    assert cell.result.measured <= most


def test_nothing_is_said_of_a_device_on_which_nothing_fitted() -> None:
    step = TracedStep(published_workload("bert-mini", 128), Levers(), empty_memory(BUDGET))
    limit = step.limit()
    assert limit is not None
    first = step.limit_of_another_device([])
    assert first is not None
    assert 0.9 * limit < first < limit
    assert step.limit_of_another_device([Trial(first, "oom")]) is None
    # A device that needs all of its memory for one example has no larger limit.
    assert step.limit_of_another_device([Trial(1, "fits", 2 * BUDGET.budget_bytes)]) == 1
