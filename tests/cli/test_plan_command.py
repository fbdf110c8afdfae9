"""`bertbench plan` from the outside: accelerators, the smallest memory, what memory is used for."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from bertbench.cli.plan import command
from bertbench.compiling.compilation import COMPILED, Compilation
from bertbench.compiling.target import CompileTarget
from bertbench.core.workload import (
    Setup,
    TrainingStep,
    levers_from_json,
    published_workload,
)
from bertbench.hardware import discover
from bertbench.hardware.accelerators import ACCELERATORS, gpus_with
from bertbench.hardware.device import GPU_CONTEXT_RESERVE_BYTES, Device
from bertbench.memory.compiled import CompiledMemory
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.planning.plan_file import read_plan
from finetune.errors import InputError

BASE = ["--model", "bert-base", "--seq-len", "384", "--target-batch", "24"]


def plan(*arguments: str, obj: object = None) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False, obj=obj)
    assert result.exit_code == 0
    tables = [line for line in result.output.splitlines() if "  " in line and "{" not in line]
    assert all(len(line) <= 80 for line in tables)
    return result.output


def test_every_card_of_the_catalogue_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "cards.json"
    text = plan(*BASE, "--gpu", "all", "--json", str(path))
    cards = json.loads(path.read_text())["cards"]
    assert {card["card"] for card in cards} == set(ACCELERATORS)
    for card in cards:
        assert card["chosen"] is not None
        assert card["chosen"]["predicted_peak_bytes"] <= ACCELERATORS[card["card"]].usable_bytes
        assert card["card"] in text
    large = [*BASE, "--model", "bert-large", "--placement", "device"]
    text = plan(*large, "--gpu", "all")
    assert "no plan for gtx-1050-ti" in text
    assert "gtx-1060 " in text


def test_the_catalogue_is_listed_by_generation(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    text = plan("--gpu", "list", "--json", str(path))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    headings = [line.strip() for line in lines if line.startswith(("Pascal", "Ampere", "TPU"))]
    assert headings == ["Pascal 6.0, 6.1", "Ampere 8.0, 8.6", "TPU"]
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line.strip()]
    assert listed == list(ACCELERATORS)
    assert "k80 (3.7)" in " ".join(lines)
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert rows["tpu-v2-8"]["usable_bytes"] == ACCELERATORS["tpu-v2-8"].usable_bytes
    assert rows["t4"]["chip"]["multiprocessors"] == 40


def test_a_card_that_tensorflow_cannot_use_is_refused_or_warned_of() -> None:
    with pytest.raises(InputError, match=r"no kernels for k80: compute capability 3\.7"):
        plan(*BASE, "--gpu", "Tesla K80")
    assert "CUDA_ERROR_INVALID_PTX" in plan(*BASE, "--gpu", "rtx-5090")
    assert "PTX" not in plan(*BASE, "--gpu", "rtx-4090")
    assert "TensorFlow is not supported" in " ".join(plan(*BASE, "--gpu", "tpu7x-8").split())


def test_the_smallest_memory_and_its_cards() -> None:
    found = json.loads(plan(*BASE, "--device", "cpu", "--min-memory", "--json", "-"))
    assert found["target_batch"] == 24
    (least,) = found["workloads"]
    workload, levers = published_workload("bert-base", 384), levers_from_json(least)
    needed = least["min_memory_bytes"]
    assert least["micro_batch"] * levers.accumulation_steps >= 24
    setup = Setup(workload, levers)
    assert predict_memory(setup, Room("cpu", needed)).fits(least["micro_batch"])
    assert not predict_memory(setup, Room("cpu", needed - (1 << 20))).fits(least["micro_batch"])
    assert least["cards"] == [card.name for card in gpus_with(int(1.08 * needed) + 1)]
    text = plan(*BASE, "--device", "cpu", "--min-memory")
    assert f"{needed / (1 << 20):,.0f} MiB" in text
    assert "gtx-1050-ti" in text
    # A margin covers what no GPU was measured for.
    on_gpu = json.loads(plan(*BASE, "--gpu", "all", "--min-memory", "--json", "-"))
    assert on_gpu["workloads"][0]["min_memory_bytes"] > 1.05 * needed


def test_smallest_cards_first() -> None:
    names = [card.name for card in gpus_with(11 << 30)]
    assert names[0] == "titan-x"
    assert "gtx-1080-ti" not in names
    assert names[-1] == "b200"
    assert gpus_with(1 << 50) == []


def test_what_memory_is_used_for(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = plan(*BASE, "--device", "cpu", "--memory", "4GiB", "--explain", "--json", str(path))
    chosen = json.loads(path.read_text())["chosen"]
    lines = {line[:18].strip(): line for line in text.splitlines()}
    shares = 0.0
    for part, size_bytes in chosen["footprint"].items():
        if size_bytes:
            assert f"{size_bytes / (1 << 20):,.0f} MiB" in lines[part.replace("_", " ")]
            shares += size_bytes
    assert shares == chosen["predicted_peak_bytes"]
    free = (4 << 30) - chosen["predicted_peak_bytes"]
    assert f"{free / (1 << 20):,.0f} MiB" in lines["free"]
    # One bar under the other: the first begins at the left, the last ends at the right.
    columns = 36
    assert lines["weights"][columns] == "█"
    assert lines["free"].rstrip()[-1] == "░"
    assert len(lines["free"].rstrip()) == max(len(line.rstrip()) for line in lines.values()
                                              if "█" in line or "░" in line)  # fmt: skip


def test_hours_of_the_whole_recipe() -> None:
    text = plan(*BASE, "--gpu", "titan-x")
    seconds = json.loads(plan(*BASE, "--gpu", "titan-x", "--json", "-"))["chosen"][
        "predicted_step_seconds"
    ]
    # SQuAD 1.1's training set, three times.
    steps = 87_599 * 3 // 24
    assert f"{steps:,} steps of 24, about {steps * seconds / 3600:.1f} h" in text
    assert "examples:" not in plan(*BASE, "--gpu", "titan-x", "--head", "classifier")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--explain"],
        ["--gpu", "all"],
        ["--min-memory", "--memory", "4GiB"],
        [*BASE, "--min-memory", "--explain"],
        [*BASE, "--min-memory", "--gpu", "titan-x"],
        ["--verify"],
    ],
)
def test_what_does_not_go_together(arguments: list[str]) -> None:
    with pytest.raises(InputError, match=r"--model|--min-memory"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_layers_that_a_model_does_not_have() -> None:
    assert "full:12" in plan(*BASE, "--gpu", "titan-x", "--checkpointing", "full:12")
    for policy in ("full:13", "full:0"):
        with pytest.raises(InputError, match=f"{policy}: bert-base has 12 layers; give 1 to 12"):
            plan(*BASE, "--gpu", "titan-x", "--checkpointing", policy)


def test_what_is_too_much_is_more_than_there_is_with_the_margin() -> None:
    text = plan(*BASE, "--gpu", "gtx-1060", "--json", "-")
    values = json.loads(text)
    found = re.fullmatch(
        r"needs ([\d,]+) MiB, ([\d,]+) MiB too much with a margin of 8%",
        values["rejected"][0]["why"],
    )
    assert found
    needed, missing = (int(number.replace(",", "")) for number in found.groups())
    assert (needed - missing) * 1.08 == pytest.approx(values["budget_bytes"] / 2**20, abs=3)
    first = values["rejected"][0]
    setting = f"not {first['accumulation_steps']} micro-batches of {first['micro_batch']} with"
    assert setting.replace("1 micro-batches", "1 micro-batch") in plan(*BASE, "--gpu", "gtx-1060")
    # So it is where memory is in pieces but for the margin.
    text = plan("--model", "bert-large", "--seq-len", "512", "--gpu", "gtx-1060",
                "--target-batch", "1")  # fmt: skip
    assert "in pieces that are too small with a margin of 8%" in text
    # A step that is known to the byte needs none.
    exact = plan(*BASE, "--device", "cpu", "--memory", "4GiB")
    assert "too much" in exact
    assert "margin" not in exact


def test_what_would_help_where_nothing_fits() -> None:
    tiny = ["--model", "bert-tiny", "--seq-len", "64", "--device", "cpu"]
    for target, memory, helps in (
        ("100000", "110MiB", True),  # of whose inputs alone there is too much
        ("8", "60MiB", False),
    ):
        with pytest.raises(InputError, match="does not fit") as error:
            plan(*tiny, "--target-batch", target, "--memory", memory)
        assert ("use a smaller target batch" in str(error.value)) == helps


def test_gpus_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    cards = [Device("gpu", n, "Tesla V100", f"GPU-{n}", 16 * gib, (15 - n) * gib) for n in (0, 1)]
    monkeypatch.setattr(discover, "list_devices", lambda: cards)
    both = [*BASE, "--device", "gpu:0,gpu:1"]
    values = json.loads(plan(*both, "--json", "-"))
    assert values["budget_bytes"] == 14 * gib - GPU_CONTEXT_RESERVE_BYTES
    assert values["chosen"]["replicas"] == 2
    assert values["chosen"] == json.loads(plan(*both, "--replicas", "2", "--json", "-"))["chosen"]
    least = json.loads(plan(*both, "--min-memory", "--json", "-"))["workloads"][0]
    alone = json.loads(plan(*BASE, "--min-memory", "--json", "-"))["workloads"][0]
    shares = [one["micro_batch"] * one["accumulation_steps"] for one in (least, alone)]
    assert shares == [12, 24]
    assert least["min_memory_bytes"] > alone["min_memory_bytes"]
    for arguments, words in (
        (["--replicas", "3"], "names 2 GPUs, not 3"),
        (["--verify"], "--verify needs one device alone"),
    ):
        with pytest.raises(InputError, match=words):
            CliRunner().invoke(command, [*both, *arguments], catch_exceptions=False)


def test_replicas() -> None:
    text = plan(*BASE, "--gpu", "tpu-v2-8", "--target-batch", "12")
    assert "on each of 8 replicas on tpu-v2-8" in text
    assert "4 of 16 rows are padding" in text
    assert "by a formula, unless compiled (--verify)" in text
    values = json.loads(plan(*BASE, "--gpu", "v100", "--replicas", "4", "--json", "-"))
    assert (values["target_batch"], values["chosen"]["replicas"]) == (24, 4)
    assert values["chosen"]["micro_batch"] * values["chosen"]["accumulation_steps"] == 6
    for arguments, words in (
        (["--gpu", "tpu-v2-8", "--replicas", "2"], "tpu-v2-8 has 8 devices"),
        (["--verify", "--replicas", "2"], "--verify needs one device alone"),
    ):
        with pytest.raises(InputError, match=words):
            CliRunner().invoke(command, [*BASE, *arguments], catch_exceptions=False)
    text = plan(*BASE, "--gpu", "all", "--replicas", "2")
    assert "2 x 8 GiB" in text
    assert "tpu" not in text
    with pytest.raises(InputError, match="on the host with several replicas"):
        plan(*BASE, "--gpu", "v100", "--replicas", "4", "--placement", "host")


XLA = ["--model", "bert-mini", "--seq-len", "128", "--target-batch", "64", "--gpu", "t4", "--xla"]


def test_a_plan_for_xla_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = plan(*XLA, "--memory", "700MiB", "--json", str(path))
    values = json.loads(path.read_text())
    assert values["chosen"]["xla"]
    assert all(entry["xla"] for entry in values["alternatives"])
    assert "XLA" in text
    assert read_plan(path).levers.xla


def test_a_plan_that_was_compiled_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CompiledMemory(133_000_000, 0, 300_000_000, 0)
    monkeypatch.setattr("bertbench.cli.plan_product.compiler_versions", lambda kind: {})
    monkeypatch.setattr("bertbench.ledger.compilations.compiler_versions", lambda kind: {})

    def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
        return Compilation(step.micro_batch, COMPILED, memory)

    path, ledger = tmp_path / "plan.json", tmp_path / "l.sqlite"
    files = ("--ledger", str(ledger), "--json", str(path))
    text = plan(*XLA, "--memory", "700MiB", "--verify", *files, obj=compile_)
    assert "compiled: fits, needs 413 MiB; the compiler's word, nothing was run" in text
    values = json.loads(path.read_text())
    assert values["chosen"]["predicted_peak_bytes"] == 433_000_000
    assert values["verified"][-1]["memory"] == memory.to_json()


def test_without_xla_nothing_is_compiled_for_a_gpu() -> None:
    for flags in ([*XLA[:-1]], [*XLA, "--replicas", "2"]):
        with pytest.raises(InputError, match=r"only compile the plan|several GPUs"):
            CliRunner().invoke(command, [*flags, "--verify"], catch_exceptions=False)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(InputError, match="needs the package jax-cuda12-pjrt"):
        CliRunner().invoke(command, [*XLA, "--verify"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*BASE, "--gpu", "all", "--verify"], "--verify does not go with --gpu all"),
        ([*BASE, "--gpu", "all", "--explain"], "--explain does not go with --gpu all"),
        ([*BASE, "--min-memory", "--xla", "--device", "cpu"], "add --gpu all"),
        ([*BASE, "--min-memory", "--xla", "--gpu", "all", "--replicas", "2"], "several GPUs"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_a_named_ledger_that_cannot_be_read_is_an_error_and_no_reason(tmp_path: Path) -> None:
    path = tmp_path / "broken.sqlite"
    path.write_text("no ledger")
    flags = ["--gpu", "t4", "--xla", "--model", "bert-tiny", "--ledger", str(path)]
    with pytest.raises(InputError, match=r"broken\.sqlite"):
        CliRunner().invoke(command, flags, catch_exceptions=False)
