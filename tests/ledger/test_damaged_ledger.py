"""A ledger with damaged rows, or one that may only be read, ends no command."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bertbench.cli.ledger import command as ledger_command
from bertbench.cli.plan import command as plan_command
from bertbench.cli.report import command as report_command
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import Budget, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.hardware.step_time import device_rates
from bertbench.ledger import database
from bertbench.ledger.database import Ledger, open_ledger, read_ledger
from bertbench.ledger.limit import find_limit
from bertbench.ledger.question import Question, versions_key
from bertbench.ledger.records import (
    find,
    find_allocations,
    read_device_rows,
    read_rows,
    record,
    record_allocations,
)
from bertbench.memory.allocator.recording import Recording
from bertbench.planning.calibration import Calibration, read_calibration
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from reports.comparison import read_either
from reports.measured_cells import collect_cells

WORKLOAD = published_workload("bert-tiny", 64)
GOOD = (Trial(4, "fits", 5 * MIB_BYTES, 0.25, 3.5, "", True), Trial(5, "oom", fresh=True))

DEEP = "[" * 100_000
WRONG: tuple[Any, ...] = (
    b"\xff\xfe\x00", "", "text", "\udce4", -1, 0, 2**62, -(2**63), 1.5, float("inf"), 1e308,
    "{}", "[]", "null", "{", "[1]", DEEP, '{"a": ' + DEEP, "1" * 5000, '{"x": ' + "9" * 5000 + "}",
    '{"x": NaN}', '{"x": {"y": [1]}}', '{"checkpointing": 5}', '{"accumulation_steps": "many"}',
    '{"accumulation_steps": -3}', '{"outcome": "fits"}', '{"kind": [1], "name": 2}',
    '{"seq_len": "64"}', '{"config": {"hidden_size": -1}}', "\x1b[31mred", "=1+1",
)  # fmt: skip


def budget() -> Budget:
    return make_budget(resolve_device("cpu"), 64 * MIB_BYTES)


def columns(ledger: Ledger) -> list[str]:
    return [row[1] for row in ledger.execute("PRAGMA table_info(trials)") if row[1] != "id"]


def damage(path: Path, wrong: tuple[Any, ...] = WRONG) -> int:
    """Add a copy of a good row for every column and wrong value; return how many."""
    with open_ledger(path) as ledger:
        for trial in GOOD:
            record(ledger, Question(budget(), Setup(WORKLOAD)), trial)
        ledger.execute("BEGIN")  # one wait for the disk, not hundreds
        (last,) = ledger.execute("SELECT max(id) FROM trials").fetchone()
        count = 0
        names = columns(ledger)
        for number, column, value in itertools.product((last - 1, last), names, wrong):
            others = ", ".join(name for name in names if name != column)
            text = isinstance(value, str)
            data = value.encode("utf-8", "surrogateescape") if text else value
            ledger.execute(
                f"INSERT INTO trials ({column}, {others}) SELECT "
                f"{'CAST(? AS TEXT)' if text else '?'}, {others} FROM trials WHERE id = ?",
                (data, number),
            )
            count += 1
        ledger.execute("COMMIT")
        return count


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_told", set())


def invoke(command: Any, *arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, (InputError, SystemExit)):
        raise result.exception
    return result


READERS = [
    (ledger_command, "list"),
    (ledger_command, "list", "--trials"),
    (ledger_command, "list", "--json", "-"),
    (ledger_command, "export", "l.csv"),
    (ledger_command, "export", "l.json"),
    (ledger_command, "export", "l.parquet"),
    (report_command, "--text"),
    (report_command, "--json", "-"),
    (report_command, "--out", "r.md"),
    (report_command, "--out", "r.csv"),
    (report_command, "--out", "r.html"),
    (plan_command, "--model", "bert-tiny", "--seq-len", "64", "--memory", "128MiB",
     "--target-batch", "4", "--device", "cpu"),
]  # fmt: skip


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged") / "l.sqlite"
    damage(path)
    return path


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: "-".join(reader[1:3]))
def test_damaged_rows_are_counted_in_one_line(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: tuple[Any, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = shutil.copyfile(damaged, tmp_path / "l.sqlite")
    result = invoke(*reader, "--ledger", path)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "passed over" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: {path}: passed over ")
    assert lines[0].endswith(" damaged rows; `bertbench ledger prune --damaged` takes them away")


def test_damaged_rows_can_be_taken_away(damaged: Path, tmp_path: Path) -> None:
    path = shutil.copyfile(damaged, tmp_path / "l.sqlite")
    with read_ledger(path) as ledger:
        good = read_rows(ledger)
    told = invoke(ledger_command, "prune", "--damaged", "--ledger", path).output
    count = int(told.split(" trials match")[0].split()[-1])
    assert count > 500
    assert f"deleted {count} trials" in invoke(
        ledger_command, "prune", "--damaged", "--yes", "--ledger", path
    ).output  # fmt: skip
    with read_ledger(path) as ledger:
        assert read_rows(ledger) == good
        assert ledger.damaged == set()


def test_a_damaged_row_is_counted_once_however_often_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        for trial in (*GOOD, *GOOD):
            record(ledger, Question(budget(), Setup(WORKLOAD)), trial)
        ledger.execute("UPDATE trials SET outcome = 'maybe' WHERE id = 1")
        ledger.execute("UPDATE trials SET seconds = 'long' WHERE id = 2")
        for _ in range(2):
            question = Question(budget(), Setup(WORKLOAD))
            assert find(ledger, question) == list(GOOD)
            assert [row.id for row in read_rows(ledger)] == [3, 4]
            rows = read_device_rows(ledger, budget().device, versions_key(), WORKLOAD, 10)
            assert [row.id for row in rows] == [3, 4]
    with read_ledger(path) as ledger:
        read_rows(ledger)
    assert capsys.readouterr().err.startswith(f"warning: {path}: passed over 2 damaged rows; ")


def test_a_damaged_recording_is_counted_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "l.sqlite"
    recording = Recording((0, ~0), (64,), ("op",))
    question = Question(budget(), Setup(WORKLOAD))
    with open_ledger(path) as ledger:
        for batch in (2, 3, 4, 5):
            record_allocations(ledger, question, batch, recording)
        ledger.execute("UPDATE recordings SET recording = x'ff00' WHERE batch = 3")
        ledger.execute("UPDATE recordings SET recording = substr(recording, 5) WHERE batch = 4")
        ledger.execute("UPDATE recordings SET batch = -5 WHERE batch = 5")
        assert [one.batch for one in find_allocations(ledger, question)] == [2]
    assert capsys.readouterr().err == f"warning: {path}: passed over 3 damaged rows\n"


KILLED = "killed by the kernel for want of host memory (/proc/vmstat)"
"""What earlier versions recorded as out of memory."""


def test_a_kill_by_the_kernel_that_was_recorded_as_a_limit_is_read_as_failed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "l.sqlite"
    question = Question(budget(), Setup(WORKLOAD))
    killed = Trial(5, "oom", message=KILLED, fresh=True)
    with open_ledger(path) as ledger:
        for trial in (GOOD[0], killed):
            record(ledger, question, trial)
        assert find(ledger, question) == [GOOD[0]]
        (row,) = read_device_rows(ledger, budget().device, versions_key(), WORKLOAD, 10)
        assert row.trial == GOOD[0]
        rows = read_rows(ledger)
    assert [row.trial.outcome for row in rows] == ["fits", "failed"]
    (cell,) = collect_cells(rows)
    assert (cell.max_batch, cell.evidence) == (4, "at least")
    (listed,) = json.loads(invoke(ledger_command, "list", "--ledger", path, "--json", "-").stdout)[
        "cells"
    ]
    assert (listed["smallest_out_of_memory"], listed["evidence"]) == (None, "at least")
    out = tmp_path / "l.csv"
    invoke(ledger_command, "export", out, "--ledger", path)
    assert ",oom," not in out.read_text()
    probed = tmp_path / "p.json"
    values = {
        "device": {**budget().device.to_json(), "budget_bytes": budget().budget_bytes},
        "versions": {},
        "cells": [
            {
                "model": "bert-tiny",
                "head": "squad",
                "seq_len": 64,
                "levers": Levers().to_json(),
                "certificate": {"fits": GOOD[0].to_json(), "oom": killed.to_json()},
                "trials": [GOOD[0].to_json(), killed.to_json()],
            }
        ],
    }
    probed.write_text(json.dumps(values))
    (cell,) = read_either(probed)
    assert (cell.max_batch, cell.evidence) == (4, "at least")


def malformed(path: Path) -> None:
    with open_ledger(path) as ledger:
        ledger.execute("BEGIN")
        for _ in range(400):
            record(ledger, Question(budget(), Setup(WORKLOAD)), GOOD[1])
        ledger.execute("COMMIT")
    data = bytearray(path.read_bytes())
    data[3 * 4096 :] = b"\xa5" * (len(data) - 3 * 4096)
    path.write_bytes(data)


def altered(*statements: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with open_ledger(path) as ledger:
            for statement in statements:
                ledger.execute(statement)

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (malformed, "not a usable ledger"),
        (lambda path: path.write_bytes(b"no database" * 500), "not a usable ledger"),
        (lambda path: path.write_bytes(b"SQLite format 3\0"), "not a usable ledger"),
        (altered("PRAGMA user_version = 99"), "upgrade bertbench"),
        (altered("PRAGMA application_id = 7"), "another program"),
        (altered("DROP TABLE trials"), "not a usable ledger"),
        (altered("ALTER TABLE trials DROP COLUMN message"), "not a usable ledger"),
    ],
)
def test_a_file_that_is_no_ledger_is_one_line_and_a_plan_does_without(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "l.sqlite"
    make(path)
    for reader in (READERS[0], READERS[3], READERS[6], READERS[-1]):
        result = invoke(*reader, "--ledger", path)
        assert isinstance(result.exception, InputError), result.output
        assert f"{path}: " in str(result.exception)
        assert words in str(result.exception)
        assert "\n" not in str(result.exception)
    monkeypatch.setenv("BERTBENCH_LEDGER", str(path))
    device = budget().device
    capsys.readouterr()
    assert read_calibration(device, WORKLOAD, device_rates(device)) == Calibration()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: ")
    assert line.endswith("; planning without it")


def test_an_empty_file_is_an_empty_ledger_and_stays_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "l.sqlite"
    path.touch()
    for reader in (READERS[0], READERS[3], READERS[6], READERS[-1]):
        assert invoke(*reader, "--ledger", path).exit_code == 0
    assert path.stat().st_size == 0


AS_ANOTHER_USER = """

import os, sys
from click.testing import CliRunner
from test_damaged_ledger import READERS

def read(path):
    for reader in (READERS[0], READERS[3], READERS[6], READERS[-1]):
        result = CliRunner().invoke(reader[0], [*map(str, reader[1:]), "--ledger", path])
        yield result.exit_code, repr(result.exception)

os.chdir(sys.argv[2])
list(read(sys.argv[3]))  # with all that is imported late, which another user may not read
os.unlink("l.csv")
os.setuid(65534)
for code, exception in read(sys.argv[1]):
    print(code, exception)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("open_meanwhile", [False, True])
def test_a_ledger_that_may_only_be_read_is_read_by_all(open_meanwhile: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, out = Path(name, "ro"), Path(name, "out")
        folder.mkdir()
        out.mkdir()
        os.chmod(name, 0o755)
        os.chmod(out, 0o777)
        path = folder / "l.sqlite"
        with open_ledger(path) as ledger:
            record(ledger, Question(budget(), Setup(WORKLOAD)), GOOD[0])
            shutil.copyfile(path, out / "own")
            if not open_meanwhile:
                ledger.close()
            for file in folder.iterdir():
                file.chmod(0o444)
            folder.chmod(0o555)
            found = subprocess.run(
                [sys.executable, "-c", AS_ANOTHER_USER, str(path), str(out), str(out / "own")],
                capture_output=True,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
                    "HOME": str(out),
                },
            )
    assert found.stdout == "0 None\n" * 4, found.stdout + found.stderr


def test_any_damaged_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """Bytes changed, cut off or put in, anywhere: never another error, seldom another answer."""
    path = tmp_path / "l.sqlite"
    question = Question(budget(), Setup(WORKLOAD))
    with open_ledger(path) as ledger:
        ledger.execute("BEGIN")
        for trial in GOOD * 20:
            record(ledger, question, trial)
        for batch in (2, 3):
            record_allocations(ledger, question, batch, Recording((0, ~0), (64,), ("op",)))
        ledger.execute("COMMIT")
    whole = path.read_bytes()
    draw = random.Random(0)
    read = 0
    for _ in range(120):
        data = bytearray(whole)
        at = draw.randrange(len(data))
        how = draw.choice(["bit", "bytes", "cut", "more"])
        if how == "bit":
            data[at] ^= 1 << draw.randrange(8)
        elif how == "bytes":
            data[at : at + 40] = draw.randbytes(40)
        elif how == "cut":
            del data[at:]
        else:
            data[at:at] = draw.randbytes(draw.randrange(1, 5000))
        path.write_bytes(data)
        try:
            with read_ledger(path) as ledger:
                cells = collect_cells(read_rows(ledger))
                read_device_rows(ledger, budget().device, versions_key(), WORKLOAD, 10)
                known = find(ledger, question)
                find_allocations(ledger, question)
        except InputError:
            continue
        read += 1
        assert find_limit(known).max_batch in (4, None)
        assert all(cell.max_batch in (4, None) for cell in cells if len(cell.rows) > 2)
    assert read > 20
