"""Compilations are kept beside trials, and answer their own question alone."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from pathlib import Path

import pytest

from bertbench.compiling.compilation import COMPILED, FAILED, NO_ROOM, Compilation
from bertbench.compiling.target import CPU_TARGET, CompileTarget
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.ledger.compilations import (
    CompiledQuestion,
    compiled_question,
    find_compilations,
    record_compilation,
)
from bertbench.ledger.database import open_ledger
from bertbench.ledger.records import Prunable, prune, read_rows
from bertbench.memory.compiled import CompiledMemory

SETUP = Setup(published_workload("bert-tiny", 64), Levers(xla=True))
QUESTION = CompiledQuestion(CompileTarget("tpu", "tpu-v2-8", "v2:2x2", 8), SETUP, "{}")
FITS = Compilation(4, COMPILED, CompiledMemory(1, 2, 3, 4), "", 1.5)
REFUSED = Compilation(5, NO_ROOM, None, "exceeds available HBM", 2.0)


def test_what_is_recorded_is_found(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        for one in (REFUSED, FITS):
            record_compilation(ledger, QUESTION, one)
    with open_ledger(path) as ledger:
        assert find_compilations(ledger, QUESTION) == [FITS, REFUSED]
        # They are no trials.
        assert read_rows(ledger) == []


def test_failures_are_not_kept_and_the_newest_word_counts(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        record_compilation(ledger, QUESTION, Compilation(6, FAILED, None, "crashed"))
        record_compilation(ledger, QUESTION, dataclasses.replace(REFUSED, micro_batch=4))
        record_compilation(ledger, QUESTION, FITS)
        assert find_compilations(ledger, QUESTION) == [FITS]


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(QUESTION, versions='{"libtpu": "2"}'),
        dataclasses.replace(QUESTION, target=dataclasses.replace(QUESTION.target, replicas=1)),
        dataclasses.replace(QUESTION, target=CPU_TARGET),
        dataclasses.replace(QUESTION, setup=Setup(SETUP.workload, Levers(precision="bf16"))),
        dataclasses.replace(QUESTION, setup=Setup(published_workload("bert-tiny", 32))),
    ],
)
def test_another_question_has_another_answer(other: CompiledQuestion, tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        record_compilation(ledger, QUESTION, FITS)
        assert find_compilations(ledger, other) == []


@pytest.mark.parametrize(
    "change",
    [
        "outcome = 'fits'", "memory = '{'", "memory = NULL", "memory = '{\"argument_bytes\": -1}'",
        "micro_batch = 0", "micro_batch = 'x'", "message = x'00ff'", "seconds = 'long'",
        "seconds = 9e999",
    ],
)  # fmt: skip
def test_damaged_rows_are_passed_over_and_counted(change: str, tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        for one in (FITS, REFUSED):
            record_compilation(ledger, QUESTION, one)
        ledger.execute(f"UPDATE compilations SET {change} WHERE micro_batch = 4")
        assert find_compilations(ledger, QUESTION) == [REFUSED]
        assert len(ledger.damaged) == 1
        ledger.damaged.clear()


def test_a_question_names_the_versions_that_decide() -> None:
    versions = compiled_question(CPU_TARGET, SETUP).versions
    assert '"tensorflow"' in versions
    assert '"bertbench"' in versions


def test_pruning_takes_compilations_of_the_time_away(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        record_compilation(ledger, QUESTION, FITS)
        for kept in (
            Prunable(before=datetime(2020, 1, 1, tzinfo=timezone.utc)),
            Prunable(failed=True),
            Prunable(other_than="{}"),
        ):
            prune(ledger, kept)
            assert find_compilations(ledger, QUESTION) == [FITS]
        prune(ledger, Prunable())
        assert find_compilations(ledger, QUESTION) == []
