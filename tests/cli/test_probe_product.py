"""`bertbench probe --gpu`: limits by a compiler, shown as such."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bertbench.cli import probe_product as module
from bertbench.cli.probe import command
from bertbench.cli.probe_product import (
    ProductProbe,
    check_product,
    default_jobs,
    probe_product,
)
from bertbench.compiling.compilation import (
    COMPILED,
    FAILED,
    NO_ROOM,
    Compilation,
    Compile,
    CompileSettings,
)
from bertbench.compiling.target import CompileTarget
from bertbench.core.errors import WorkError
from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, TrainingStep
from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.threads import usable_cores
from bertbench.memory.compiled import CompiledMemory
from finetune.errors import InputError


def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
    """Stands for a compiler: 10 MB an example; a TPU's has room for 40 examples."""
    if target.kind == "tpu" and step.micro_batch > 40:
        return Compilation(step.micro_batch, NO_ROOM, None, "exceeds available HBM", 1.0)
    memory = CompiledMemory(52_448_384, 0, 10_000_000 * step.micro_batch, 0)
    return Compilation(step.micro_batch, COMPILED, memory, "", 1.0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertbench.ledger.compilations.compiler_versions", lambda kind: {})


def run(
    folder: Path, name: str, sizes: list[tuple[str, int]], memory: int | None = None, jobs: int = 1
) -> dict:
    file = folder / "out.json"
    probe = ProductProbe(folder / "l.sqlite", 1000, False, file, jobs, lambda settings: compile_)
    probe_product(find_accelerator(name), memory, sizes, "squad", Levers(xla=True), probe)
    values: dict = json.loads(file.read_text())
    return values


@pytest.mark.usefixtures("installed")
def test_both_sides_are_told_and_not_taken_for_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run(tmp_path, "t4", [("bert-tiny", 64), ("bert-tiny", 128)], 500 * 2**20)
    out, err = capsys.readouterr()
    assert "by its compiler and not by trials" in out
    assert "certified" not in out
    assert "[2/2] bert-tiny 128: compiling batch" in err
    assert "left" in err
    assert values["compiled_for"]["name"] == "t4"
    for cell in values["cells"]:
        assert cell["evidence"] == "compiled"
        assert cell["fits"]["micro_batch"] == cell["max_batch"]
        assert cell["exceeds"]["micro_batch"] == cell["max_batch"] + 1
        assert 44 <= cell["max_batch"] <= 47
    assert all(len(line) <= 80 for line in out.splitlines()[1:4])


@pytest.mark.usefixtures("installed")
def test_a_tpus_compiler_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run(tmp_path, "tpu-v2-8", [("bert-tiny", 64)])
    assert values["cells"][0]["max_batch"] == 40
    assert values["compiled_for"]["replicas"] == 8
    assert "refused" in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_a_failed_compilation_is_an_error(tmp_path: Path) -> None:
    def crash(step: TrainingStep, target: CompileTarget) -> Compilation:
        return Compilation(step.micro_batch, FAILED, None, "the compiler crashed")

    probe = ProductProbe(tmp_path / "l.sqlite", 1000, False, None, 1, lambda settings: crash)
    with pytest.raises(WorkError, match=r"1 of 1 cells failed.*the compiler crashed"):
        probe_product(
            find_accelerator("t4"), None, [("bert-tiny", 64)], "squad", Levers(xla=True), probe
        )


@pytest.mark.usefixtures("installed")
def test_an_interruption_shows_what_was_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(step: TrainingStep, target: CompileTarget) -> Compilation:
        if step.workload.seq_len == 128:
            raise KeyboardInterrupt
        return compile_(step, target)

    probe = ProductProbe(tmp_path / "l.sqlite", 1000, False, None, 1, lambda settings: interrupted)
    sizes = [("bert-tiny", 64), ("bert-tiny", 128)]
    with pytest.raises(KeyboardInterrupt):
        probe_product(find_accelerator("t4"), None, sizes, "squad", Levers(xla=True), probe)
    out = capsys.readouterr().out
    assert " 64 " in out
    assert " 128 " not in out


@pytest.mark.usefixtures("installed")
def test_several_cells_at_once_give_the_same_answers_in_order(tmp_path: Path) -> None:
    sizes = [("bert-tiny", length) for length in (64, 96, 128, 160)]
    for jobs in (1, 3):
        (tmp_path / str(jobs)).mkdir()
    one, three = (run(tmp_path / str(jobs), "t4", sizes, None, jobs) for jobs in (1, 3))
    limits = [(cell["seq_len"], cell["max_batch"]) for cell in one["cells"]]
    assert limits == [(cell["seq_len"], cell["max_batch"]) for cell in three["cells"]]
    assert [length for length, _ in limits] == [64, 96, 128, 160]


@pytest.mark.usefixtures("installed")
def test_what_fails_ends_the_others(tmp_path: Path) -> None:
    waiting = threading.Event()

    def compiler(settings: CompileSettings) -> Compile:
        def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
            if step.workload.seq_len == 128:
                assert waiting.wait(60)
                raise InputError("the disk is full")
            waiting.set()
            while True:
                settings.poll()  # ends it
                time.sleep(0.01)

        return compile_

    probe = ProductProbe(tmp_path / "l.sqlite", 1000, False, None, 2, compiler)
    sizes = [("bert-tiny", 64), ("bert-tiny", 128)]
    with pytest.raises(InputError, match="the disk is full"):
        probe_product(find_accelerator("t4"), None, sizes, "squad", Levers(xla=True), probe)


def test_jobs_are_as_many_as_cores_and_memory_allow() -> None:
    assert default_jobs(lambda: (64 * GIB_BYTES, GIB_BYTES)) == 1
    assert default_jobs(lambda: (2**60, 2**60)) == usable_cores()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["--models", "bert-tiny", "--seq-lens", "64", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "t4", "--device", "cpu"], "--device does not go with --gpu"),
        (["--jobs", "2"], "--jobs is for compilations"),
        (["--gpu", "t4", "--share"], "--share does not go with --gpu"),
        (["--gpu", "t4", "--placement", "host"], "--placement does not go with --gpu"),
        (["--gpu", "t4", "--memory", "17GiB"], "is more than the 16.0 GiB of t4"),
        (["--gpu", "tpu-v2-8", "--memory", "4GiB"], "--memory does not go with tpu-v2-8"),
        (["--gpu", "tpu-v2-8", "--precision", "fp16"], "does not support fp16"),
        (["--gpu", "k80"], "no kernels for k80"),
        (["--gpu", "abacus"], "not in the catalogue"),
        (["--gpu", "t4", "--checkpointing", "full:3"], "bert-tiny has 2 layers"),
    ],
)
def test_what_does_not_go_is_told_before_anything_is_compiled(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertbench.ledger.compilations.compiler_versions", lambda kind: {})
    monkeypatch.setattr(module, "probe_compiled", lambda *a, **k: pytest.fail("compiled"))
    error = invoke(*arguments).exception
    assert isinstance(error, InputError)
    assert words in str(error)


@pytest.mark.usefixtures("installed")
def test_limits_in_a_file_are_compiled_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "tpu-v2-8", [("bert-tiny", 64), ("bert-tiny", 128)])
    compiled: list[int] = []

    def again(step: TrainingStep, target: CompileTarget) -> Compilation:
        assert (target.name, target.replicas) == ("tpu-v2-8", 8)
        compiled.append(step.micro_batch)
        return compile_(step, target)

    check_product(tmp_path / "out.json", tmp_path / "checks.json", again)
    assert compiled == [40, 41, 40, 41]
    assert capsys.readouterr().out.count(" holds") == 2
    cells = json.loads((tmp_path / "checks.json").read_text())["cells"]
    assert [cell["confirmed"] for cell in cells] == [True, True]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("outcome", "batch", "words"),
    [(COMPILED, 41, "do not hold"), (NO_ROOM, 40, "do not hold"), (FAILED, 40, "could not be")],
)
def test_a_limit_that_does_not_hold_is_told(
    outcome: str, batch: int, words: str, tmp_path: Path
) -> None:
    run(tmp_path, "tpu-v2-8", [("bert-tiny", 64)])

    def otherwise(step: TrainingStep, target: CompileTarget) -> Compilation:
        if step.micro_batch != batch:
            return compile_(step, target)
        memory = CompiledMemory(1, 0, 0, 0) if outcome == COMPILED else None
        return Compilation(batch, outcome, memory)

    with pytest.raises(WorkError, match=f"1 of 1 limits {words}"):
        check_product(tmp_path / "out.json", None, otherwise)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "change",
    [
        {"budget_bytes": -1}, {"cells": None}, {"compiled_for": []}, {"cells": []},
        {"compiled_for": {"name": "abacus", "replicas": 1}},
        {"compiled_for": {"name": "t4", "replicas": 10**9}},
    ],
)  # fmt: skip
def test_what_is_no_file_of_limits_is_refused(change: dict, tmp_path: Path) -> None:
    values = run(tmp_path, "t4", [("bert-tiny", 64)], 500 * 2**20)
    (tmp_path / "out.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(InputError, match=r"out\.json"):
        check_product(tmp_path / "out.json", None, compile_)


@pytest.mark.usefixtures("installed")
def test_a_limit_is_two_neighbours(tmp_path: Path) -> None:
    values = run(tmp_path, "t4", [("bert-tiny", 64)], 500 * 2**20)
    values["cells"][0]["exceeds"]["micro_batch"] += 1
    (tmp_path / "out.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="a micro-batch and the next one"):
        check_product(tmp_path / "out.json", None, compile_)
