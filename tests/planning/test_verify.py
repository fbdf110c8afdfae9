"""A plan that is tried before it is believed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from bertbench.core.errors import WorkError
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import TrainingStep, published_workload
from bertbench.hardware.device import Budget, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.hardware.step_time import device_rates
from bertbench.ledger.database import open_ledger
from bertbench.ledger.records import read_rows
from bertbench.planning.planner import Plan, make_plan
from bertbench.planning.requests import PlannedDevice, PlanRequest
from bertbench.planning.verify import verify_plan
from bertbench.trials.measure import TrialSettings
from bertbench.trials.trial import Trial
from finetune.errors import InputError

DEVICE = resolve_device("cpu")
BUDGET = make_budget(DEVICE, 400 * MIB_BYTES)
WORKLOAD = published_workload("bert-mini", 128)


def make(spare_bytes: int) -> Plan:
    return make_plan(
        PlanRequest(32),
        WORKLOAD,
        PlannedDevice(
            DEVICE.name, "cpu", BUDGET.budget_bytes, device_rates(DEVICE), spare_bytes=spare_bytes
        ),
    )


class Device:
    """Trials end in turn as told.

    Attributes:
        tried: the steps so far.
    """

    def __init__(self, *outcomes: str) -> None:
        self._outcomes: Any = outcomes
        self.tried: list[TrainingStep] = []

    def measure(self, step: TrainingStep, budget: Budget, settings: TrialSettings) -> Trial:
        assert (step.workload, budget, settings.steps) == (WORKLOAD, BUDGET, 2)
        outcome = self._outcomes[len(self.tried)]
        self.tried.append(step)
        peak_bytes = 300 * MIB_BYTES if outcome == "fits" else None
        return Trial(step.micro_batch, outcome, peak_bytes, 0.5, message="why", fresh=True)


def test_a_plan_that_runs_out_makes_room(tmp_path: Path) -> None:
    device = Device("oom", "oom", "fits")
    attempts: list[Plan] = []
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        plan, trial, refuted = verify_plan(
            make, BUDGET, ledger, on_attempt=attempts.append, measure=device.measure
        )
        assert [row.trial.outcome for row in read_rows(ledger)] == ["oom", "oom", "fits"]
    assert trial.outcome == "fits"
    assert [one.outcome for one in refuted] == ["oom", "oom"]
    assert plan is attempts[-1]
    steps = [p.chosen.step for p in attempts]
    assert device.tried == steps
    peaks = [p.chosen.footprint.peak_bytes for p in attempts]
    for larger, smaller in itertools.pairwise(peaks):
        assert smaller <= larger - 0.02 * BUDGET.budget_bytes
    assert {p.chosen.rows >= 32 for p in attempts} == {True}


def test_a_plan_that_fits_is_kept(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        plan, _, refuted = verify_plan(make, BUDGET, ledger, measure=Device("fits").measure)
    assert plan.chosen == make(0).chosen
    assert refuted == []


@pytest.mark.parametrize(
    ("outcomes", "words"), [(["failed"], "why"), (["oom"] * 4, "something else uses the device")]
)
def test_what_is_not_about_memory_ends_it(tmp_path: Path, outcomes: list[str], words: str) -> None:
    with (
        open_ledger(tmp_path / "l.sqlite") as ledger,
        pytest.raises(WorkError, match=words),
    ):
        verify_plan(make, BUDGET, ledger, measure=Device(*outcomes).measure)


def test_what_is_left_free_is_left_free() -> None:
    chosen = make(100 * MIB_BYTES).chosen
    assert chosen.footprint.peak_bytes <= 300 * MIB_BYTES < make(0).chosen.footprint.peak_bytes
    with pytest.raises(InputError, match=r"does not fit in 100 MiB: .* \d+ MiB more"):
        make(300 * MIB_BYTES)
