"""`bertbench report` from the outside."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bertbench.cli.report import command
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import Budget
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import record
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing
from helpers.ledger_rows import CPU, failed, fits, oom, rows_of
from reports.comparison import compare_cells, read_either
from reports.measured_cells import collect_cells


def report(*arguments: str | Path) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def write(path: Path, *trials: tuple[int, Trial], mib: int = 512) -> Path:
    with open_ledger(path) as ledger:
        for seq_len, trial in trials:
            workload = published_workload("bert-tiny", seq_len)
            budget = Budget(CPU, mib * MIB_BYTES)
            record(ledger, Question(budget, Setup(workload)), trial)
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return write(tmp_path / "l.sqlite", (64, fits(303, 469, 0.5)), (64, oom(304)), (128, fits(9)))


def test_in_the_terminal(ledger: Path, tmp_path: Path) -> None:
    text = report("--ledger", ledger)
    assert "3 trials of 2 cells; 1 certified." in text
    assert "303*" in text
    assert ">=9" in text
    assert "Plans for an effective batch of 32" in text
    assert max(map(len, text.splitlines())) <= 80
    assert not list(tmp_path.glob("*.html"))


def test_a_ledger_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such ledger"):
        report("--ledger", tmp_path / "none.sqlite")
    # The user's own may be missing: looking does not make it.
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "own.sqlite"))
    output = report()
    assert f"no ledger at {tmp_path / 'own.sqlite'} yet" in output
    assert "No trials in own.sqlite yet" in output
    assert not (tmp_path / "own.sqlite").exists()


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("r.html", "<!doctype html>"),
        ("r.md", "Max Batch Size, squad"),
        ("r.tex", "\\begin{table}"),
        ("r.csv", "device,"),
        ("r.json", '{\n "cells"'),
    ],
)
def test_files(ledger: Path, tmp_path: Path, name: str, begins: str) -> None:
    path = tmp_path / name
    output = report("--ledger", ledger, "--out", path)
    assert path.read_text().startswith(begins)
    assert "303*" not in output
    with pytest.raises(InputError, match=r"exists already.*--force"):
        report("--ledger", ledger, "--out", path)
    assert "303*" in report("--ledger", ledger, "--out", path, "--force", "--text")


def test_a_folder_has_all_of_it(ledger: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    report("--ledger", ledger, "--out", folder)
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "limits.md", "limits.csv", "limits.tex", "limits.json"} <= names
    pictures = {name.rpartition(".")[0] for name in names if name.endswith(".png")}
    assert pictures == {name.rpartition(".")[0] for name in names if name.endswith(".svg")}
    assert "limits-squad" in pictures
    with pytest.raises(InputError, match="exists already"):
        report("--ledger", ledger, "--out", folder)
    (folder / "notes.txt").write_text("mine")
    again = report("--ledger", ledger, "--out", folder, "--force")
    assert "left 1 other file in" in again
    assert (folder / "notes.txt").read_text() == "mine"
    # A folder is one whatever its name ends in, and those above it are made.
    (tmp_path / "v1.2").mkdir()
    report("--ledger", ledger, "--out", tmp_path / "v1.2")
    assert (tmp_path / "v1.2" / "report.html").exists()
    report("--ledger", ledger, "--out", tmp_path / "new" / "limits.md")
    assert (tmp_path / "new" / "limits.md").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "r.pdf"], r"unknown kind of file '\.pdf'.*\.html"),
        (["--compare", "a", "b", "--out", "r.html"], "--compare does not go with --out"),
        (["--compare", "a", "b", "--target-batch", "8"], "--compare does not go with --target-b"),
        (["--compare", "a", "b", "--run", "."], r"does not go with --run; .*--json FILE"),
        (["--compare", "a", "b", "--force"], "does not go with --force"),
        (["--run", "."], "no run in this folder"),
    ],
)
def test_wrong_input(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BERTBENCH_LEDGER", str(ledger))
    with pytest.raises(InputError, match=words):
        report(*arguments)


def test_json(ledger: Path) -> None:
    values = json.loads(report("--ledger", ledger, "--json", "-"))
    assert [cell["max_batch"] for cell in values["cells"]] == [303, 9]
    assert values["cells"][0]["evidence"] == "certified"
    assert values["runs"] == []


def test_comparing(ledger: Path, tmp_path: Path) -> None:
    after = write(
        tmp_path / "after.sqlite", (64, fits(303, 938, 0.25)), (64, fits(606)), (64, oom(607)),
        (256, fits(1)),
    )  # fmt: skip
    text = report("--compare", ledger, after)
    assert max(len(line) for line in text.splitlines() if not line.startswith(("A:", "B:"))) <= 80
    assert "max batch B/A: 2.000 (2.000 to 2.000, 1 cell)" in text
    assert "peak bytes B/A: 2.000" in text
    assert "examples per second B/A: 2.000" in text
    assert "1 cell only in A" in text
    assert "1 cell only in B" in text
    values = json.loads(report("--compare", ledger, after, "--json", "-"))
    assert values["ratios"]["max_batch"] == {"count": 1, "mean": 2.0, "least": 2.0, "most": 2.0}
    assert values["pairs"][0]["after"]["max_batch"] == 606
    other = write(tmp_path / "other.sqlite", (512, fits(1)))
    assert "no cell is in both" in report("--compare", ledger, other)


def test_comparing_prefers_the_same_budget() -> None:
    before = [*rows_of(fits(3), oom(4), mib=100), *rows_of(fits(6), oom(7), mib=200, first=9)]
    after = [*rows_of(fits(9), oom(10), mib=300, first=9), *rows_of(fits(5), oom(6), mib=100)]
    found = compare_cells(collect_cells(before), collect_cells(after))
    assert [(p.before.max_batch, p.after.max_batch) for p in found.pairs] == [(3, 5)]
    # The newest ones where there is no budget in common.
    found = compare_cells(collect_cells(before), collect_cells(after[:2]))
    assert [(p.before.max_batch, p.after.max_batch) for p in found.pairs] == [(6, 9)]
    assert (found.only_before, found.only_after) == (1, 0)
    # Every cell is in one pair, or counted.
    before += rows_of(fits(7), oom(8), mib=200, device=dataclasses.replace(CPU, name="B"), first=20)
    after += rows_of(fits(8), oom(9), mib=200, first=20)
    found = compare_cells(collect_cells(before), collect_cells(after))
    assert [(p.before.max_batch, p.after.max_batch) for p in found.pairs] == [(3, 5), (6, 8)]
    assert (found.only_before, found.only_after) == (1, 1)
    # What was not the limit of one is not divided by the other's.
    found = compare_cells(collect_cells(rows_of(fits(1))), collect_cells(rows_of(fits(9), oom(10))))
    assert found.pairs[0].limit_ratio is None
    # Where nothing fits there is no ratio.
    found = compare_cells(collect_cells(rows_of(oom(1))), collect_cells(rows_of(fits(2), oom(3))))
    assert found.pairs[0].limit_ratio is None
    assert found.spreads["max_batch"] is None


def test_other_names_of_the_same_are_compared() -> None:
    (row,) = rows_of(fits(3))
    older = {name: value for name, value in row.levers.items() if name != "placement"}
    other = dataclasses.replace(
        row, model="bert-base-uncased", levers=older,
        question=dataclasses.replace(row.question, levers=json.dumps(older)),
    )  # fmt: skip
    assert len(compare_cells(collect_cells([row]), collect_cells([other])).pairs) == 1


def test_shapes_of_one_name_are_not_compared() -> None:
    (row,) = rows_of(fits(3), model="bert-mini")
    shape = dataclasses.replace(published_workload("bert-mini", 384).config, num_attention_heads=1)
    key = dataclasses.replace(published_workload("bert-mini", 384), config=shape).key()
    other = dataclasses.replace(row, question=dataclasses.replace(row.question, workload=key))
    found = compare_cells(collect_cells([row]), collect_cells([other]))
    assert (len(found.pairs), found.only_before, found.only_after) == (0, 1, 1)


def test_devices_of_a_comparison_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        for name in ("One", "Two"):
            budget = Budget(dataclasses.replace(CPU, name=name), 512 * MIB_BYTES)
            workload = published_workload("bert-tiny", 64)
            record(ledger, Question(budget, Setup(workload)), fits(3))
    lines = report("--compare", path, path).splitlines()
    assert lines.count("squad, 512 MiB on One") == lines.count("squad, 512 MiB on Two") == 1


def test_other_budgets_are_told_of(tmp_path: Path) -> None:
    small = write(tmp_path / "small.sqlite", (64, fits(300)), (64, oom(301)), mib=512)
    large = write(tmp_path / "large.sqlite", (64, fits(600)), (64, oom(601)), mib=1024)
    text = report("--compare", small, large)
    names = [f"{size} MiB on Some & CPU (2 cores)" for size in ("512", "1,024")]
    assert f"squad, {names[0]} in A and {names[1]} in B" in text
    assert "1 cell had another budget in B than in A" in text
    assert f"A: {small}: 512 MiB on Some & CPU (2 cores)" in text
    assert "another budget" not in report("--compare", small, small)


def test_many_settings_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    settings = [
        Levers(parse_checkpointing("nested:1+selective"), accumulation_steps=steps, xla=True)
        for steps in range(2, 6)
    ]
    with open_ledger(path) as ledger:
        for seq_len in (64, 128):
            workload = published_workload("bert-base-cased", seq_len)
            for number, levers in enumerate(settings):
                for trial in (fits(seq_len + number), oom(seq_len + number + 1)):
                    record(ledger, Question(Budget(CPU, 512 << 20), Setup(workload, levers)), trial)
    lines = report("--ledger", path).splitlines()
    assert max(map(len, lines)) <= 80
    first = lines.index(next(line for line in lines if line.startswith("System")))
    words = [line.split() for line in lines[first + 1 : first + 9]]
    assert [line[1] for line in words] == ["64"] * 4 + ["128"] * 4
    assert [line[-1] for line in words] == [f"{64 + n}*" for n in range(4)] + [
        f"{128 + n}*" for n in range(4)
    ]
    assert "nested:1+selective, XLA, 5 micro-batches" in lines[first + 4]
    assert max(map(len, report("--compare", path, path).splitlines()[2:])) <= 80


def test_names_and_messages_are_shown_as_they_are(tmp_path: Path) -> None:
    path = write(
        tmp_path / "l.sqlite", (64, fits(3)),
        (128, dataclasses.replace(failed(4), message="no [/usr/lib/x.so] [red]for[a,b] :smile:")),
    )  # fmt: skip
    folder = tmp_path / "run_[bold]n[x]"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    text = report("--ledger", path, "--run", folder)
    assert "batch 4: no [/usr/lib/x.so] [red]for[a,b] :smile:" in text
    assert "run_[bold]n[x]" in text
    report("--compare", path, path)


def test_a_probe_file_can_be_compared(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "device": {**CPU.to_json(), "budget_bytes": 512 * MIB_BYTES},
        "versions": {"tensorflow": "2"},
        "cells": [
            {
                "model": "bert-tiny", "seq_len": 64, "head": "squad", "levers": Levers().to_json(),
                "trials": [fits(300).to_json(), oom(301).to_json()],
            }
        ],
    }  # fmt: skip
    path = tmp_path / "p.json"
    path.write_text(json.dumps(values))
    (cell,) = read_either(path)
    assert (cell.max_batch, cell.evidence) == (300, "certified")
    for text in ("{}", "[1]", "no"):
        path.write_text(text)
        with pytest.raises(InputError, match="neither a ledger nor a probe's result"):
            read_either(path)
    values["cells"][0]["model"] = "bert-huge"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"p\.json: .*unknown model 'bert-huge'"):
        read_either(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_either(tmp_path / "gone")
