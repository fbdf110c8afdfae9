"""What trials in the ledger teach a plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bertbench.cli.plan import command
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.hardware.device import Device, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.hardware.step_time import device_rates, predict_step_seconds
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question, versions_key
from bertbench.ledger.records import read_device_rows, record
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.planning.calibration import Calibration, Outcomes, calibrate, read_calibration
from bertbench.planning.planner import make_plan
from bertbench.planning.requests import PlannedDevice, PlanRequest
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing

DEVICE = resolve_device("cpu")
GPU = Device("gpu", 0, "NVIDIA Test", "GPU-1", 16 << 30, 16 << 30)
RATES = device_rates(DEVICE)
WORKLOAD = published_workload("bert-mini", 128)
OTHER = published_workload("bert-tiny", 128, "classifier")
MIB = 400


def peak_on(device_kind: str, setup: Setup, batch: int) -> int:
    return predict_memory(setup, Room(device_kind, MIB * MIB_BYTES)).peak_bytes(batch)


def trial_of(
    workload: Workload, levers: Levers, batch: int, *, slower: float = 1.0, more: float = 1.0
) -> Trial:
    """A trial that fits, with a step so much slower, and a peak so much larger, than predicted."""
    seconds = slower * predict_step_seconds(Setup(workload, levers).step(batch), RATES)
    peak_bytes = more * peak_on("gpu", Setup(workload, levers), batch)
    return Trial(batch, "fits", int(peak_bytes), seconds, fresh=True)


def write(
    path: Path, *trials: tuple[Workload, Levers, Trial], device: Device = DEVICE, mib: int = MIB
) -> None:
    with open_ledger(path) as ledger:
        for workload, levers, trial in trials:
            budget = make_budget(device, mib * MIB_BYTES)
            record(ledger, Question(budget, Setup(workload, levers)), trial)


def test_speed_is_the_median_of_all_trials_on_the_device(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    assert read_calibration(DEVICE, WORKLOAD, RATES, path) == Calibration()
    full = Levers(parse_checkpointing("full"), accumulation_steps=2)
    trials = [
        (workload, levers, trial_of(workload, levers, batch, slower=slower))
        for workload, levers, batch, slower in (
            (WORKLOAD, Levers(), 4, 1.7), (OTHER, full, 8, 9.0), (OTHER, Levers(), 16, 1.6),
            (WORKLOAD, full, 3, 0.1), (WORKLOAD, full, 5, 1.65),
        )
    ]  # fmt: skip
    write(path, *trials[:3])
    write(path, *trials, device=dataclasses.replace(DEVICE, name="another"))
    assert read_calibration(DEVICE, WORKLOAD, RATES, path).trials == 0
    write(path, *trials[3:], (WORKLOAD, full, Trial(9, "failed", None, None, message="no")))
    found = read_calibration(DEVICE, WORKLOAD, RATES, path)
    assert found.trials == 5
    assert found.time_factor == pytest.approx(1.65)
    assert found.curve == ()
    assert found.seconds(2.0, 7) == pytest.approx(3.3)


def test_the_curve_of_a_workload_is_learnt(tmp_path: Path) -> None:
    """Medians within a factor of two of the micro-batch, and between them by its logarithm."""
    path = tmp_path / "ledger.sqlite"
    trials = [
        (workload, Levers(), trial_of(workload, Levers(), batch, slower=slower))
        for workload, batch, slower in (
            (OTHER, 1, 7.0), (OTHER, 4, 7.0), (WORKLOAD, 2, 3.0), (WORKLOAD, 8, 1.2),
            (WORKLOAD, 9, 1.0), (WORKLOAD, 10, 0.1), (WORKLOAD, 32, 2.0),
        )
    ]  # fmt: skip
    write(path, *trials[:5], device=GPU)
    assert read_calibration(GPU, WORKLOAD, RATES, path).curve == ()
    write(path, *trials[5:], device=GPU)
    found = read_calibration(GPU, WORKLOAD, RATES, path)
    assert [batch for batch, _ in found.curve] == [2, 9, 32]
    assert [factor for _, factor in found.curve] == pytest.approx([3.0, 1.0, 2.0])
    seconds = [found.seconds(10.0, batch) for batch in (1, 2, 9, 17, 32, 500)]
    assert seconds == pytest.approx([30, 30, 10, 15.0, 20, 20], rel=0.01)
    # Another workload's times say nothing of a curve.
    assert read_calibration(GPU, OTHER, RATES, path).curve == ()
    # On a CPU other programs are in the way of some trials and not of others.
    write(path, *trials)
    found = read_calibration(DEVICE, WORKLOAD, RATES, path)
    assert (found.curve, found.trials) == ((), 7)


def test_a_plan_follows_the_measured_curve() -> None:
    def micro_batch(*curve: tuple[float, float]) -> int:
        return make_plan(
            PlanRequest(32, policies=[parse_checkpointing("none")]),
            WORKLOAD,
            PlannedDevice("some", "cpu", MIB * MIB_BYTES, RATES),
            Calibration(curve=curve),
        ).chosen.step.micro_batch

    assert micro_batch((1.0, 1.0), (16.0, 4.0)) == 1
    assert micro_batch((1.0, 4.0), (16.0, 1.0)) == 16


def test_what_has_fitted_fits_and_what_has_run_out_does_not(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    oom = Trial(33, "oom", message="OOM", fresh=True)
    write(path, (WORKLOAD, Levers(), Trial(32, "fits", 1, 1.0, fresh=True)),
          (WORKLOAD, Levers(), oom), (OTHER, Levers(), dataclasses.replace(oom, batch=1)),
          (WORKLOAD, Levers(), dataclasses.replace(oom, batch=34, fresh=False)))  # fmt: skip
    write(path, (WORKLOAD, Levers(), dataclasses.replace(oom, batch=32)), mib=300)
    found = read_calibration(DEVICE, WORKLOAD, RATES, path)

    def fits(batch: int, mib: int, levers: Levers | None = None) -> bool | None:
        return found.fits(levers or Levers(), batch, mib * MIB_BYTES)

    assert [fits(32, mib) for mib in (100, 300, 301, 400, 401, 441, 900)] == [
        False, False, None, True, None, True, True,
    ]  # fmt: skip
    assert [fits(33, mib) for mib in (400, 401)] == [False, None]
    assert fits(1, 300) is None
    assert fits(34, 300) is None
    assert fits(32, 400, Levers(accumulation_steps=2)) is None
    # A budget in which it has fitted, below one in which it has not.
    odd = Calibration(outcomes={(Levers(), 1): Outcomes(frozenset({500}), frozenset({600}))})
    assert [odd.fits(Levers(), 1, size) for size in (499, 500, 501, 600, 601)] == [
        False, True, False, False, True,
    ]  # fmt: skip


def test_the_newest_trial_of_a_budget_counts_and_others_do_not_crowd_it_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    oom, fit = Trial(8, "oom", message="OOM", fresh=True), Trial(8, "fits", 1, 1.0, fresh=True)
    for trial, expected in ((oom, False), (fit, True), (oom, False)):
        write(path, (WORKLOAD, Levers(), trial))
        with open_ledger(path) as ledger:
            for batch in range(1, 5):
                other = dataclasses.replace(fit, batch=batch)
                record(ledger, Question(make_budget(DEVICE, MIB * MIB_BYTES), Setup(OTHER)), other)
            rows = read_device_rows(ledger, DEVICE, versions_key(), WORKLOAD, 2)
        assert len([row for row in rows if row.model == OTHER.model]) == 2
        found = calibrate(rows, WORKLOAD, RATES, "cpu")
        assert found.fits(Levers(), 8, MIB * MIB_BYTES) is expected


def test_a_plan_believes_trials_before_predictions() -> None:
    def plan(calibration: Calibration | None = None, replicas: int = 1) -> tuple[int, Levers]:
        chosen = make_plan(
            PlanRequest(32),
            WORKLOAD,
            PlannedDevice("some", "cpu", MIB * MIB_BYTES, RATES, replicas=replicas),
            calibration,
        ).chosen
        return chosen.step.micro_batch, chosen.step.levers

    batch, levers = plan()

    def ran_out(batch: int, levers: Levers) -> Calibration:
        budgets = frozenset({MIB * MIB_BYTES})
        return Calibration(outcomes={(levers, batch): Outcomes(exceeds_bytes=budgets)})

    refuted = ran_out(batch, levers)
    assert plan(refuted) != (batch, levers)
    rejected = make_plan(
        PlanRequest(32), WORKLOAD, PlannedDevice("some", "cpu", MIB * MIB_BYTES, RATES), refuted
    ).rejected
    assert "ran out of memory before" in [rejection.why for rejection in rejected]
    # Too much by the prediction, but it has been seen to fit.
    assert peak_on("cpu", Setup(WORKLOAD), 32) > MIB * MIB_BYTES
    seen = Calibration(outcomes={(Levers(), 32): Outcomes(frozenset({MIB * MIB_BYTES}))})
    assert plan(seen) == (32, Levers())
    # One alone says nothing of replicas that add up their gradients.
    of_two = plan(replicas=2)
    assert plan(ran_out(*of_two), replicas=2) == of_two


def test_the_margin_of_a_gpu_is_its_measured_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    trials = [
        (WORKLOAD, Levers(), trial_of(WORKLOAD, Levers(), batch, more=1 + batch / 1000))
        for batch in range(1, 9)
    ]
    write(path, *trials[:-1], device=GPU)
    assert read_calibration(GPU, WORKLOAD, RATES, path).margin is None
    write(path, trials[-1], device=GPU)
    margin = read_calibration(GPU, WORKLOAD, RATES, path).margin
    assert margin == pytest.approx(0.018, abs=1e-5)
    less = [(WORKLOAD, Levers(), trial_of(WORKLOAD, Levers(), n, more=0.9)) for n in range(1, 9)]
    write(tmp_path / "less.sqlite", *less, device=GPU)
    assert read_calibration(GPU, WORKLOAD, RATES, tmp_path / "less.sqlite").margin == 0.01

    peak_bytes = predict_memory(Setup(WORKLOAD), Room("gpu", 0)).peak_bytes(32)

    def chosen(margin: float | None) -> int:
        return make_plan(
            PlanRequest(32, policies=[parse_checkpointing("none")]),
            WORKLOAD,
            PlannedDevice("some", "gpu", int(1.07 * peak_bytes), RATES),
            Calibration(margin=margin),
        ).chosen.step.micro_batch

    assert [chosen(None), chosen(margin)] == [16, 32]


def test_what_cannot_be_read_is_left_out() -> None:
    with open_ledger(":memory:") as ledger:
        budget = make_budget(DEVICE, MIB * MIB_BYTES)
        record(ledger, Question(budget, Setup(WORKLOAD)), trial_of(WORKLOAD, Levers(), 4))
        ledger.execute("UPDATE trials SET levers_key = ?", (json.dumps({"precision": "int3"}),))
        rows = read_device_rows(ledger, DEVICE, versions_key(), WORKLOAD, 10)
        assert len(rows) == 1
        assert calibrate(rows, WORKLOAD, RATES, "cpu") == Calibration()


def test_the_command_reads_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    write(path, *[(WORKLOAD, Levers(), trial_of(WORKLOAD, Levers(), batch, slower=3.0))
                  for batch in range(1, 6)])  # fmt: skip
    arguments = [
        "--model",
        "bert-mini",
        "--seq-len",
        "128",
        "--memory",
        "400MiB",
        "--device",
        "cpu",
    ]

    def run(*more: str) -> str:
        result = CliRunner().invoke(command, [*arguments, *more], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    assert "Times are as in 5 trials on this device." in run("--ledger", str(path))
    known = json.loads(run("--ledger", str(path), "--json", "-"))
    unknown = json.loads(run("--ledger", str(tmp_path / "none"), "--json", "-"))
    assert (known["timed_trials"], unknown["timed_trials"]) == (5, 0)
    assert known["chosen"]["predicted_step_seconds"] == pytest.approx(
        3 * unknown["chosen"]["predicted_step_seconds"], rel=1e-4
    )
    assert not (tmp_path / "none").exists()
    # A product of the catalogue is another device.
    assert "trials" not in run("--ledger", str(path), "--gpu", "t4")
    path.write_bytes(b"not a database, and long enough to be one" * 50)
    with pytest.raises(InputError, match="not a usable ledger"):
        run("--ledger", str(path))
    monkeypatch.setenv("BERTBENCH_LEDGER", str(path))
    assert "planning without it" in run()


def test_where_all_that_should_fit_has_run_out_that_is_said() -> None:
    seen = {(Levers(), 1): Outcomes(exceeds_bytes=frozenset({512 * MIB_BYTES}))}
    with pytest.raises(InputError, match=r"in 512 MiB ran out of memory before") as error:
        make_plan(
            PlanRequest(1, policies=[parse_checkpointing("none")]),
            published_workload("bert-tiny", 64),
            PlannedDevice("CPU", "cpu", 512 * MIB_BYTES, device_rates(resolve_device("cpu"))),
            Calibration(outcomes=seen),
        )
    assert "smaller target batch" not in str(error.value)
    assert "-" not in str(error.value).partition(";")[0].replace("bert-tiny", "")
