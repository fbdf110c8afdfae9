"""The probe's command on a simulated device: what it shows, checks, waits for and keeps."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from bertbench.cli import ledger as ledger_cli
from bertbench.cli import probe as probe_cli
from bertbench.cli.views.probe_view import View, build_table, describe_holes, shown
from bertbench.core.errors import WorkError
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, TrainingStep, published_workload
from bertbench.hardware import discover
from bertbench.hardware.device import (
    GPU_CONTEXT_RESERVE_BYTES,
    Budget,
    Device,
    check_alone,
    make_budget,
)
from bertbench.hardware.discover import resolve_device
from bertbench.hardware.lock import devices_held
from bertbench.hardware.step_time import device_rates, predict_step_seconds
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import read_rows, record
from bertbench.memory.allocator.budget import empty_memory
from bertbench.memory.limit_search import largest_batch
from bertbench.memory.traces.step_requests import replay_step
from bertbench.probing.cell import ProbedCell, ProbeSettings, probe_cell
from bertbench.probing.limit_from_trace import NO_HOLES
from bertbench.probing.search import Certificate, SearchResult
from bertbench.probing.time_estimates import default_timeout_seconds, predict_cell_seconds
from bertbench.probing.workers import share_out
from bertbench.trials.measure import TIMEOUT_SECONDS, TrialListener, TrialSettings
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing
from helpers.lock_holder import hold

LIMIT = 21


@dataclasses.dataclass
class Simulation:
    """Trials that are simulated.

    Attributes:
        limits: how many examples fit, by sequence length.
        before: called before a call's trials, with its setup and budget.
        after: called with a call's setup and its trials.
    """

    limits: dict[int, int] = dataclasses.field(default_factory=lambda: {64: LIMIT, 128: 9})
    before: Callable[[Setup, Budget], None] = lambda setup, budget: None
    after: Callable[[Setup, list[Trial]], None] = lambda setup, trials: None

    def measure(
        self,
        setup: Setup,
        budget: Budget,
        batches: Sequence[int],
        settings: TrialSettings,
        listener: TrialListener,
    ) -> list[Trial]:
        assert settings.timeout_seconds >= TIMEOUT_SECONDS
        self.before(setup, budget)
        trials: list[Trial] = []
        for batch in batches:
            trials.append(self.trial(setup, batch))
            listener.on_trial(trials[-1])
            if trials[-1].outcome != "fits":
                break
        self.after(setup, trials)
        return trials

    def trial(self, setup: Setup, batch: int) -> Trial:
        if batch > self.limits[setup.workload.seq_len]:
            return Trial(batch, "oom", seconds=11.0, message="OOM when allocating", fresh=True)
        return Trial(batch, "fits", (50 + batch) * MIB_BYTES, 0.1 * batch, 2.0, fresh=True)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "home" / "ledger.sqlite"))
    return Simulation()


def invoke(arguments: Sequence[str], device: Simulation | None = None) -> Result:
    measure = None if device is None else device.measure
    return CliRunner().invoke(probe_cli.command, arguments, obj=measure)


def probe(tmp_path: Path, device: Simulation | None, *arguments: str) -> Result:
    return invoke(
        ["--models", "bert-tiny", "--device", "cpu", "--memory", "256MiB",
         "--ledger", str(tmp_path / "l.sqlite"), *arguments],
        device,
    )  # fmt: skip


def check(tmp_path: Path, device: Simulation, path: Path, *arguments: str) -> Result:
    return invoke(
        ["--check", str(path), "--ledger", str(tmp_path / "l.sqlite"), *arguments], device
    )


def test_the_file_has_certificates_a_curve_and_versions(tmp_path: Path, device: Simulation) -> None:
    path = tmp_path / "p.json"
    result = probe(tmp_path, device, "--seq-lens", "64,128", "--json", str(path))
    assert result.exit_code == 0, result.output
    values = json.loads(path.read_text())
    assert values["versions"]["tensorflow"].startswith("2.")
    assert [cell["max_batch"] for cell in values["cells"]] == [LIMIT, 9]
    for cell in values["cells"]:
        batches = [point["batch"] for point in cell["curve"]]
        assert batches == sorted(t["batch"] for t in cell["trials"] if t["outcome"] == "fits")
        assert all(point["examples_per_second"] == 10 for point in cell["curve"])
        assert cell["certificate"]["oom"]["batch"] == cell["max_batch"] + 1
    assert "min" in result.output or " s left" in result.output  # an estimate of what is left


def test_certificates_are_checked_by_new_trials(tmp_path: Path, device: Simulation) -> None:
    path, checked = tmp_path / "p.json", tmp_path / "checked.json"
    probe(tmp_path, device, "--seq-lens", "64,128", "--json", str(path))
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        before = len(read_rows(ledger))
    result = check(tmp_path, device, path, "--json", str(checked))
    assert result.exit_code == 0, result.output
    assert result.output.count("holds") == 2
    cells = json.loads(checked.read_text())["cells"]
    assert [cell["confirmed"] for cell in cells] == [True, True]
    assert [t["batch"] for t in cells[0]["trials"]] == [LIMIT, LIMIT + 1]
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        assert len(read_rows(ledger)) == before + 4

    for limit, word in ((LIMIT - 1, "batch 21 runs out of memory"), (LIMIT + 1, "batch 22 fits")):
        device.limits[64] = limit
        result = check(tmp_path, device, path, "--json", str(checked))
        assert isinstance(result.exception, WorkError)
        assert "1 of 2 certificates do not hold" in str(result.exception)
        assert word in str(result.exception)
        cells = json.loads(checked.read_text())["cells"]
        assert [cell["confirmed"] for cell in cells] == [False, True]


def test_a_limit_of_zero_is_checked_too(tmp_path: Path, device: Simulation) -> None:
    device.limits[64] = 0
    path = tmp_path / "p.json"
    probe(tmp_path, device, "--seq-lens", "64", "--json", str(path))
    assert json.loads(path.read_text())["cells"][0]["max_batch"] == 0
    assert check(tmp_path, device, path).exit_code == 0
    refused = check(tmp_path, device, path, "--memory", "1GiB").exception
    assert isinstance(refused, InputError)
    assert "--memory does not go with --check" in str(refused)
    device.limits[64] = 1
    assert isinstance(check(tmp_path, device, path).exception, WorkError)


def oom_of(values: Any) -> Any:
    """The trial that ran out of memory, in the first certificate of a file."""
    return values["cells"][0]["certificate"]["oom"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["device"].update(name="Another CPU"), "measured on Another CPU"),
        (lambda v: v["device"].update(kind="gpu", uuid="GPU-77"), "no GPU"),
        (lambda v: v.update(cells=[]), "no cell has a certificate"),
        (lambda v: v.pop("device"), "not a probe's result"),
        (lambda v: v["cells"][0].update(model="bert-what"), "bert-what"),
        (lambda v: v["cells"].append(v["cells"][0]), "cell 2 (bert-tiny 64) is there twice"),
        (
            lambda v: oom_of(v).update(batch=100_000),
            "cell 1 (bert-tiny 64) has no certificate: batch 21 fits and batch 100000 does not; a "
            "certificate is of 21 and 22; probe it again",
        ),
        (lambda v: oom_of(v).update(batch=LIMIT), "batch 21 fits and batch 21 does not"),
        (lambda v: v["cells"][0]["certificate"].update(fits=None), "is of 0 and 1"),
        (lambda v: oom_of(v).update(fresh=False), "22 was not tried in a fresh process"),
        (lambda v: oom_of(v).update(outcome="fits"), "batch 22 fits"),
        (
            lambda v: oom_of(v).update(
                message="killed by the kernel for want of host memory (/proc/vmstat)"
            ),
            "batch 22 failed (killed by the kernel",
        ),
        (lambda v: v["cells"][0].update(certificate=[]), "not a probe's result"),
        (lambda v: v["cells"][0].update(certificate={}), "not a probe's result"),
        *(
            (lambda v, wrong=wrong: oom_of(v).update(batch=wrong), "not a probe's result")
            for wrong in (0, -5, True, "22", 22.0, None, [22], 2**40)
        ),
        (lambda v: oom_of(v).update(batch=2**64), "beyond 64 bits"),
        (lambda v: oom_of(v).update(seconds=float("nan")), "NaN is not a number"),
        (lambda v: oom_of(v).pop("outcome"), "not a probe's result"),
        (lambda v: oom_of(v).update(outcome="maybe"), "not a probe's result"),
        (lambda v: oom_of(v).update(seconds=-1), "not a probe's result"),
        *(
            (lambda v, wrong=wrong: v["device"].update(budget_bytes=wrong), words)
            for wrong, words in (
                (0, "not a probe's result"),
                (-1, "not a probe's result"),
                (True, "not a probe's result"),
                ("512", "not a probe's result"),
                (5, "below 1 MiB"),
                (2**62, "more than"),
            )
        ),
    ],
)
def test_a_file_that_cannot_be_checked_is_refused(
    tmp_path: Path, device: Simulation, change: Callable[[Any], None], words: str
) -> None:
    path = tmp_path / "p.json"
    probe(tmp_path, device, "--seq-lens", "64", "--json", str(path))
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    result = check(tmp_path, device, path)
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)


def test_what_is_known_is_printed_when_interrupted(tmp_path: Path, device: Simulation) -> None:
    def interrupt(setup: Setup, trials: list[Trial]) -> None:
        if setup.workload.seq_len == 128 and trials[-1].outcome == "fits" and trials[-1].batch > 2:
            raise KeyboardInterrupt

    device.after = interrupt
    path = tmp_path / "p.json"
    result = probe(tmp_path, device, "--seq-lens", "64,128", "--json", str(path))
    assert result.exit_code != 0
    assert [cell["max_batch"] for cell in json.loads(path.read_text())["cells"]] == [LIMIT]
    assert "interrupted at [2/2] bert-tiny 128: batch" in result.output
    again = probe(tmp_path, Simulation(), "--seq-lens", "64,128", "--json", str(path))
    assert "[1/2] bert-tiny 64: known from the ledger" in again.output
    assert [c["max_batch"] for c in json.loads(path.read_text())["cells"]] == [LIMIT, 9]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "no accelerator: probing small models on the CPU under a cap of 512 MiB; for the "),
        (["--device", "cpu"], "probing small models on the CPU under a cap of 512 MiB; for the "),
        (["--models", "bert-tiny"], ""),
        (["--seq-lens", "64"], ""),
    ],
)
def test_a_small_default_grid_is_told_of(
    tmp_path: Path, device: Simulation, monkeypatch: pytest.MonkeyPatch, flags: list[str], told: str
) -> None:
    (cpu,) = [one for one in discover.list_devices() if one.kind == "cpu"]
    monkeypatch.setattr(discover, "list_devices", lambda: [cpu])
    result = invoke([*flags, "--ledger", str(tmp_path / "l.sqlite")], device)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "small models" in line]
    assert [line.partition("paper")[0] for line in lines] == ([told] if told else [])
    for line in lines:
        assert line.endswith("--seq-lens 64,128,256,320,384,512 --memory 12GiB")


def test_a_lock_is_released_by_a_kill(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    path = str(tmp_path / "cpu.lock")
    other = context.Process(target=hold, args=(path, 60.0, events))
    other.start()
    try:
        assert events.get(timeout=60) == "holds"
        third = context.Process(target=hold, args=(path, 0.0, events))
        third.start()
        assert events.get(timeout=60) == "waits"
        other.kill()
        assert events.get(timeout=60) == "holds"
        third.join(60)
    finally:
        other.kill()
        other.join()


@pytest.mark.parametrize("checks", [False, True])
def test_a_second_probe_of_a_device_waits(
    tmp_path: Path, device: Simulation, monkeypatch: pytest.MonkeyPatch, checks: bool
) -> None:
    """With a ledger in another folder too, and other places for what it keeps."""
    file = tmp_path / "p.json"
    if checks:
        probe(tmp_path, device, "--seq-lens", "64", "--json", str(file))
    measured = threading.Event()
    device.before = lambda setup, budget: measured.set()
    results: list[Result] = []

    def second() -> None:
        other = tmp_path / "other"
        monkeypatch.setenv("BERTBENCH_LEDGER", str(other / "ledger.sqlite"))
        monkeypatch.setenv("XDG_STATE_HOME", str(other))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(other))
        monkeypatch.setenv("TMPDIR", str(other))
        results.append(
            check(tmp_path, device, file) if checks else probe(tmp_path, device, "--seq-lens", "64")
        )

    with devices_held([resolve_device("cpu")]):
        thread = threading.Thread(target=second)
        thread.start()
        assert not measured.wait(1.5)
    thread.join(60)
    assert measured.is_set()
    assert f"waiting for another probe of cpu to end (process {os.getpid()})" in results[0].output
    assert results[0].exit_code == 0


def test_a_check_that_fails_refutes_nothing(tmp_path: Path, device: Simulation) -> None:
    path, checked = tmp_path / "p.json", tmp_path / "checked.json"
    probe(tmp_path, device, "--seq-lens", "64,128", "--json", str(path))

    class Crashing(Simulation):
        def trial(self, setup: Setup, batch: int) -> Trial:
            if setup.workload.seq_len == 64:
                return Trial(batch, "failed", message="killed by SIGSEGV")
            return super().trial(setup, batch)

    result = check(tmp_path, Crashing(), path, "--json", str(checked))
    assert isinstance(result.exception, WorkError)
    assert "1 of 2 certificates could not be checked" in str(result.exception)
    assert "killed by SIGSEGV" in str(result.exception)
    assert [c["confirmed"] for c in json.loads(checked.read_text())["cells"]] == [None, True]

    def interrupt(setup: Setup, budget: Budget) -> None:
        if setup.workload.seq_len == 128:
            raise KeyboardInterrupt

    device.before = interrupt
    assert check(tmp_path, device, path, "--json", str(checked)).exit_code != 0
    assert [c["confirmed"] for c in json.loads(checked.read_text())["cells"]] == [True]


def test_a_busy_gpu_is_refused() -> None:
    gib = 1 << 30
    free = Device("gpu", 0, "Card", "GPU-1", 24 * gib, 23 * gib)
    check_alone(free)
    busy = Device("gpu", 0, "Card", "GPU-1", 24 * gib, 20 * gib, ((7, "python", 4 * gib),))
    with pytest.raises(
        InputError, match=r"other processes use gpu:0: .*process 7 \(python\).*--share"
    ):
        check_alone(busy)
    check_alone(Device("cpu", 0, "CPU", None, 24 * gib, 2 * gib))


def test_a_trial_may_take_ten_times_what_the_others_took() -> None:
    trials = [Trial(8, "fits", 1, 4.0, 10.0), Trial(9, "oom")]
    budget = make_budget(resolve_device("cpu"), 256 * MIB_BYTES)
    setup = Setup(published_workload("bert-tiny", 64))

    def timeout(step: TrainingStep, trials: Sequence[Trial]) -> float:
        return default_timeout_seconds(budget, step, trials, steps=3)

    assert timeout(setup.step(50), []) == TIMEOUT_SECONDS
    assert timeout(setup.step(16), trials) == TIMEOUT_SECONDS
    assert timeout(setup.step(538), trials) == pytest.approx(10 * 0.5 * 538 * 6)
    # The first trial of a cell may be the limit itself, whose step takes minutes.
    large = Setup(published_workload("bert-large", 384), Levers(parse_checkpointing("nested")))
    seconds = predict_step_seconds(large.step(120), device_rates(budget.device))
    assert seconds > 100
    assert timeout(large.step(120), []) == pytest.approx(10 * seconds * 6)


def finished(batch: int, seq_len: int, seconds: float = 40.0) -> ProbedCell:
    fits = Trial(batch, "fits", 11_000 * MIB_BYTES, 12.5, 30.0, fresh=True)
    oom = Trial(batch + 1, "oom", message="OOM", fresh=True)
    result = SearchResult(batch, Certificate(fits, oom), "oom", (fits, oom), 2)
    return ProbedCell(Setup(published_workload("bert-large", seq_len)), result, seconds)


def test_the_table_fits_80_columns_beside_the_published_one() -> None:
    workloads = [published_workload("bert-large", seq_len) for seq_len in (320, 384, 512)]
    table = build_table({0: finished(12, 320), 1: finished(10, 384)}, workloads)
    console = Console(width=200, highlight=False)
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[-3:] == ["certified", "1", "12.00"]
    assert lines[2].split()[-3:] == ["certified", "0", "-"]
    assert lines[3].split() == ["bert-large", "512"]


def test_the_live_view_says_what_runs_and_how_long_it_takes() -> None:
    workloads = [published_workload("bert-large", seq_len) for seq_len in (320, 384, 512)]
    view = View(workloads, [20.0, 20.0, 50.0])
    assert view.left_seconds() == pytest.approx(90, abs=1)
    view.begin(0, "gpu:0")
    view.cell(0, finished(12, 320))
    # The first cell took twice as long as was thought.
    assert view.left_seconds() == pytest.approx(140, abs=1)
    view.begin(1, "gpu:0")
    view.attempt(1, [3, 8])
    view.trial(1, Trial(3, "fits", 5000, 1.0))
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        console.print(view)
    assert "[2/3] bert-large 384: trying batch 8, 0 s  3 ✓" in captured.get()
    assert "about 2 min 20 s left" in captured.get()
    with shown(workloads, [1.0, 1.0, 1.0]) as plain:
        assert plain.live is None  # the tests' standard error is no terminal


def two_gpus(monkeypatch: pytest.MonkeyPatch, *changes: dict[str, Any]) -> None:
    gib = 1 << 30
    cards = [Device("gpu", n, "Card", f"GPU-{n}", 24 * gib, 23 * gib, driver="1") for n in range(2)]
    for number, change in enumerate(changes):
        cards[number] = dataclasses.replace(cards[number], **change)
    monkeypatch.setattr(discover, "list_devices", lambda: cards)


def test_like_gpus_share_the_cells(
    tmp_path: Path, device: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_gpus(monkeypatch, {"free_bytes": 22 << 30})
    both = threading.Barrier(2)
    used: dict[int, set[str]] = {64: set(), 128: set()}

    def together(setup: Setup, budget: Budget) -> None:
        if not used[setup.workload.seq_len]:
            both.wait(60)  # passes only when the other card works too
        used[setup.workload.seq_len].add(budget.device.label)

    device.before = together
    path = tmp_path / "p.json"
    result = invoke(
        ["--models", "bert-tiny", "--seq-lens", "64,128", "--device", "gpu:0,gpu:1",
         "--ledger", str(tmp_path / "l.sqlite"), "--json", str(path)],
        device,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(map(sorted, used.values())) == [["gpu:0"], ["gpu:1"]]
    values = json.loads(path.read_text())
    assert [cell["max_batch"] for cell in values["cells"]] == [LIMIT, 9]
    assert [cell["seq_len"] for cell in values["cells"]] == [64, 128]
    # What fits on the fuller card counts for both.
    sizes = {d["budget_bytes"] for d in (values["device"], *values["more_devices"])}
    assert sizes == {(22 << 30) - GPU_CONTEXT_RESERVE_BYTES}
    assert "gpu:1 bert-tiny" in result.output


@pytest.mark.parametrize(
    ("names", "change", "words"),
    [
        ("gpu:0,gpu:0", {}, "names a device twice"),
        ("gpu:0,gpu:1", {"name": "Other"}, "several products"),
        ("gpu:0,gpu:7", {}, "no device 'gpu:7'"),
        ("gpu:0,gpu:1", {"free_bytes": 2 << 30}, "other processes use gpu:0"),
    ],
)
def test_devices_that_cannot_share_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, change: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "home" / "ledger.sqlite"))
    two_gpus(monkeypatch, change)
    result = probe(tmp_path, None, "--device", names, "--memory", "1GiB")
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)


def test_a_failure_of_one_worker_ends_the_others() -> None:
    done: list[int] = []

    def work(worker: str, index: int, poll: Callable[[], None]) -> None:
        if worker == "bad":
            raise OSError("no disk")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            poll()
            time.sleep(0.01)
        done.append(index)

    with pytest.raises(OSError, match="no disk"):
        share_out(5, ["bad", "good"], work)
    assert done == []
    share_out(3, ["one"], lambda worker, index, poll: done.append(index))
    assert done == [0, 1, 2]


def test_the_estimate_of_a_cell_grows_with_the_model() -> None:
    budget = make_budget(resolve_device("cpu"), 2048 * MIB_BYTES)
    seconds = [
        predict_cell_seconds(budget, Setup(published_workload(model, 128)))
        for model in ("bert-mini", "bert-small", "bert-base")
    ]
    # Starts, and the allocator's wait, are in each; in the last one hardly a batch fits.
    assert min(seconds) > 30
    assert seconds[0] < seconds[1]


def ledger(tmp_path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        ledger_cli.command, [*arguments, "--ledger", str(tmp_path / "l.sqlite")]
    )


def test_a_list_tells_heads_apart_where_there_are_several(tmp_path: Path) -> None:
    budget = make_budget(resolve_device("cpu"), 512 * MIB_BYTES)
    for head, named in (("squad", False), ("classifier", True)):
        with open_ledger(tmp_path / "l.sqlite") as open_:
            workload = published_workload("bert-tiny", 64, head)
            record(open_, Question(budget, Setup(workload)), Trial(1, "fits", 1))
        for flags in ((), ("--trials",)):
            shown_ = ledger(tmp_path, "list", *flags).output
            assert ("bert-tiny squad" in shown_) is named
            assert ("bert-tiny classifier" in shown_) is named


def test_the_ledger_is_listed_exported_and_pruned(tmp_path: Path, device: Simulation) -> None:
    import pandas as pd

    assert isinstance(ledger(tmp_path, "list").exception, InputError)
    assert not (tmp_path / "l.sqlite").exists()
    probe(tmp_path, device, "--seq-lens", "64,128")
    with open_ledger(tmp_path / "l.sqlite") as open_:
        rows = read_rows(open_)
    result = ledger(tmp_path, "list", "--json", str(tmp_path / "l.json"))
    assert f"{len(rows)} trials of 2 cells" in " ".join(result.output.split())
    values = json.loads((tmp_path / "l.json").read_text())
    limits_found = [
        (c["seq_len"], c["max_batch"], c["smallest_out_of_memory"]) for c in values["cells"]
    ]
    assert limits_found == [(64, LIMIT, LIMIT + 1), (128, 9, 10)]
    assert len(values["trials"]) == len(rows)
    assert "oom" in ledger(tmp_path, "list", "--trials").output

    readers = {"csv": pd.read_csv, "parquet": pd.read_parquet, "json": pd.read_json}
    for ending, read in readers.items():
        path = tmp_path / f"trials.{ending}"
        assert ledger(tmp_path, "export", str(path)).exit_code == 0
        frame = read(path)
        assert path.stat().st_mode == (tmp_path / "l.json").stat().st_mode
        assert list(frame["batch"]) == [row.trial.batch for row in rows]
        assert set(frame["checkpointing"]) == {"none"}
        peaks = [row.trial.peak_bytes for row in rows]
        assert [None if pd.isna(x) else int(x) for x in frame["peak_bytes"]] == peaks
        before = path.read_bytes()
        assert isinstance(ledger(tmp_path, "export", str(path)).exception, InputError)
        assert path.read_bytes() == before
        assert ledger(tmp_path, "export", str(path), "--force").exit_code == 0
    assert isinstance(ledger(tmp_path, "export", str(tmp_path / "x.doc")).exception, InputError)
    names = sorted(path.name for path in tmp_path.glob("*trials*"))
    assert names == ["trials.csv", "trials.json", "trials.parquet"]

    assert isinstance(ledger(tmp_path, "prune").exception, InputError)
    for days in ("1000000", "nan", "-1"):
        assert ledger(tmp_path, "prune", "--older-than", days).exit_code == 2
    assert ": 0 trials match" in ledger(tmp_path, "prune", "--failed").output
    assert "deleted 0 trials" in ledger(tmp_path, "prune", "--older-than", "1", "--yes").output
    assert "deleted 0 trials" in ledger(tmp_path, "prune", "--other-versions", "--yes").output
    assert f": {len(rows)} trials match" in ledger(tmp_path, "prune", "--all").output
    assert f"deleted {len(rows)} trials" in ledger(tmp_path, "prune", "--all", "--yes").output
    with open_ledger(tmp_path / "l.sqlite") as open_:
        assert read_rows(open_) == []


@pytest.mark.parametrize(("off", "most"), [(0, 2), (3, 12), (-3, 12)])
def test_an_unknown_cell_takes_two_trials_where_a_trace_tells_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: int, most: int
) -> None:
    """And is found all the same where the trace is wrong."""
    budget = make_budget(resolve_device("cpu"), 128 * MIB_BYTES)
    workload = published_workload("bert-tiny", 64)
    memory = empty_memory(budget)
    limit = largest_batch(
        lambda batch: replay_step(Setup(workload).step(batch), memory),
        memory.total_bytes,
        begin=1,
        at_most=1000,
    )
    assert limit is not None
    assert limit > 10

    def measure(
        setup: Setup, budget: Budget, batches: Sequence[int], settings: TrialSettings,
        listener: TrialListener,
    ) -> list[Trial]:  # fmt: skip
        found = [
            Trial(b, "fits", 80 * MIB_BYTES + b * MIB_BYTES // 2, 0.1, fresh=True)
            if b <= limit + off
            else Trial(b, "oom", fresh=True)
            for b in batches
        ]
        for trial in found:
            listener.on_trial(trial)
        return found[:1] if found[0].outcome == "oom" else found

    with open_ledger(tmp_path / "l.sqlite") as ledger:
        question = Question(budget, Setup(workload))
        cell = probe_cell(ledger, question, ProbeSettings(measure=measure))
    assert cell.result.max_batch == limit + off
    assert cell.result.certificate is not None
    assert cell.result.measured <= most
    # A trace that was wrong about the limit is not asked what lies beyond.
    assert off == 0 or cell.holes == NO_HOLES


@pytest.mark.parametrize(
    ("model", "policy", "budget_mib", "limit", "below"),
    [
        ("bert-mini", "selective", 1024, 160, ()),  # 161 does not fit, and some more do
        ("bert-small", "full", 512, 13, (4,)),  # as a real step of batch 4 has shown
    ],
)
def test_holes_on_both_sides_of_the_limit_are_told_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    policy: str,
    budget_mib: int,
    limit: int,
    below: tuple[int, ...],
) -> None:
    """Batches that fit where a smaller one does not."""
    budget = make_budget(resolve_device("cpu"), budget_mib * MIB_BYTES)
    setup = Setup(published_workload(model, 128), Levers(parse_checkpointing(policy)))
    memory = empty_memory(budget)

    def measure(
        setup: Setup, budget: Budget, batches: Sequence[int], settings: TrialSettings,
        listener: TrialListener,
    ) -> list[Trial]:  # fmt: skip
        trials = []
        for batch in batches:
            replayed = replay_step(setup.step(batch), memory)
            outcome: Any = "fits" if replayed.fits else "oom"
            peak_bytes = replayed.peak_bytes if replayed.fits else None
            trials.append(Trial(batch, outcome, peak_bytes, 0.1 * batch, fresh=True))
            listener.on_trial(trials[-1])
        return trials

    question, simulated = Question(budget, setup), ProbeSettings(measure=measure)
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        cell = probe_cell(ledger, question, simulated)
    assert cell.result.max_batch == limit
    assert cell.holes.fits_again
    assert all(replay_step(setup.step(b), memory).fits for b in cell.holes.fits_again)
    assert all(b > limit + 1 for b in cell.holes.fits_again)
    assert cell.holes.runs_out_below == below
    told = describe_holes(cell)
    assert len(told) == 1 + bool(below)
    assert f"{model} 128: above {limit} these fit again" in told[0]
    assert not below or f"{model} 128: below {limit} these do not fit" in told[-1]
    assert not below or told[-1].endswith(": 4")
    assert cell.to_json()["fits_again"] == list(cell.holes.fits_again)
    assert cell.to_json()["runs_out_below"] == list(below)

    with open_ledger(tmp_path / "l.sqlite") as ledger:
        for batch in below:  # what was tried after all is not predicted any more
            seen = Trial(batch, "fits", MIB_BYTES, 0.1, fresh=True)
            record(ledger, question, seen)
        assert probe_cell(ledger, question, simulated).holes.runs_out_below == ()


def test_layers_that_a_model_does_not_have(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--models", "bert-tiny", "--checkpointing", "full:3"]
    with pytest.raises(InputError, match="full:3: bert-tiny has 2 layers; give 1 to 2"):
        CliRunner().invoke(probe_cli.command, arguments, catch_exceptions=False)
