"""A plan that is tried before it is believed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bertbench.core.errors import WorkError
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Workload, published_workload
from bertbench.devices.device import Budget, make_budget
from bertbench.devices.discover import resolve_device
from bertbench.devices.step_time import device_rates
from bertbench.ledger.database import open_ledger
from bertbench.ledger.records import read_rows
from bertbench.plan import verify
from bertbench.plan.planner import Plan, make_plan
from bertbench.plan.verify import verify_plan
from bertbench.trials.trial import Trial
from finetune.errors import InputError

DEVICE = resolve_device("cpu")
BUDGET = make_budget(DEVICE, 400 * MIB_BYTES)
WORKLOAD = published_workload("bert-mini", 128)


def make(spare_bytes: int) -> Plan:
    return make_plan(
        WORKLOAD, 32, BUDGET.budget_bytes, device_rates(DEVICE), device=DEVICE.name,
        spare_bytes=spare_bytes,
    )  # fmt: skip


def simulate(monkeypatch: pytest.MonkeyPatch, *outcomes: str) -> list[tuple[int, Levers]]:
    """Let trials end in turn as told; returns what was tried."""
    tried: list[tuple[int, Levers]] = []

    def measure(
        workload: Workload, levers: Levers, budget: Budget, batches: Sequence[int], **other: Any
    ) -> list[Trial]:
        assert (workload, budget, other) == (WORKLOAD, BUDGET, {"steps": 2, "fresh": True})
        outcome: Any = outcomes[len(tried)]
        tried.append((batches[0], levers))
        peak_bytes = 300 * MIB_BYTES if outcome == "fits" else None
        return [Trial(batches[0], outcome, peak_bytes, 0.5, message="why", fresh=True)]

    monkeypatch.setattr(verify, "measure_batches", measure)
    return tried


def test_a_plan_that_runs_out_makes_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = simulate(monkeypatch, "oom", "oom", "fits")
    attempts: list[Plan] = []
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        plan, trial, refuted = verify_plan(make, BUDGET, ledger, on_attempt=attempts.append)
        assert [row.trial.outcome for row in read_rows(ledger)] == ["oom", "oom", "fits"]
    assert trial.outcome == "fits"
    assert [one.outcome for one in refuted] == ["oom", "oom"]
    assert plan is attempts[-1]
    assert tried == [(p.chosen.micro_batch, p.chosen.levers) for p in attempts]
    peaks = [p.chosen.footprint.peak_bytes for p in attempts]
    for larger, smaller in itertools.pairwise(peaks):
        assert smaller <= larger - 0.02 * BUDGET.budget_bytes
    assert {p.chosen.rows >= 32 for p in attempts} == {True}


def test_a_plan_that_fits_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    simulate(monkeypatch, "fits")
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        plan, _, refuted = verify_plan(make, BUDGET, ledger)
    assert plan.chosen == make(0).chosen
    assert refuted == []


def test_what_is_not_about_memory_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        simulate(monkeypatch, "failed")
        with pytest.raises(WorkError, match="why"):
            verify_plan(make, BUDGET, ledger)
        simulate(monkeypatch, "oom", "oom", "oom", "oom")
        with pytest.raises(WorkError, match="something else uses the device"):
            verify_plan(make, BUDGET, ledger)


def test_what_is_left_free_is_left_free() -> None:
    chosen = make(100 * MIB_BYTES).chosen
    assert chosen.footprint.peak_bytes <= 300 * MIB_BYTES < make(0).chosen.footprint.peak_bytes
    with pytest.raises(InputError, match=r"does not fit in 100 MiB: .* \d+ MiB more"):
        make(300 * MIB_BYTES)
