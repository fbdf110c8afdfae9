"""Nothing from a file or the command line commands the terminal, or leaves its place elsewhere."""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import json
import logging
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from bertbench.cli import main
from bertbench.core.progress import progress
from bertbench.core.terminal import clean_text, clean_warnings, echo, say, terminal
from bertbench.ledger.records import LedgerRow
from bertbench.ledger.trial_table import export, to_frame
from helpers.ledger_rows import fits, oom, rows_of
from helpers.paths import REPOSITORY
from helpers.run_folders import squad_run
from reports.measured_cells import collect_cells
from reports.page import build_page
from reports.report import Report
from reports.runs import read_run
from reports.tables import write_tables
from reports.text import show_report

EVIL = "\x1b]0;owned\x07\x9b31m\u202e|<script>alert(1)</script>\r\x7f"
PACKAGES = ("bertbench", "finetune", "reports")


def evil_rows() -> list[LedgerRow]:
    return [
        dataclasses.replace(
            row,
            model=f"model{EVIL}",
            device=f"=device{EVIL}",
            question=dataclasses.replace(row.question, workload="{}"),
            trial=dataclasses.replace(row.trial, message=EVIL),
        )
        for row in rows_of(fits(3), oom(4), fits(3))
    ]


def commands_in(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c not in "\n\t"}


@given(st.text())
def test_what_is_cleaned_has_nothing_to_command(text: str) -> None:
    cleaned = clean_text(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in cleaned)
    assert not set(cleaned) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028")
    cleaned.encode()  # also to a terminal that takes UTF-8 alone
    if text.isprintable():
        assert cleaned == text


def test_control_characters_are_shown_as_python_writes_them() -> None:
    assert clean_text("a\x1b[1m\tb\n\u202e\udcff") == "a\\x1b[1m\tb\n\\u202e\\udcff"
    assert clean_text("möchte 日本 😀 \u200d") == "möchte 日本 😀 \u200d"


def test_every_way_out_is_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    echo(EVIL)
    terminal().print(EVIL)
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    terminal().print(table)
    with progress(EVIL, 1, "x") as advance:
        advance(1, EVIL)
    with pytest.raises(SystemExit):
        main(["plan", "--allow", EVIL])
    with pytest.raises(SystemExit):
        main(["report", "--run", EVIL])
    with pytest.raises(SystemExit):
        main([EVIL])
    out, err = capsys.readouterr()
    assert not commands_in(out)
    assert not commands_in(err)
    assert out.count("owned") >= 4
    assert err.count("owned") >= 5


def test_warnings_are_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    clean_warnings()
    handler = logging.lastResort
    assert handler is not None
    handler.handle(logging.LogRecord("finetune", logging.WARNING, "", 0, EVIL, (), None))
    assert "owned" in (err := capsys.readouterr().err)
    assert not commands_in(err)


def test_nothing_else_writes_to_the_terminal() -> None:
    """All packages print through `bertbench.core.terminal`, and rich through its console."""
    for path in (file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")):
        if path.name in ("terminal.py", "__main__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "click.echo", "click.secho", "Console"), path


def test_a_report_of_evil_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / EVIL.replace("/", "")).mkdir()
    folder = squad_run(tmp_path / EVIL.replace("/", ""), task=EVIL, results={EVIL: 1.0})
    folder = folder.rename(folder.with_name(EVIL.replace("/", "")))
    report = Report(tmp_path / "l", evil_rows(), [read_run(folder)], 32, datetime.now(timezone.utc))
    show_report(report)
    out = capsys.readouterr().out
    assert not commands_in(out)
    assert "owned" in out
    page = build_page(report)
    assert not commands_in(page)
    assert "<script>alert" not in page
    assert "owned" in page


def test_settings_of_another_version_are_named_in_tables() -> None:
    (row,) = rows_of(fits(3))
    cells = collect_cells([dataclasses.replace(row, levers={"checkpointing": f"\ud800{EVIL}"})])
    markdown = write_tables(cells, ".md")
    assert "\\\\ud800" in markdown
    assert not commands_in(markdown)


def test_tables_of_evil_names() -> None:
    cells = collect_cells(evil_rows())
    markdown = write_tables(cells, ".md")
    assert "\\|\\<script>alert" in markdown
    assert not commands_in(markdown)
    columns = {line.replace("\\|", "").count("|") for line in markdown.split("\n") if "|" in line}
    assert len(columns) <= 2  # those of the table, and of its title
    latex = write_tables(cells, ".tex")
    assert not commands_in(latex)
    assert "<script>" not in latex
    rows = list(csv.reader(io.StringIO(write_tables(cells, ".csv"))))
    assert len(rows) == 2
    assert any(cell.startswith("'=device") for cell in rows[1])


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]


@pytest.mark.parametrize("formula", FORMULAS)
def test_texts_are_no_formulas_in_csv(tmp_path: Path, formula: str) -> None:
    rows = [dataclasses.replace(row, model=formula) for row in rows_of(fits(3), oom(4))]
    export(rows, tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["model"] == f"'{clean_text(formula)}"
    frame = pd.read_csv(tmp_path / "x.csv")
    wanted = to_frame(rows)
    for name in ("batch", "peak_bytes", "budget_bytes", "step_seconds"):
        pd.testing.assert_series_equal(
            frame[name].astype(float), wanted[name].astype(float), check_names=False
        )
    export(rows, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())[0]["model"] == formula


def test_numbers_stay_numbers_in_csv(tmp_path: Path) -> None:
    (row,) = rows_of(fits(3, seconds=-2.0))
    export([row], tmp_path / "x.csv")
    assert pd.read_csv(tmp_path / "x.csv")["step_seconds"].tolist() == [-2.0]


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_texts_of_no_characters_are_exported(tmp_path: Path, kind: str) -> None:
    (row,) = rows_of(fits(3))
    path = tmp_path / f"x.{kind}"
    export([dataclasses.replace(row, levers={"\ud800": "\udfff"}, model="a\ud800")], path)
    read = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}[kind]
    frame = read(path)
    assert frame["model"].tolist() == ["a\\ud800"]
    assert frame["\\ud800"].tolist() == ["\\udfff"]
