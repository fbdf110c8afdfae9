"""Limits by a compiler: both sides are compiled, with few compilations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertbench.compiling.compilation import COMPILED, FAILED, NO_ROOM, Compilation
from bertbench.compiling.target import CompileTarget
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, TrainingStep, published_workload
from bertbench.ledger.compilations import CompiledQuestion
from bertbench.ledger.database import open_ledger
from bertbench.memory.compiled import CompiledMemory
from bertbench.probing.compiled.cell import CompiledCell, probe_compiled

SETUP = Setup(published_workload("bert-tiny", 128), Levers(xla=True))
TPU = CompiledQuestion(CompileTarget("tpu", "tpu-v2-8", "v2:2x2"), SETUP, "{}")
GPU = CompiledQuestion(CompileTarget("gpu", "t4", "text"), SETUP, "{}")
MODEL_BYTES = 52_448_384


def affine(begin: int, each: int, limit: int | None = None) -> Callable[..., Compilation]:
    """A compiler whose programs grow so; above `limit` bytes it refuses, as a TPU's does."""

    def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
        memory = CompiledMemory(MODEL_BYTES, 0, begin + each * step.micro_batch, 0)
        if limit is not None and memory.device_bytes > limit:
            return Compilation(step.micro_batch, NO_ROOM, None, "no room", 1.0)
        return Compilation(step.micro_batch, COMPILED, memory, "", 1.0)

    return compile_


def probe(
    compile_: Callable[..., Compilation],
    budget_bytes: int,
    tmp_path: Path,
    question: CompiledQuestion = TPU,
    **options: int,
) -> CompiledCell:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        return probe_compiled(ledger, question, budget_bytes, compile_, **options)


@given(
    begin=st.integers(0, 60_000_000),
    each=st.integers(20_000, 30_000_000),
    mebibytes=st.integers(60, 4000),
)
def test_the_limit_of_any_line_is_found_with_both_sides(
    begin: int, each: int, mebibytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    budget_bytes = mebibytes * MIB_BYTES
    compile_ = affine(begin, each, budget_bytes)
    cell = probe(compile_, budget_bytes, tmp_path_factory.mktemp("line"))
    limit = max((budget_bytes - MODEL_BYTES - begin) // each, 0)
    assert cell.max_batch == limit
    assert cell.exceeds is not None
    assert cell.exceeds.micro_batch == limit + 1
    assert (cell.fits is None) == (limit == 0)
    assert cell.fits is None or cell.fits.micro_batch == limit


def test_four_compilations_are_enough_where_all_compile(tmp_path: Path) -> None:
    for number, (begin, each) in enumerate([(17_000_000, 2_500_000), (60_000_000, 300_000)]):
        (tmp_path / str(number)).mkdir()
        cell = probe(affine(begin, each), 1000 * MIB_BYTES, tmp_path / str(number), GPU)
        assert cell.compiled <= 4


@pytest.mark.parametrize("refuses", [False, True])
def test_what_is_no_line_costs_a_few_more(refuses: bool, tmp_path: Path) -> None:
    """Programs that grow in steps of eight examples, and a little faster than a line."""
    budget_bytes = 1000 * MIB_BYTES
    limit = budget_bytes if refuses else None

    def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
        batch = -(-step.micro_batch // 8) * 8
        return dataclasses.replace(
            affine(17_000_000, 3_000_000 + 2_000 * batch, limit)(SETUP.step(batch), target),
            micro_batch=step.micro_batch,
        )

    cell = probe(compile_, budget_bytes, tmp_path, TPU if refuses else GPU)
    assert cell.max_batch is not None
    assert cell.max_batch % 8 == 0
    assert cell.exceeds is not None
    assert cell.compiled <= 10


def test_a_known_limit_costs_nothing_and_another_budget_uses_what_is_known(tmp_path: Path) -> None:
    compile_ = affine(17_000_000, 2_500_000)
    first = probe(compile_, 1000 * MIB_BYTES, tmp_path, GPU)
    again = probe(compile_, 1000 * MIB_BYTES, tmp_path, GPU)
    assert (again.compiled, again.max_batch) == (0, first.max_batch)
    other = probe(compile_, 700 * MIB_BYTES, tmp_path, GPU)
    assert other.compiled <= 3
    anew = probe(compile_, 1000 * MIB_BYTES, tmp_path, GPU, ignore_ledger=True)
    assert anew.compiled == first.compiled


def test_a_gpus_allocator_needs_more_than_the_compilers_sum(tmp_path: Path) -> None:
    compile_ = affine(17_000_000, 2_500_000)
    refusing = affine(17_000_000, 2_500_000, 300 * MIB_BYTES)
    tpu = probe(refusing, 300 * MIB_BYTES, tmp_path)
    gpu = probe(compile_, 300 * MIB_BYTES, tmp_path, GPU)
    assert tpu.max_batch is not None
    assert gpu.max_batch is not None
    assert 0 < gpu.max_batch < tpu.max_batch


def test_a_bound_is_no_limit(tmp_path: Path) -> None:
    cell = probe(affine(17_000_000, 2_500_000), 1000 * MIB_BYTES, tmp_path, max_batch=8)
    assert (cell.max_batch, cell.exceeds) == (8, None)


def test_a_failure_is_no_limit(tmp_path: Path) -> None:
    def compile_(step: TrainingStep, target: CompileTarget) -> Compilation:
        return Compilation(step.micro_batch, FAILED, None, "the compiler crashed")

    cell = probe(compile_, 1000 * MIB_BYTES, tmp_path)
    assert cell.max_batch is None
    assert cell.message == "the compiler crashed"
    assert cell.to_json()["evidence"] == "failed"


def test_nothing_fits(tmp_path: Path) -> None:
    cell = probe(affine(17_000_000, 2_500_000), 60 * MIB_BYTES, tmp_path, GPU)
    assert cell.max_batch == 0
    assert cell.fits is None
    assert cell.exceeds is not None
