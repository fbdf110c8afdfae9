"""The benchmark for GPUs, where there is none: what it asks, that it goes on, what it writes."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from bertbench.bytes import GIB_BYTES, MIB_BYTES
from bertbench.devices import Budget, Device, make_budget
from bertbench.ledger import read_rows, record, versions_key
from bertbench.ledger_file import open_ledger
from bertbench.trial import Trial
from bertbench.workload import Levers, published_workload
from finetune.checkpointing import parse_checkpointing

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
H100 = Device("gpu", 0, "NVIDIA H100 80GB HBM3", "GPU-1", 80 * GIB_BYTES, 79 * GIB_BYTES)
WORKLOAD = published_workload("bert-tiny", 32)


@pytest.fixture(scope="module")
def measure() -> Iterator[types.ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import measure

        yield measure


@pytest.fixture
def parts(measure: types.ModuleType) -> types.ModuleType:
    return sys.modules["gpu_parts"]


@pytest.fixture
def small(measure: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `--quick` a cell, a plan and little else."""
    scale = dataclasses.replace(
        measure.QUICK,
        memory_mib=96,
        cells=(WORKLOAD,),
        policies=("nested",),
        timed=(WORKLOAD,),
        batches=(2, 4),
        precisions=("float32",),
        compiled=(),
        planned=WORKLOAD,
        targets=(4,),
        budgets_bytes=(16 * MIB_BYTES, 112 * MIB_BYTES),
    )
    monkeypatch.setattr(measure, "QUICK", scale)


def run(measure: types.ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["measure.py", "--quick", "--device", "cpu", *arguments])
    measure.main()


def trials_in(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.sqlite"):
        with open_ledger(path) as ledger:
            count += len(read_rows(ledger))
    return count


def test_a_call_goes_on_where_the_last_one_ended(
    measure: types.ModuleType,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--out", str(tmp_path), "--part", "cells", "speed", "plans", "choice"]
    run(measure, monkeypatch, *asked, "--minutes", "0")
    assert "goes on from here" in capsys.readouterr().err
    assert trials_in(tmp_path) == 0
    assert json.loads((tmp_path / "results.json").read_text())["cells"][0]["max_batch"] is None

    run(measure, monkeypatch, *asked)
    measured = trials_in(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    (cell,) = results["cells"]
    certificate = cell["certificate"]
    assert certificate["fits"]["batch"] == cell["max_batch"] == cell["capped_cpu_max_batch"]
    assert certificate["oom"]["batch"] == cell["max_batch"] + 1
    (peak,) = cell["peaks"]
    assert peak["peak_bytes"] == pytest.approx(peak["capped_cpu_peak_bytes"], rel=0.002)
    assert [row["batch"] for row in results["speed"]] == [2, 4]
    too_little, enough = results["plans"]
    assert too_little["plan"] is None
    assert enough["outcome"] == "fits"
    assert results["choice"][0]["regret"] >= 1.0
    assert results["failures"] == []
    table = (tmp_path / "table.md").read_text()
    assert f"| bert-tiny | 32 | {cell['max_batch']} ({cell['max_batch']}) |" in table
    assert "| 4 | 16 MiB | nothing fits |" in table

    run(measure, monkeypatch, *asked)
    assert trials_in(tmp_path) == measured


def test_without_a_gpu_only_the_quick_form_runs(
    measure: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure.py", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        measure.main()
    assert ended.value.code == 2


def test_as_many_trials_at_a_time_as_the_card_and_the_host_hold(
    measure: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 16)
    # 79 GiB are six times 11,430 MiB with a context of 600 MiB each, and not seven times.
    assert measure.jobs_for(make_budget(H100, 11_430 * MIB_BYTES)) == 6
    assert measure.jobs_for(make_budget(H100, 4 * GIB_BYTES)) == 8
    assert measure.jobs_for(make_budget(H100, 60 * GIB_BYTES)) == 1
    cpu = Device("cpu", 0, "CPU (16 cores)", None, 80 * GIB_BYTES, 80 * GIB_BYTES)
    assert measure.jobs_for(make_budget(cpu, GIB_BYTES)) == 1


def test_the_plan_is_run_beside_the_exact_settings_that_were_fastest(
    parts: types.ModuleType, tmp_path: Path
) -> None:
    budget = make_budget(H100, 11_430 * MIB_BYTES)
    scale = dataclasses.replace(
        parts.FULL, timed=(WORKLOAD,), targets=(16,), policies=("none", "full")
    )
    seconds = {
        ("none", "float32", 16): 1.0,
        ("none", "float32", 8): 0.4,
        ("none", "float32", 4): 0.3,
        ("none", "bf16", 8): 0.01,
        ("full", "float32", 8): 0.45,
        ("full", "float32", 4): 0.2,
    }
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        for (policy, precision, batch), step_seconds in seconds.items():
            levers = Levers(parse_checkpointing(policy), precision=precision)
            trial = Trial(batch, "fits", MIB_BYTES, step_seconds)
            record(ledger, budget, versions_key(), WORKLOAD, levers, trial)
        chosen, *rivals = parts.choice_questions(
            dataclasses.replace(scale, batches=(4, 8, 16)), budget, WORKLOAD, ledger
        )
    assert chosen == parts.plan_question(parts.plan_for(WORKLOAD, 16, budget), budget)
    found = [
        (str(rival.levers.checkpointing), rival.levers.accumulation_steps, rival.batches)
        for rival in rivals
    ]
    # 0.8 s as 2 x 8 and as 4 x 4, then 0.9 s; what is not exact is left out.
    assert found == [("none", 2, (8,)), ("full", 4, (4,)), ("full", 2, (8,))]


def test_the_host_s_memory_is_compared_only_on_gpus(parts: types.ModuleType) -> None:
    def placements(budget: Budget) -> list[str]:
        return [q.levers.placement for q in parts.placement_questions(parts.QUICK, budget)]

    cpu = Device("cpu", 0, "CPU (2 cores)", None, GIB_BYTES, GIB_BYTES)
    assert placements(make_budget(cpu, 512 * MIB_BYTES)) == []
    assert placements(make_budget(H100, 512 * MIB_BYTES)) == ["device", "host"]


def test_one_at_a_time_has_its_turn(measure: types.ModuleType, tmp_path: Path) -> None:
    turn = sys.modules["timed_trial"].turn
    path, entered = str(tmp_path / "lock"), threading.Event()

    def second() -> None:
        with turn(path):
            entered.set()

    with turn(path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join()


def test_a_failure_ends_the_others(measure: types.ModuleType, tmp_path: Path) -> None:
    clock = measure.Clock(60)
    measurement = measure.Measurement(measure.QUICK, None, tmp_path, 2, clock)
    started = threading.Event()

    def fail() -> None:
        started.wait(10)
        raise ValueError("broken")

    def go_on() -> None:
        started.set()
        while True:
            clock.check()

    with pytest.raises(ValueError, match="broken"):
        measure.in_parallel(measurement, "test", 2, [fail, go_on])
