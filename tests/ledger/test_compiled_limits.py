"""Limits by compilers are told for each product, beside trials and never as trials."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
from click.testing import CliRunner

from bertbench.cli.ledger import command
from bertbench.compiling.compilation import COMPILED, NO_ROOM, Compilation
from bertbench.compiling.target import CompileTarget
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.accelerators import find_accelerator
from bertbench.ledger.compilations import CompiledQuestion, record_compilation
from bertbench.ledger.compiled_limits import CompiledLimit, read_compiled_limits
from bertbench.ledger.database import open_ledger
from bertbench.memory.compiled import CompiledMemory
from reports.page import build_page
from reports.report import Report
from reports.text import show_report

SETUP = Setup(published_workload("bert-base", 384), Levers(xla=True))
T4 = CompileTarget("gpu", "t4", "a description")
USABLE = find_accelerator("t4").usable_bytes


def needs(batch: int, share: float) -> Compilation:
    """A compilation that takes so much of a T4."""
    arguments = 1_306_000_000
    memory = CompiledMemory(arguments, 0, int(share * USABLE) - arguments, 0)
    return Compilation(batch, COMPILED, memory, "", 1.0)


def limits_of(
    folder: Path, *compilations: Compilation, target: CompileTarget = T4, versions: str = "{}"
) -> list[CompiledLimit]:
    with open_ledger(folder / "l.sqlite") as ledger:
        question = CompiledQuestion(target, SETUP, versions)
        for one in compilations:
            record_compilation(ledger, question, one)
        return read_compiled_limits(ledger)


@pytest.mark.parametrize(
    ("compilations", "text"),
    [
        ([needs(30, 0.9), needs(31, 1.1)], "30"),
        ([needs(20, 0.6), needs(30, 0.9), needs(40, 1.3)], "30-39"),
        ([needs(20, 0.6)], ">=20"),
        ([needs(40, 1.3)], "<40"),
        ([needs(1, 1.3)], "0"),
        # The largest below the smallest that does not fit.
        ([needs(20, 0.6), needs(30, 1.1), needs(31, 0.9), needs(32, 1.2)], "20-29"),
    ],
)
def test_a_limit_has_both_sides(compilations: list[Compilation], text: str, tmp_path: Path) -> None:
    (limit,) = limits_of(tmp_path, *compilations)
    assert limit.text == text
    assert limit.workload == SETUP.workload
    assert limit.budget_bytes == USABLE
    assert limit.compilations == len(compilations)


def test_a_tpus_refusal_is_a_side(tmp_path: Path) -> None:
    tpu = CompileTarget("tpu", "tpu-v2-8", "v2:2x2", 8)
    refused = Compilation(5, NO_ROOM, None, "exceeds available HBM", 1.0)
    (limit,) = limits_of(tmp_path, needs(4, 0.1), refused, target=tpu)
    assert (limit.text, limit.target.replicas) == ("4", 8)


def test_the_newest_versions_count_and_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    limits_of(tmp_path, needs(30, 0.9), versions='{"a": "1"}')
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        ledger.execute("UPDATE compilations SET time_utc = '2020-01-01T00:00:00+00:00'")
    limits_of(tmp_path, needs(40, 0.9), versions='{"a": "2"}')
    gone = CompileTarget("gpu", "abacus", "a description")
    described_anew = CompileTarget("gpu", "t4", "another description")
    limits_of(tmp_path, needs(9, 0.1), target=gone)
    (limit,) = limits_of(tmp_path, needs(50, 0.9), target=described_anew)
    assert limit.text in (">=40", ">=50")  # recorded in the same second
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        assert read_compiled_limits(ledger)
        assert not ledger.damaged
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        ledger.execute("UPDATE compilations SET workload_key = '{'")
        assert read_compiled_limits(ledger) == []
        assert ledger.damaged


def test_they_are_listed_and_reported_as_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (limit,) = limits_of(tmp_path, needs(30, 0.9), needs(31, 1.1))
    path = tmp_path / "l.sqlite"
    listed = CliRunner().invoke(command, ["list", "--ledger", str(path)]).output
    assert "1 limit by compilers, of devices where nothing was run" in listed
    assert listed.splitlines()[-1].split() == (
        ["bert-base", "384", "none,", "XLA", "t4", "14.9", "GiB", "30", "2"]
    )
    assert all(len(line) <= 80 for line in listed.splitlines()[1:])
    out = CliRunner().invoke(command, ["list", "--ledger", str(path), "--json", "-"]).output
    values = json.loads(out)
    assert values["compiled"][0]["max_batch"] == 30
    assert values["cells"] == []
    report = Report(path, [], [], 32, datetime.now(timezone.utc), [limit])
    show_report(report)
    for text in (capsys.readouterr().out, build_page(report)):
        assert "1 limit by compilers" in text
        assert "t4, 14.9 GiB" in text
        assert "nothing was run there" in text
    # The published limit stands beside it.
    table = report.compiled_tables[0].frame
    assert list(table.iloc[0])[2:] == ["12", "30"]
    other = dataclasses.replace(limit, levers=Levers(xla=True, precision="bf16"))
    assert len(dataclasses.replace(report, compiled=[limit, other]).compiled_tables) == 2
