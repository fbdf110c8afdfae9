"""The shipped table says what the compiler says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bertbench.compiling.compilation import compile_step
from bertbench.compiling.installed import has_compiler
from bertbench.compiling.shipped import read_table, shipped_steps, steps_of_rows
from bertbench.compiling.target import compile_target
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.accelerators import ACCELERATORS, find_accelerator
from bertbench.memory.footprint import predict_footprint
from bertbench.planning.compiled_evidence import with_compiled_steps
from bertbench.planning.requests import PlanRequest, catalogue_device
from helpers.paths import REPOSITORY

SETUP = Setup(published_workload("bert-tiny", 128), Levers(xla=True))


@pytest.mark.skipif(not has_compiler("gpu"), reason="needs bertbench[compile-gpu]")
def test_the_compiler_still_says_what_is_in_the_table() -> None:
    """If the step has changed, the table is to be made again: `benchmarks/ship_compiled.py`."""
    known = shipped_steps("titan-x", 1, SETUP.workload)[SETUP]
    micro_batch = min(known)
    target = compile_target(find_accelerator("titan-x"))
    assert compile_step(SETUP.step(micro_batch), target).memory == known[micro_batch]


def test_all_rows_are_of_published_models_on_known_products() -> None:
    rows = read_table()["steps"]
    assert {row["product"] for row in rows} <= set(ACCELERATORS)
    for setup, memories in steps_of_rows(rows).items():
        assert setup.levers.xla
        for micro_batch, memory in memories.items():
            assert memory is not None
            predicted = predict_footprint(setup.step(micro_batch)).peak_bytes
            assert 0.9 < predicted / memory.device_bytes < 1.1


def test_the_table_answers_for_its_own_products_and_workloads(tmp_path: Path) -> None:
    assert shipped_steps("t4", 1, published_workload("bert-tiny", 64)) == {}
    assert shipped_steps("titan-x", 2, SETUP.workload) == {}
    assert shipped_steps("titan-x", 1, published_workload("bert-tiny", 128, "classifier")) == {}
    request = PlanRequest(32, allowed=(Levers(xla=True),), ledger_file=tmp_path / "none.sqlite")
    device = catalogue_device(find_accelerator("titan-x"))
    found = with_compiled_steps(device, SETUP.workload, request).compiled
    assert found == shipped_steps("titan-x", 1, SETUP.workload)


def test_another_name_of_a_model_is_known_too() -> None:
    uncased = published_workload("bert-tiny-uncased", 128)
    assert uncased != SETUP.workload
    known = shipped_steps("titan-x", 1, uncased)
    assert known[Setup(uncased, SETUP.levers)] == shipped_steps("titan-x", 1, SETUP.workload)[SETUP]


def test_a_table_is_made_of_probes(tmp_path: Path) -> None:
    memory = {"argument_bytes": 1, "output_bytes": 2, "temporary_bytes": 3, "program_bytes": 4}
    cell = {
        "model": "bert-tiny", "seq_len": 128, "head": "squad", "levers": SETUP.levers.to_json(),
        "compilations": [{"micro_batch": 8, "memory": memory}, {"micro_batch": 9, "memory": None}],
    }  # fmt: skip
    probe = {
        "compiled_for": {"name": "t4", "replicas": 1}, "versions": {"tensorflow": "2.21"},
        "cells": [cell],
    }  # fmt: skip
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    out = tmp_path / "table.json"
    program = [sys.executable, str(REPOSITORY / "benchmarks" / "ship_compiled.py")]
    # The same file twice makes the same rows.
    files = [str(tmp_path / "probe.json")] * 2
    subprocess.run([*program, *files, "--out", str(out)], check=True, cwd=REPOSITORY)
    table = json.loads(out.read_text())
    assert table["versions"] == probe["versions"]
    memories = steps_of_rows(table["steps"])[SETUP]
    assert len(table["steps"]) == 2
    assert memories[9] is None
    assert memories[8] is not None
    assert memories[8].to_json() == memory
