"""Tests of what `import bertbench` offers: names, examples, results as tables, errors."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest

import bertbench
from bertbench.api import run as run_api
from bertbench.api.probe import ProbeResult
from bertbench.api.results import Result
from bertbench.cli import run as run_cli
from bertbench.core.errors import StoppedEarlyError, WorkError
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import Budget, Device
from bertbench.probing.cell import ProbeSettings
from bertbench.trials.outcome import Outcome
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from helpers.paths import REPOSITORY

CPU = Budget(Device("cpu", 0, "a <fast> CPU", None, 1 << 34, 1 << 34), 512 * MIB_BYTES)


def test_names_are_loaded_when_they_are_used() -> None:
    code = (
        "import sys, bertbench\n"
        "loaded = [name for name in sys.modules if name.startswith('bertbench.')]\n"
        "assert not loaded, loaded\n"
        "assert set(bertbench.__all__) <= set(dir(bertbench))\n"
        "import bertbench.probing.cell, bertbench.planning.planner\n"
        "for name in bertbench.__all__: getattr(bertbench, name)\n"
        "assert callable(bertbench.probe) and callable(bertbench.plan)\n"
        "assert callable(bertbench.run) and callable(bertbench.devices)\n"
        "slow = {'tensorflow', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_no_package_has_the_name_of_a_function() -> None:
    """It would take the function's place as soon as it is imported."""
    folders = {path.name for path in (REPOSITORY / "bertbench").iterdir() if path.is_dir()}
    assert not folders & set(bertbench.__all__)


def test_version_and_unknown_names() -> None:
    assert bertbench.__version__ == metadata.version("bertbench")
    with pytest.raises(AttributeError, match="'bertbench' has no attribute 'prob'"):
        _ = bertbench.prob


@pytest.mark.parametrize("name", ["devices", "plan", "probe", "run"])
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "ledger.sqlite"))
    module = importlib.import_module(f"bertbench.api.{name}")
    found = doctest.testmod(module, raise_on_error=False)
    assert found.failed == 0
    assert doctest.DocTestFinder().find(getattr(module, name), name)[0].examples


def test_the_page_shows_what_its_programs_print(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that measure nothing: the first one, and the last one, whose output is not shown."""
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "ledger.sqlite"))
    page = (REPOSITORY / "docs" / "python-api.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown = re.findall(r"```\n\n```\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(programs[0], names)
    assert capsys.readouterr().out == shown[0]
    exec(programs[-1], names)
    assert "mine, sequence length 128" in capsys.readouterr().out


def html_of(result: Result) -> str:
    return result._repr_html_()


def test_devices_are_a_table() -> None:
    found = bertbench.devices()
    assert len(found) == len(found.to_frame()) == len(list(found))
    row = found.to_frame().iloc[-1]
    assert row["device"] == "cpu"
    assert 0 < row["default_budget_bytes"] < row["total_bytes"]


def test_a_plan_is_that_of_the_command_line(tmp_path: Path) -> None:
    found = bertbench.plan("bert-large", 384, 24, on="t4", memory="6GiB")
    chosen = found.plan.chosen
    assert found.plan.budget_bytes == 6144 * MIB_BYTES
    frame = found.to_frame()
    assert list(frame["chosen"]) == [True, *[False] * len(found.plan.alternatives)]
    assert frame["micro_batch"][0] == chosen.step.micro_batch
    assert frame["predicted_peak_bytes"][0] == chosen.footprint.peak_bytes
    assert frame["predicted_step_seconds"].is_monotonic_increasing
    command = ["plan", "--model=bert-large", "--seq-len=384", "--target-batch=24", "--gpu=t4"]
    done = subprocess.run(
        [sys.executable, "-m", "bertbench", *command, "--memory=6GiB", "--json=-"],
        capture_output=True, check=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert f'"predicted_peak_bytes": {chosen.footprint.peak_bytes}' in done.stdout


def test_a_plan_of_a_budget_and_a_workload() -> None:
    workload = published_workload("bert-tiny", 128)
    found = bertbench.plan(workload, on=CPU, allowed=[Levers(optimizer="lion")])
    assert found.plan.chosen.step.levers.optimizer == "lion"
    html = html_of(found)
    assert "a &lt;fast&gt; CPU" in html
    assert "<fast>" not in html
    assert "<table" in html


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bert-tiny",), "sequence length is missing"),
        (("bert-huge", 128), "bert-huge"),
        ((published_workload("bert-tiny", 128), 64), "has sequence length 128, not 64"),
    ],
)
def test_a_wrong_workload_is_named(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bertbench.plan(*arguments, on="t4")
    with pytest.raises(InputError, match=words):
        bertbench.probe(*arguments, on=CPU)


@pytest.mark.parametrize("on", ["RTX 3060", "rtx_3060", "NVIDIA GeForce RTX 3060"])
def test_a_product_is_named_as_for_the_command(on: str) -> None:
    assert bertbench.plan("bert-tiny", 128, on=on).plan.device == "rtx-3060"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"on": "t4", "memory": 0}, "below 1 MiB"),
        ({"on": "t4", "memory": -5}, "not a memory size"),
        ({"on": "tpu"}, "'tpu' is not in the catalogue"),
        ({"on": "t4", "allowed": ()}, "no levers are allowed"),
    ],
)
def test_wrong_input_of_a_plan_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bertbench.plan("bert-tiny", 128, **arguments)


def test_a_probe_is_of_one_device(tmp_path: Path) -> None:
    """Its limit would be another one, and the ledger would take it for that of one device."""
    gpu = Device("gpu", 0, "NVIDIA Test", "GPU-0", 16 << 30, 16 << 30)
    both = dataclasses.replace(gpu, peers=(dataclasses.replace(gpu, index=1, uuid="GPU-1"),))
    ledger = tmp_path / "ledger.sqlite"
    with pytest.raises(InputError, match="a limit is that of one device"):
        bertbench.probe("bert-tiny", 128, on=Budget(both, 1 << 30), ledger=ledger)
    with pytest.raises(InputError, match="all memory of a core"):
        bertbench.probe("bert-tiny", 128, on="tpu:x", memory="1GiB", ledger=ledger)
    assert not ledger.exists()


def test_memory_beside_a_budget_is_refused() -> None:
    with pytest.raises(InputError, match="says its memory already"):
        bertbench.plan("bert-tiny", 128, on=CPU, memory="1GiB")


def test_a_probe_is_certified_and_keeps_its_trials(tmp_path: Path) -> None:
    measured: list[int] = []

    def measure(setup: Setup, budget: Budget, batches, settings, listener, *_):
        measured.extend(batches)
        trials = [
            Trial(batch, "fits", 100 * batch, 0.5, 1.0, fresh=True)
            if batch <= 40
            else Trial(batch, "oom", message="no memory", fresh=True)
            for batch in batches
        ]
        for trial in trials:
            listener.on_trial(trial)
        return trials

    ledger = tmp_path / "ledger.sqlite"
    settings = ProbeSettings(max_batch=64, measure=measure)
    found = bertbench.probe("bert-tiny", 128, on=CPU, settings=settings, ledger=ledger)
    assert (found.max_batch, found.certified) == (40, True)
    frame = found.to_frame()
    assert set(frame["batch"]) == set(measured)
    assert frame[frame["batch"] == 40]["examples_per_second"].item() == 80
    assert (found.budget.device.label, found.budget.budget_bytes) == ("cpu", CPU.budget_bytes)
    assert "batch 40 fits, certified" in html_of(found)
    measured.clear()
    again = bertbench.probe("bert-tiny", 128, on=CPU, settings=settings, ledger=ledger)
    assert again.max_batch == 40
    assert not measured


@pytest.mark.parametrize("outcome", ["oom", "failed"])
def test_a_probe_in_which_nothing_fits(outcome: Outcome, tmp_path: Path) -> None:
    def measure(setup, budget, batches, settings, listener, *_):
        trials = [Trial(batch, outcome, message="no luck", fresh=True) for batch in batches]
        for trial in trials:
            listener.on_trial(trial)
        return trials

    def probe() -> ProbeResult:
        settings = ProbeSettings(measure=measure)
        ledger = tmp_path / "ledger.sqlite"
        return bertbench.probe("bert-tiny", 128, on=CPU, settings=settings, ledger=ledger)

    if outcome == "oom":
        assert probe().max_batch == 0
        assert "batch 1 does not fit" in probe().describe()
    else:
        with pytest.raises(WorkError, match="a trial failed: no luck"):
            probe()


def test_a_run_has_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bertbench.run(
        "squad", output_dir=tmp_path / "out", demo=True, memory="400MiB", num_train_epochs=1,
        tensorboard=False, train_batch_size=8, micro_batch=None,
    )  # fmt: skip
    assert set(found.scores) >= {"exact_match", "f1"}
    frame = found.to_frame()
    assert list(frame["step"]) == list(range(1, len(frame) + 1))
    assert found.summary["steps"] == len(frame)
    assert found.describe().startswith("squad, ")
    assert "<table" in html_of(found)
    assert (found.output_dir / "predictions.json").is_file()
    assert "train" in capsys.readouterr().err


def test_plain_flags_are_those_of_the_command_line() -> None:
    plain = {
        parameter.name
        for command in run_cli.command.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.is_flag and parameter.name != "help"
    }
    assert set(run_api._PLAIN_FLAGS) == plain
    flags = {"demo": False, "resume": False, "seed": None, "a": 1, "b": True}
    assert run_api._arguments(flags) == ["--resume=false", "--a=1", "--b"]


INTERRUPTED = """
import signal, sys, time
asked = 0
def count(number, frame):
    global asked
    asked += 1
signal.signal(signal.SIGINT, count)
print("ready", file=sys.stderr, flush=True)
deadline = time.monotonic() + 60
while not asked and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(1)
print(f"bertbench: asked {asked}", file=sys.stderr, flush=True)
sys.exit(130)
"""

CALLER = """
import signal, sys
from bertbench.api.run import _follow
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &
print(_follow([sys.executable, "-c", sys.argv[1]]), flush=True)
"""


def test_an_interruption_of_the_terminal_reaches_a_run_once() -> None:
    """A second one would end it at once, unsaved."""
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, INTERRUPTED], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as caller:  # fmt: skip
        assert caller.stderr is not None
        assert caller.stderr.readline() == "ready\n"
        os.killpg(caller.pid, signal.SIGINT)
        output, _ = caller.communicate(timeout=120)
    assert output == "(130, 'bertbench: asked 1')\n"


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (-9, WorkError, "killed by SIGKILL; it said: train: 1/10"),
        (130, StoppedEarlyError, "train: 1/10"),
        (2, InputError, "train: 1/10"),
        (1, WorkError, "train: 1/10"),
    ],
)
def test_exit_codes_are_errors(code: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_api._check(code, "train: 1/10")


def test_a_run_that_leaves_no_record_has_its_results(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text('{"f1": 50.0, "predictions": "here"}')
    found = run_api._read("squad", tmp_path / "out", results)
    assert found.scores == {"f1": 50.0}
    assert found.to_frame().empty
    assert found.describe() == "squad, 0 steps: f1 50"


def test_errors_of_a_run_are_raised(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown task 'translate'"):
        bertbench.run("translate", output_dir=tmp_path)
    with pytest.raises(InputError, match=r"No such option .--learning-rates."):
        bertbench.run("squad", output_dir=tmp_path / "a", demo=True, learning_rates=1)
    with pytest.raises(InputError, match="a folder of this machine"):
        bertbench.run("squad", output_dir="gs://bucket/out", demo=True)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises((InputError, WorkError)):
        bertbench.run("squad", output_dir=tmp_path / "full", demo=True, memory="400MiB")
