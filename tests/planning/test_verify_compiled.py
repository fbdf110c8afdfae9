"""A plan that its product's compiler has seen fits by the compiler's word."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from bertbench.compiling.compilation import COMPILED, FAILED, NO_ROOM, Compilation, Compile
from bertbench.compiling.target import CompileTarget, compile_target
from bertbench.core.errors import WorkError
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, TrainingStep, published_workload
from bertbench.hardware.accelerators import find_accelerator
from bertbench.ledger.database import open_ledger
from bertbench.memory.compiled import CompiledMemory
from bertbench.memory.footprint import predict_footprint
from bertbench.planning.compiled_evidence import planned_target, with_compiled_steps
from bertbench.planning.planner import Plan
from bertbench.planning.requests import PlannedDevice, PlanRequest, catalogue_device
from bertbench.planning.verify_compiled import verify_by_compiler
from bertbench.planning.workload_plans import plan_workload
from finetune.errors import InputError
from finetune.spec.checkpointing import NO_CHECKPOINTING, Checkpointing

WORKLOAD = published_workload("bert-mini", 128)
T4, TPU = find_accelerator("t4"), find_accelerator("tpu-v2-8")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertbench.ledger.compilations.compiler_versions", lambda kind: {})
    monkeypatch.setattr("bertbench.planning.compiled_evidence.has_compiler", lambda kind: True)


def larger_than_predicted(by: float) -> Compile:
    """A compiler whose programs need so much more than the formula says."""

    def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
        footprint = predict_footprint(step)
        arguments = sum(footprint.parts[n] for n in ("weights", "optimizer_state", "inputs"))
        more = int(by * footprint.peak_bytes)
        memory = CompiledMemory(arguments, 0, footprint.peak_bytes - arguments + more, 0)
        return Compilation(step.micro_batch, COMPILED, memory, "", 1.0)

    return compile_


def verified(
    folder: Path,
    compile_: Compile,
    device: PlannedDevice,
    target_batch: int = 64,
    policies: Sequence[Checkpointing] | None = None,
) -> tuple[Plan, Compilation, list[Compilation]]:
    file = folder / "l.sqlite"
    request = PlanRequest(target_batch, policies, (Levers(xla=True),), ledger_file=file)
    target = planned_target(device)
    assert target is not None
    with open_ledger(file) as ledger:
        return verify_by_compiler(
            lambda: plan_workload(request, WORKLOAD, device), target, ledger, compile_
        )


def test_a_plan_that_compiles_too_large_is_replaced(tmp_path: Path) -> None:
    device = catalogue_device(T4, 700 * MIB_BYTES)
    right, compilation, refuted = verified(tmp_path, larger_than_predicted(0.0), device)
    assert refuted == []
    assert compilation.micro_batch == right.chosen.step.micro_batch
    (tmp_path / "larger").mkdir()
    too_much = 1.02 * device.budget_bytes / right.chosen.footprint.peak_bytes - 1.0
    compile_ = larger_than_predicted(too_much)
    plan, compilation, refuted = verified(tmp_path / "larger", compile_, device)
    assert refuted
    assert refuted[0].micro_batch == right.chosen.step.micro_batch
    assert compilation.fits_in(plan.chosen.step, "gpu", device.budget_bytes)
    # What the compiler said stands in the plan.
    assert compilation.memory is not None
    assert plan.chosen.footprint.peak_bytes == compilation.memory.device_bytes


def test_what_the_ledger_knows_is_not_compiled_again(tmp_path: Path) -> None:
    device = catalogue_device(T4, 700 * MIB_BYTES)
    first = verified(tmp_path, larger_than_predicted(0.25), device)

    def never(step: TrainingStep, target: CompileTarget) -> Compilation:
        raise AssertionError(step)

    again = verified(tmp_path, never, device)
    assert again[0].chosen == first[0].chosen


def test_a_tpus_refusal_is_learned_from(tmp_path: Path) -> None:
    asked = []

    def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
        assert step.levers.xla
        assert target.replicas == 8
        asked.append(step.micro_batch)
        if len(asked) == 1:
            return Compilation(step.micro_batch, NO_ROOM, None, "exceeds available HBM", 1.0)
        return larger_than_predicted(0.0)(step, target)

    plan, _, refuted = verified(tmp_path, compile_, catalogue_device(TPU), 4096)
    assert [one.micro_batch for one in refuted] == asked[:1]
    assert plan.chosen.step.micro_batch == asked[-1]


def test_a_compiler_that_fails_says_nothing_of_the_plan(tmp_path: Path) -> None:
    def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
        return Compilation(step.micro_batch, FAILED, None, "segmentation fault")

    with pytest.raises(WorkError, match="did not compile: segmentation fault"):
        verified(tmp_path, compile_, catalogue_device(T4, 700 * MIB_BYTES))


def test_nothing_fits_in_the_end(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is too large by its compiler's word"):
        verified(
            tmp_path,
            larger_than_predicted(9.0),
            catalogue_device(T4, 300 * MIB_BYTES),
            2,
            [NO_CHECKPOINTING],
        )


def test_the_budget_of_a_tpu_counts(tmp_path: Path) -> None:
    device = catalogue_device(TPU, 1200 * MIB_BYTES)
    plan, compilation, _ = verified(tmp_path, larger_than_predicted(0.4), device, 256)
    assert compilation.memory is not None
    assert compilation.memory.device_bytes <= plan.budget_bytes == 1200 * MIB_BYTES


def test_a_ledger_that_cannot_be_read_is_said_once_and_the_plan_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.sqlite"
    path.write_text("no ledger")
    monkeypatch.setenv("BERTBENCH_LEDGER", str(path))
    device = catalogue_device(T4, 700 * MIB_BYTES)
    xla = PlanRequest(64, allowed=(Levers(xla=True),))
    for _ in range(2):
        assert plan_workload(xla, WORKLOAD, device).chosen
    assert capsys.readouterr().err.count("planning without it") == 1
    named = dataclasses.replace(xla, ledger_file=path)
    with pytest.raises(InputError):
        plan_workload(named, WORKLOAD, device)


def test_only_what_is_compiled_is_looked_up(tmp_path: Path) -> None:
    file = tmp_path / "l.sqlite"
    device = catalogue_device(T4, 700 * MIB_BYTES)
    verified(tmp_path, larger_than_predicted(0.25), device)
    xla, plain = (
        PlanRequest(64, allowed=(Levers(xla=x),), ledger_file=file) for x in (True, False)
    )
    assert with_compiled_steps(device, WORKLOAD, xla).compiled
    assert not with_compiled_steps(device, WORKLOAD, plain).compiled
    verified(tmp_path, larger_than_predicted(0.0), catalogue_device(TPU))
    # A TPU compiles unasked.
    assert with_compiled_steps(catalogue_device(TPU), WORKLOAD, plain).compiled
    other = published_workload("bert-mini", 64)
    assert not with_compiled_steps(device, other, xla).compiled
    assert planned_target(catalogue_device(T4, replicas=2)) is None
    assert planned_target(catalogue_device(TPU)) == compile_target(TPU, 8)
