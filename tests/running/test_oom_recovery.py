"""A run that runs out of memory continues with a plan that needs less."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from bertbench.cli import main
from bertbench.core.errors import OutOfMemoryError, SteppedDownError, WorkError
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, TrainingStep, Workload, published_workload
from bertbench.hardware.device import Budget, Device, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.hardware.step_time import device_rates
from bertbench.ledger.database import open_ledger
from bertbench.ledger.limit import AT_LEAST, find_limit
from bertbench.ledger.question import Question
from bertbench.ledger.records import find, read_rows, record
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.planning.calibration import note_out_of_memory
from bertbench.planning.candidates import all_levers, cuts
from bertbench.planning.planner import make_plan
from bertbench.planning.requests import PlannedDevice, PlanRequest
from bertbench.running.choose_plan import choose_step
from bertbench.running.oom_recovery import step_down
from bertbench.running.output.steps_down import apply_steps_down
from bertbench.running.settings import RunRequest, RunSettings
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.model_files.checkpoint_files import list_checkpoints
from finetune.model_files.model_folder import RUN_FILE, ModelFiles
from finetune.spec.checkpointing import Checkpointing
from finetune.train.training_loop import read_log
from helpers.command_line import bertbench
from helpers.paths import HELPERS, LIBRARY, REPOSITORY
from reports.measured_cells import collect_cells

WORKLOAD = published_workload("bert-mini", 128)
DEVICE = resolve_device("cpu")
BUDGET = make_budget(DEVICE, 400 * MIB_BYTES)
ERROR = OutOfMemoryError("out of memory in step 8 with something", 7)


@pytest.fixture(autouse=True)
def own_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test's runs leave behind is not for the plans of others."""
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "own" / "ledger.sqlite"))


def settings(folder: Path, **more: Any) -> RunSettings:
    (folder / RUN_FILE).write_text("{}") if not (folder / RUN_FILE).exists() else None
    return RunSettings(
        **{
            "output_dir": folder, "max_seq_length": 128, "do_lower_case": True,
            "train_batch_size": 16, "predict_batch_size": 8, "learning_rate": 1e-4,
            "num_train_epochs": 1.0, "warmup_proportion": 0.1, "save_checkpoints_steps": 100,
            "seed": 1, **more,
        }
    )  # fmt: skip


def request(asked: RunSettings, budget: Budget = BUDGET) -> RunRequest:
    return RunRequest(ModelFiles(Path("config.json"), Path("vocab.txt"), None), asked, budget)


def choose(
    asked: RunSettings, budget: Budget = BUDGET, workload: Workload = WORKLOAD
) -> TrainingStep:
    return choose_step(request(asked, budget), workload)


def follow(asked: RunSettings, chosen: TrainingStep, budget: Budget = BUDGET) -> TrainingStep:
    return apply_steps_down(request(asked, budget), chosen)


def step(micro_batch: int, levers: Levers | None = None) -> TrainingStep:
    return Setup(WORKLOAD, levers or Levers()).step(micro_batch)


def peak_bytes_of(chosen: TrainingStep) -> int:
    room = Room("cpu", BUDGET.budget_bytes)
    return predict_memory(chosen.setup, room).peak_bytes(chosen.micro_batch)


def after(asked: RunSettings, failed: TrainingStep) -> TrainingStep:
    """What the run continues with after a training step that did not fit."""
    with pytest.raises(SteppedDownError, match=r"in step 8 .*continuing from step 7 with"):
        step_down(request(asked), failed, ERROR)
    return follow(asked, failed)


def all_steps_down(asked: RunSettings) -> list[TrainingStep]:
    """What a run goes through if nothing of what is predicted to fit does."""
    first = choose(asked)
    assert follow(asked, first) == first
    chain = [first]
    for _ in range(100):
        with pytest.raises(WorkError) as error:
            step_down(request(asked), chain[-1], ERROR)
        if not isinstance(error.value, SteppedDownError):
            assert "no setting needs less; step 7 is saved" in str(error.value)
            return chain
        # From the first choice the whole chain is gone through.
        chain.append(follow(asked, first))
    raise AssertionError("more than 100 steps down")


def test_every_step_down_needs_less_until_nothing_does(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    chain = all_steps_down(asked)
    peaks = [peak_bytes_of(one) for one in chain]
    assert all(later < peak for peak, later in itertools.pairwise(peaks))
    assert len(chain) <= 30
    # In the end the least that there is has been tried, though it needs hardly less than another.
    assert peaks[-1] > 0.9 * peaks[-2]
    least = min(
        peak_bytes_of(step(batch, dataclasses.replace(setting, accumulation_steps=steps)))
        for setting in all_levers(PlanRequest(16), WORKLOAD)
        for batch, steps in cuts(16)
    )
    assert peaks[-1] == least
    assert all(one.micro_batch * one.levers.accumulation_steps >= 16 for one in chain)
    recorded = json.loads((tmp_path / RUN_FILE).read_text())["steps_down"]
    assert [down["step"] for down in recorded] == [7] * (len(chain) - 1)


def test_what_ran_out_in_a_run_is_not_chosen_for_another_folder(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = (settings(folder) for folder in folders)
    first = choose(one)
    second = after(one, first)
    assert choose(two) != first
    # In the run's own folder the plan leads to what the run had gone on with.
    assert follow(one, choose(one)) == second
    # It is no evidence for more memory, nor for another model.
    larger = make_budget(DEVICE, BUDGET.budget_bytes + MIB_BYTES)
    assert choose(two, larger) == first
    other = dataclasses.replace(WORKLOAD, num_labels=3)
    there = choose(two, workload=other)
    assert (there.micro_batch, there.levers) == (first.micro_batch, first.levers)


def test_a_run_is_no_evidence_for_a_limit(tmp_path: Path) -> None:
    """A certificate would need a process of its own; what the run had tried is tried again."""
    after(settings(tmp_path), step(16))
    after(settings(tmp_path), step(17))
    with open_ledger() as ledger:
        assert find(ledger, Question(BUDGET, Setup(WORKLOAD))) == []
        rows = read_rows(ledger)
    assert collect_cells(rows) == []
    trials = [row.trial for row in rows]
    assert [(trial.batch, trial.outcome, trial.of_run) for trial in trials] == [
        (16, "oom", True), (17, "oom", True),
    ]  # fmt: skip
    assert trials[0].message == "in a run: out of memory in step 8 with something"
    fits = Trial(16, "fits", 1, 1.0, fresh=True)
    limit = find_limit([fits, *trials])
    assert (limit.max_batch, limit.evidence) == (16, AT_LEAST)


def test_host_memory_that_ran_out_is_no_evidence(tmp_path: Path) -> None:
    """The run steps down; other plans for the device do not learn that the setting does not fit."""
    failed = choose(settings(tmp_path))
    on_host = OutOfMemoryError("out of memory in step 8 with something", 7, of_device=False)
    with pytest.raises(SteppedDownError):
        step_down(request(settings(tmp_path)), failed, on_host)
    with open_ledger() as ledger:
        assert read_rows(ledger) == []


def test_of_several_devices_the_ledger_learns_nothing(tmp_path: Path) -> None:
    gpu = Device("gpu", 0, "NVIDIA Test", "GPU-0", 16 << 30, 16 << 30)
    both = dataclasses.replace(gpu, peers=(dataclasses.replace(gpu, index=1, uuid="GPU-1"),))
    note_out_of_memory(Setup(WORKLOAD).step(4), make_budget(both, 4 << 30), "out of memory")
    with open_ledger() as ledger:
        assert read_rows(ledger) == []


def test_a_run_steps_down_where_its_ledger_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ledger.sqlite").write_text("not a ledger")
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "ledger.sqlite"))
    assert after(settings(tmp_path), step(16)) != step(16)
    assert "other plans do not learn of it" in capsys.readouterr().err


def test_a_plan_for_much_more_memory_steps_down_to_the_budget(tmp_path: Path) -> None:
    assert peak_bytes_of(after(settings(tmp_path), step(400))) <= BUDGET.budget_bytes


def test_what_the_user_asks_for_is_kept(tmp_path: Path) -> None:
    asked = settings(tmp_path, checkpointing=Checkpointing("full"), train_batch_size=64)
    levers = Levers(Checkpointing("full"), optimizer="lion")
    smaller = after(asked, step(64, levers))
    assert smaller.micro_batch < 64
    assert dataclasses.replace(smaller.levers, accumulation_steps=1) == levers

    insisted = dataclasses.replace(asked, micro_batch=16)
    with pytest.raises(WorkError, match="step 7 is saved: give a smaller --micro_batch"):
        step_down(request(insisted), step(16, levers), ERROR)
    assert follow(insisted, step(16, levers)) == step(16, levers)


def test_another_demand_or_device_is_another_try(tmp_path: Path) -> None:
    asked, chosen = settings(tmp_path), step(16)
    smaller = after(asked, chosen)
    nested = dataclasses.replace(asked, checkpointing=Checkpointing("nested"))
    assert smaller.levers.checkpointing != nested.checkpointing
    assert follow(nested, chosen) == chosen
    same = dataclasses.replace(asked, checkpointing=smaller.levers.checkpointing)
    assert follow(same, chosen) == smaller
    other = make_budget(dataclasses.replace(DEVICE, name="another"), BUDGET.budget_bytes)
    assert follow(asked, chosen, other) == chosen


def test_what_trials_have_shown_does_not_lead_back(tmp_path: Path) -> None:
    """As after a probe of a device that nobody else used: what has fitted then does not now."""
    levers = Levers(optimizer="lion")
    peak_bytes = peak_bytes_of(step(16, levers))
    budget = make_budget(DEVICE, int(0.95 * peak_bytes))
    with open_ledger() as ledger:
        fitted = Trial(16, "fits", 1, 1.0, fresh=True)
        record(ledger, Question(budget, Setup(WORKLOAD, levers)), fitted)
    asked = settings(tmp_path, allowed=(levers,))
    chosen = choose(asked, budget)
    assert chosen == step(16, levers)
    with pytest.raises(SteppedDownError):
        step_down(request(asked, budget), chosen, ERROR)
    assert peak_bytes_of(follow(asked, chosen, budget)) < peak_bytes


def test_more_memory_or_a_new_beginning_is_another_try(tmp_path: Path) -> None:
    asked, chosen = settings(tmp_path), step(16)
    smaller = after(asked, chosen)
    assert smaller != chosen

    def under(mebibytes: int) -> Budget:
        return make_budget(DEVICE, mebibytes * MIB_BYTES)

    assert follow(asked, chosen, under(410)) == smaller
    assert follow(asked, chosen, under(300)) == smaller
    assert follow(asked, chosen, under(500)) == chosen
    assert follow(dataclasses.replace(asked, overwrite=True), chosen) == chosen
    other = step(8, Levers(accumulation_steps=2))
    assert follow(asked, other) == other


def test_a_plan_for_other_replicas_is_refused(tmp_path: Path) -> None:
    plan = make_plan(
        PlanRequest(16),
        WORKLOAD,
        PlannedDevice("some", "cpu", BUDGET.budget_bytes, device_rates(DEVICE)),
    )
    path = tmp_path / "plan.json"
    values = plan.to_json()
    path.write_text(json.dumps(values))
    asked = settings(tmp_path, plan_file=path)
    assert choose(asked).micro_batch == plan.chosen.step.micro_batch
    values["chosen"]["replicas"] = 2
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"for 2 replicas, not 1.*--use_tpu"):
        choose(asked)
    with pytest.raises(InputError, match=r"batch of 16, not 32.*--target-batch 32"):
        choose(dataclasses.replace(asked, train_batch_size=32))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"steps_down": null}', '{"steps_down": [{"step": 3}]}']
)
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    asked = settings(tmp_path)
    (tmp_path / RUN_FILE).write_text(text)
    if 'step"' in text:
        with pytest.raises(InputError, match="not the record of a run"):
            follow(asked, step(16))
    else:
        # The folder is looked at more closely when it is prepared.
        assert follow(asked, step(16)) == step(16)


DEMO = ["run", "squad", "--demo", "--memory=400MiB", "--num_train_epochs=1.5"]


def stepping_down(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HELPERS / "step_down_run.py", *DEMO, *arguments],
        capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(LIBRARY)])},
    )  # fmt: skip


def test_a_run_goes_on_by_itself_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Even with flags that would begin again, which are those of the first process alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    result = bertbench(*DEMO, f"--output_dir={one}")
    assert result.returncode == 0, result.stderr
    two.mkdir()
    (two / RUN_FILE).write_text("{}")
    result = stepping_down(f"--output_dir={two}", "--overwrite_output_dir", "--resume=false")
    assert result.returncode == 0, result.stderr
    assert "out of memory in step 4 with 1 micro-batch of 8, checkpointing none" in result.stderr
    assert "continuing from step 3 with 1 micro-batch of 8, checkpointing" in result.stderr
    assert "continuing at step 3" in result.stderr

    logs = [read_log(folder / "train_log.jsonl") for folder in (one, two)]
    assert [record.step for record in logs[1]] == [*range(1, len(logs[0]) + 1)]
    losses = [[record.loss for record in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    (prefix,) = {list_checkpoints(folder)[-1].name for folder in (one, two)}
    weights = [tf.train.load_checkpoint(str(folder / prefix)) for folder in (one, two)]
    for name in weights[0].get_variable_to_shape_map():
        np.testing.assert_allclose(*(w.get_tensor(name) for w in weights), rtol=1e-4, atol=1e-5)
    run = json.loads((two / RUN_FILE).read_text())
    (down,) = run["steps_down"]
    assert (down["step"], down["from"]["checkpointing"]) == (3, "none")
    assert down["to"]["checkpointing"] != "none"
    assert run["results"]["levers"]["checkpointing"] == down["to"]["checkpointing"]
    assert len(run["invocations"]) == 2


def test_the_folder_of_a_demo_without_one_is_kept() -> None:
    result = stepping_down()
    assert result.returncode == 0, result.stderr
    assert "continuing at step 3" in result.stderr


def test_in_another_program_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> None:
        raise SteppedDownError("out of memory; continuing from step 3 with less", tmp_path)

    monkeypatch.setattr("bertbench.cli.run._run_squad", run)
    with pytest.raises(SystemExit) as ended:
        main(["run", "squad", "--demo"])
    assert ended.value.code == 1
    assert "with less: the same command continues" in capsys.readouterr().err
