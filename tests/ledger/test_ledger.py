"""The ledger keeps every trial, answers only with real answers, and explains its troubles."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import Device, make_budget
from bertbench.ledger import database
from bertbench.ledger import records as ledger_module
from bertbench.ledger.database import Ledger, default_ledger_path, open_ledger, read_ledger
from bertbench.ledger.question import Question, versions_key
from bertbench.ledger.records import (
    find,
    find_allocations,
    read_rows,
    record,
    record_allocations,
)
from bertbench.memory.allocator.recording import Recording
from bertbench.trials.trial import Trial, trial_from_json
from finetune.errors import InputError
from finetune.spec.checkpointing import Checkpointing
from helpers.paths import LIBRARY, REPOSITORY

DEVICE = Device("cpu", 0, "Some CPU", None, 16 * GIB_BYTES, 8 * GIB_BYTES)
BUDGET = make_budget(DEVICE, GIB_BYTES)
WORKLOAD = published_workload("bert-tiny", 64)
LEVERS = Levers()
VERSIONS = '{"tensorflow": "2.21.0"}'
QUESTION = Question(BUDGET, Setup(WORKLOAD, LEVERS), VERSIONS)
FITS = Trial(4, "fits", 5 * GIB_BYTES, 0.25, 3.5, "", True, 6 * GIB_BYTES)
OOM = Trial(5, "oom", None, None, 12.0, "OOM when allocating tensor", False)
FAILED = Trial(6, "failed", None, None, 1.0, "killed by SIGSEGV", True)


def test_trials_come_back_unchanged_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.sqlite"
    with open_ledger(path) as ledger:
        for trial in (OOM, FITS, FAILED):
            record(ledger, QUESTION, trial)
    with open_ledger(path) as ledger:
        assert find(ledger, QUESTION) == [OOM, FITS]
        rows = read_rows(ledger)
    assert [row.trial for row in rows] == [OOM, FITS, FAILED]
    row = rows[0]
    assert (row.device, row.budget_bytes) == ("Some CPU", GIB_BYTES)
    assert (row.model, row.head, row.seq_len) == ("bert-tiny", "squad", 64)
    assert row.levers == LEVERS.to_json()
    assert row.versions == {"tensorflow": "2.21.0"}
    assert row.time_utc.endswith("+00:00")
    assert trial_from_json({**FITS.to_json(), "later": 1}) == FITS


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(QUESTION, budget=make_budget(DEVICE, 2 * GIB_BYTES)),
        dataclasses.replace(QUESTION, versions='{"tensorflow": "2.22.0"}'),
        *(
            dataclasses.replace(QUESTION, setup=setup)
            for setup in (
                Setup(published_workload("bert-tiny", 128), LEVERS),
                Setup(published_workload("bert-tiny", 64, "classifier"), LEVERS),
                Setup(WORKLOAD, Levers(checkpointing=Checkpointing("full"))),
                Setup(WORKLOAD, Levers(accumulation_steps=2)),
            )
        ),
    ],
)
def test_another_question_is_not_answered(tmp_path: Path, other: Question) -> None:
    assert other.key() != QUESTION.key()
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        record(ledger, QUESTION, FITS)
        assert find(ledger, other) == []


def test_the_same_work_under_another_name_is_answered(tmp_path: Path) -> None:
    renamed = Setup(dataclasses.replace(WORKLOAD, model="mine"), LEVERS)
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        record(ledger, QUESTION, FITS)
        assert find(ledger, dataclasses.replace(QUESTION, setup=renamed)) == [FITS]


def question_of(versions: str) -> Question:
    return dataclasses.replace(QUESTION, versions=versions)


WRITER = """
import sys
sys.path[:0] = {root!r}
from pathlib import Path
import test_ledger as t
with t.open_ledger({path!r}) as ledger:
    for batch in range(1, 10**6):
        trial = t.Trial(batch, "fits", 1, 1.0, 1.0)
        t.record(ledger, t.question_of({versions!r}), trial)
        print(batch, flush=True)
        if batch == {last}:
            break
"""


def start_writer(path: Path, versions: str, last: int) -> subprocess.Popen[str]:
    code = WRITER.format(
        root=[str(LIBRARY), str(REPOSITORY / "tests/ledger")],
        path=str(path),
        versions=versions,
        last=last,
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )


def test_a_kill_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with start_writer(path, "{}", 0) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
    with open_ledger(path) as ledger:
        batches = [trial.batch for trial in find(ledger, question_of("{}"))]
        assert batches[: len(told)] == told
        record(ledger, question_of("{}"), FITS)


def test_several_processes_make_and_write_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    keys = [f'{{"writer": "{number}"}}' for number in range(4)]
    writers = [start_writer(path, key, 25) for key in keys]
    for writer in writers:
        writer.communicate(timeout=100)
        assert writer.returncode == 0
    with open_ledger(path) as ledger:
        for key in keys:
            found = find(ledger, question_of(key))
            assert [trial.batch for trial in found] == list(range(1, 26))


def fill(ledger: Ledger) -> None:
    for _ in range(1000):
        record(ledger, QUESTION, FITS)


def test_a_full_or_read_only_disk_is_one_line_naming_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with open_ledger(path) as ledger:
        ledger.execute("PRAGMA max_page_count = 1")
        with pytest.raises(InputError, match=r"ledger\.sqlite: cannot use the ledger.*is full"):
            fill(ledger)
        ledger.execute("PRAGMA query_only = ON")
        with pytest.raises(InputError, match=r"ledger\.sqlite: cannot use the ledger.*readonly"):
            record(ledger, QUESTION, FITS)
        assert find(ledger, QUESTION) != []


def test_what_is_no_ledger_is_refused_and_not_touched(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"not a database, but long enough to be looked at" * 100)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE recipes (cake TEXT)")
    connection.close()
    numbered = tmp_path / "numbered.sqlite"
    with sqlite3.connect(numbered) as connection:
        connection.execute("CREATE TABLE recipes (cake TEXT)")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    for path, words in [
        (text, "not a usable ledger"),
        (other, "another program"),
        (numbered, "another program"),
        (tmp_path, "cannot use the ledger"),
        (text / "below", "cannot use the ledger"),
    ]:
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(InputError, match=f"{path.name}: .*{words}"), open_ledger(path):
            pass
        assert not path.is_file() or path.read_bytes() == before


def test_a_newer_format_asks_for_an_upgrade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    this = database.SCHEMA_VERSION
    monkeypatch.setattr(database, "SCHEMA_VERSION", this + 1)
    with open_ledger(path):
        pass
    monkeypatch.undo()
    words = rf"format {this + 1}.*up to {this}; upgrade"
    with pytest.raises(InputError, match=words), open_ledger(path):
        pass


def record_in_version_1(ledger: Ledger) -> None:
    record(ledger, QUESTION, OOM)
    ledger.execute("DROP TABLE compilations")
    ledger.execute("DROP TABLE recordings")
    ledger.execute("ALTER TABLE trials DROP COLUMN process_peak_bytes")
    ledger.execute("PRAGMA user_version = 1")


def test_an_older_format_is_brought_up_to_date_with_its_trials(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with open_ledger(path) as ledger:
        record_in_version_1(ledger)
    for _ in range(2):
        with open_ledger(path) as ledger:
            assert find(ledger, QUESTION) == [OOM]
            assert find_allocations(ledger, QUESTION) == []
            assert ledger.execute("PRAGMA user_version").fetchone() == (database.SCHEMA_VERSION,)
            assert ledger.execute("SELECT * FROM compilations").fetchall() == []


@pytest.mark.parametrize("alone", [False, True])
def test_reading_changes_nothing(tmp_path: Path, alone: bool) -> None:
    path = tmp_path / "an older #1?.sqlite"
    with open_ledger(path) as ledger:
        record_in_version_1(ledger)
        before = path.read_bytes() if not alone else b""
        if not alone:  # while another process has it open, with changes that are in its log
            with read_ledger(path) as copy:
                assert [row.trial for row in read_rows(copy)] == [OOM]
            assert path.read_bytes() == before
    before = path.read_bytes()
    with read_ledger(path) as copy:
        assert [row.trial for row in read_rows(copy)] == [OOM]
        record(copy, QUESTION, FITS)
    assert path.read_bytes() == before
    with (
        pytest.raises(InputError, match=r"gone: .*cannot use the ledger"),
        read_ledger(tmp_path / "gone"),
    ):
        pass
    (tmp_path / "text").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(InputError, match=r"text: .*not a usable"), read_ledger(tmp_path / "text"):
        pass
    assert not (tmp_path / "gone").exists()


def test_a_damaged_page_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "damaged.sqlite"
    with open_ledger(path) as ledger:
        for _ in range(400):
            record(ledger, QUESTION, OOM)
    data = bytearray(path.read_bytes())
    data[3 * 4096 :] = b"\xa5" * (len(data) - 3 * 4096)
    path.write_bytes(data)
    with (
        pytest.raises(InputError, match=r"damaged\.sqlite: .*not a usable"),
        read_ledger(path) as copy,
    ):
        read_rows(copy)


def test_a_locked_ledger_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.1)
    path = tmp_path / "locked.sqlite"
    with open_ledger(path) as ledger:
        ledger.execute("PRAGMA journal_mode = DELETE")
        ledger.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InputError, match=r"locked\.sqlite: .*locked"), read_ledger(path):
            pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("logged", [False, True])
def test_a_ledger_in_a_folder_that_cannot_be_written(logged: bool) -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from bertbench.ledger.records import read_rows\n"
        "from bertbench.ledger.database import read_ledger\n"
        "from finetune.errors import InputError\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    with read_ledger(Path(sys.argv[1])) as copy:\n"
        "        print(len(read_rows(copy)))\n"
        "except InputError as error:\n"
        "    print('refused' if 'cannot use the ledger' in str(error) else error)\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name) / "l.sqlite"
        with open_ledger(path) as ledger:
            record(ledger, QUESTION, OOM)
            log = Path(f"{path}-wal").read_bytes()
        if logged:  # as after a copy, or a crash: what is in the log is not in the file
            Path(f"{path}-wal").write_bytes(log)
        os.chmod(name, 0o555)
        found = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
        ).stdout.strip()
    assert found == ("refused" if logged else "1")


def test_recordings_are_found_under_any_budget_at_the_nearest_lengths(tmp_path: Path) -> None:
    recording = Recording((0, ~0), (64,), ("op",))
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        for seq_len in (16, 32, 96, 512):
            setup = Setup(published_workload("bert-tiny", seq_len), LEVERS)
            for batch in (8, 2, 8):
                question = dataclasses.replace(QUESTION, setup=setup)
                record_allocations(ledger, question, batch, recording)
        other = dataclasses.replace(QUESTION, budget=make_budget(DEVICE, 2 * GIB_BYTES))
        found = find_allocations(ledger, other)
        lengths = [(one.seq_len, one.batch) for one in found]
        assert lengths == [(16, 2), (16, 8), (32, 2), (32, 8), (96, 2), (96, 8)]
        assert all(one.recording == recording for one in found)
        another = dataclasses.replace(BUDGET, device=dataclasses.replace(DEVICE, name="Another"))
        for changes in (
            {"budget": another},
            {"versions": "{}"},
            {"setup": Setup(published_workload("bert-mini", 64), LEVERS)},
            {"setup": Setup(WORKLOAD, Levers(accumulation_steps=2))},
        ):
            assert find_allocations(ledger, dataclasses.replace(QUESTION, **changes)) == []
        ledger.execute("UPDATE recordings SET recording = 'nonsense' WHERE batch = 2")
        found = find_allocations(ledger, QUESTION)
        assert [one.batch for one in found] == [8, 8, 8]


def test_every_record_is_synchronised(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.execute("PRAGMA synchronous").fetchone() == (2,)
        assert ledger.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        record(ledger, QUESTION, FITS)
        assert not ledger.in_transaction


def test_default_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BERTBENCH_LEDGER", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert default_ledger_path() == tmp_path / ".local/state/bertbench/ledger.sqlite"
    monkeypatch.setenv("XDG_STATE_HOME", os.fspath(tmp_path / "state"))
    assert default_ledger_path() == tmp_path / "state/bertbench/ledger.sqlite"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Application Support" in str(default_ledger_path())
    monkeypatch.setenv("BERTBENCH_LEDGER", "here.sqlite")
    assert default_ledger_path() == Path("here.sqlite")


def test_versions_are_found_without_importing_tensorflow() -> None:
    code = (
        "import sys; from bertbench.ledger.question import versions_key; print(versions_key());"
        "assert 'tensorflow' not in sys.modules"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    ).stdout
    versions = json.loads(output)
    assert output.strip() == versions_key()
    assert versions["tensorflow"].startswith("2.")
    assert versions["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_the_order_of_trials_is_that_of_recording_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(["2030-01-01T00:00:00+00:00", "1999-01-01T00:00:00+00:00"])
    monkeypatch.setattr(ledger_module, "_now", lambda: next(times))
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        record(ledger, QUESTION, FITS)
        record(ledger, QUESTION, OOM)
        assert find(ledger, QUESTION) == [FITS, OOM]
        assert [row.trial for row in read_rows(ledger)] == [FITS, OOM]


def test_rows_of_one_question_share_nothing_that_can_be_changed(tmp_path: Path) -> None:
    """Their levers are parsed once; whoever changes those of a row changes that row alone."""
    budget = make_budget(Device("cpu", 0, "cpu", None, GIB_BYTES, GIB_BYTES), GIB_BYTES // 2)
    question = Question(budget, Setup(published_workload("bert-tiny", 128)))
    with open_ledger(tmp_path / "ledger") as ledger:
        for batch in (1, 2):
            trial = Trial(batch, "fits", fresh=True)
            record(ledger, question, trial)
        first, second = read_rows(ledger)
    first.levers.clear()
    first.versions.clear()
    assert second.levers == Levers().to_json()
    assert second.versions == json.loads(versions_key())


def test_a_ledger_is_read_in_its_place_as_it_is_when_it_is_opened(tmp_path: Path) -> None:
    """A copy of it, with all its recordings, could be larger than memory."""
    budget = make_budget(Device("cpu", 0, "cpu", None, GIB_BYTES, GIB_BYTES), GIB_BYTES // 2)
    question = Question(budget, Setup(published_workload("bert-tiny", 128)))
    path = tmp_path / "ledger"

    def add(ledger: Ledger, batch: int) -> None:
        record(ledger, question, Trial(batch, "fits", fresh=True))

    with open_ledger(path) as writer:
        add(writer, 1)
        with read_ledger(path) as reader:
            assert reader.execute("PRAGMA database_list").fetchone()[2] == str(path)
            add(writer, 2)
            assert [row.trial.batch for row in read_rows(reader)] == [1]
            with pytest.raises(InputError, match="readonly"):
                add(reader, 3)
        with read_ledger(path) as reader:
            assert [row.trial.batch for row in read_rows(reader)] == [1, 2]
