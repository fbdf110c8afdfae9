"""The ledger: a durable record of all trials, in one SQLite file.

Every trial is committed, and synchronised to the disk, by itself; several processes may write at
once. Beside the trials are recordings of what some of them asked of the allocator, which tell where
the limits of their neighbours are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sqlite3
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from bertbench.allocations import Recording, recording_from_text, recording_to_text
from bertbench.devices import Budget
from bertbench.repetition import Recorded
from bertbench.trial import Trial
from bertbench.workload import Levers, Workload
from finetune.errors import InputError

SCHEMA_VERSION = 2
APPLICATION_ID = 0x62657274  # "bert": tells a ledger from other programs' SQLite files

_BUSY_SECONDS = 30.0

_SCHEMA_1 = """
CREATE TABLE trials (
    id INTEGER PRIMARY KEY,
    time_utc TEXT NOT NULL,
    budget_key TEXT NOT NULL,
    versions_key TEXT NOT NULL,
    workload_key TEXT NOT NULL,
    levers_key TEXT NOT NULL,
    device TEXT NOT NULL,
    budget_bytes INTEGER NOT NULL,
    model TEXT NOT NULL,
    head TEXT NOT NULL,
    seq_len INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    peak_bytes INTEGER,
    step_seconds REAL,
    seconds REAL NOT NULL,
    message TEXT NOT NULL,
    fresh INTEGER NOT NULL
);
CREATE INDEX trials_by_key ON trials (workload_key, levers_key, budget_key, versions_key);
"""

# What version 2 adds.
_SCHEMA_2 = """
ALTER TABLE trials ADD COLUMN process_peak_bytes INTEGER;
CREATE TABLE recordings (
    device_key TEXT NOT NULL,
    versions_key TEXT NOT NULL,
    model_key TEXT NOT NULL,
    levers_key TEXT NOT NULL,
    seq_len INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    time_utc TEXT NOT NULL,
    recording TEXT NOT NULL,
    PRIMARY KEY (device_key, versions_key, model_key, levers_key, seq_len, batch)
);
"""

_NEAREST_LENGTHS = 3

_TRIAL_COLUMNS = (
    "batch, outcome, peak_bytes, step_seconds, seconds, message, fresh, process_peak_bytes"
)


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """One recorded trial, for exports and reports.

    Attributes:
        id: rising in the order of recording.
        time_utc: when it was recorded, in ISO 8601.
        device: name of the device.
        budget_bytes: what the allocator could use.
        model: name of the model.
        head: task head.
        seq_len: tokens per example.
        levers: lever settings, as `Levers.to_json` writes them.
        versions: versions of what was measured, as `versions_key` writes them.
        trial: the trial itself.
        question: keys of device with budget, versions, workload and levers; trials with the same
            four answer the same question.
    """

    id: int
    time_utc: str
    device: str
    budget_bytes: int
    model: str
    head: str
    seq_len: int
    levers: dict[str, Any]
    versions: dict[str, str]
    trial: Trial
    question: tuple[str, str, str, str]

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; those of the trial beside the others."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["trial"], values["question"]
        return {**values, **self.trial.to_json()}


def default_ledger_path() -> Path:
    """`$BERTBENCH_LEDGER`, or `bertbench/ledger.sqlite` in the user's folder for such state."""
    chosen = os.environ.get("BERTBENCH_LEDGER")
    if chosen:
        return Path(chosen)
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    else:
        state = os.environ.get("XDG_STATE_HOME", "")
        # The XDG specification has relative paths ignored.
        base = Path(state) if os.path.isabs(state) else home / ".local" / "state"
    return base / "bertbench" / "ledger.sqlite"


@contextlib.contextmanager
def open_ledger(path: str | os.PathLike[str] | None = None) -> Iterator[sqlite3.Connection]:
    """Open a ledger, making it where it does not exist; it is closed with the `with` block.

    Args:
        path: the file; None means `default_ledger_path()`.

    Raises:
        InputError: it is damaged, not a ledger, of a newer version, or cannot be written. So do
            the functions of this module that are called inside the block.
    """
    path = Path(default_ledger_path() if path is None else path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: each statement is a transaction of its own.
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        with _explained(path):
            _prepare(connection, path)
        yield connection
    finally:
        connection.close()


def record(
    ledger: sqlite3.Connection,
    budget: Budget,
    versions: str,
    workload: Workload,
    levers: Levers,
    trial: Trial,
) -> None:
    """Write one trial; it is on the disk when this returns.

    Raises:
        InputError: the file cannot be written, for instance because the disk is full.
    """
    values = {
        "time_utc": _now(),
        "budget_key": budget.key(),
        "versions_key": versions,
        "workload_key": workload.key(),
        "levers_key": levers.key(),
        "device": budget.device.name,
        "budget_bytes": budget.budget_bytes,
        "model": workload.model,
        "head": workload.head,
        "seq_len": workload.seq_len,
        **trial.to_json(),
    }
    names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
    with _explained(_path_of(ledger)):
        ledger.execute(f"INSERT INTO trials ({names}) VALUES ({places})", values)


def find(
    ledger: sqlite3.Connection, budget: Budget, versions: str, workload: Workload, levers: Levers
) -> list[Trial]:
    """Trials that answer a question, in the order of recording.

    Failed trials are left out: they say nothing about the batch, so they are to be repeated.
    """
    keys = (workload.key(), levers.key(), budget.key(), versions)
    with _explained(_path_of(ledger)):
        rows = ledger.execute(
            f"SELECT {_TRIAL_COLUMNS} FROM trials WHERE workload_key = ? AND levers_key = ? "
            "AND budget_key = ? AND versions_key = ? AND outcome IN ('fits', 'oom') ORDER BY id",
            keys,
        ).fetchall()
    return [_trial(row) for row in rows]


def record_allocations(
    ledger: sqlite3.Connection,
    budget: Budget,
    versions: str,
    workload: Workload,
    levers: Levers,
    batch: int,
    recording: Recording,
) -> None:
    """Write what a batch asked of the allocator, in place of what was known of it.

    Raises:
        InputError: the file cannot be written, for instance because the disk is full.
    """
    values = (
        budget.device.key(),
        versions,
        workload.model_key(),
        levers.key(),
        workload.seq_len,
        batch,
        _now(),
        recording_to_text(recording),
    )
    with _explained(_path_of(ledger)):
        ledger.execute("INSERT OR REPLACE INTO recordings VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)


def find_allocations(
    ledger: sqlite3.Connection, budget: Budget, versions: str, workload: Workload, levers: Levers
) -> list[Recorded]:
    """Recordings of the same model at the nearest lengths, under any budget of the device.

    What cannot be read is left out: a search does without it.
    """
    keys = (budget.device.key(), versions, workload.model_key(), levers.key())
    with _explained(_path_of(ledger)):
        lengths = ledger.execute(
            "SELECT DISTINCT seq_len FROM recordings WHERE device_key = ? AND versions_key = ? "
            "AND model_key = ? AND levers_key = ? ORDER BY abs(seq_len - ?) LIMIT ?",
            (*keys, workload.seq_len, _NEAREST_LENGTHS),
        ).fetchall()
        places = ", ".join("?" * len(lengths))
        rows = ledger.execute(
            "SELECT seq_len, batch, recording FROM recordings WHERE device_key = ? "
            "AND versions_key = ? AND model_key = ? AND levers_key = ? "
            f"AND seq_len IN ({places}) ORDER BY seq_len, batch",
            (*keys, *(length for (length,) in lengths)),
        ).fetchall()
    found: list[Recorded] = []
    for seq_len, batch, text in rows:
        with contextlib.suppress(ValueError):
            found.append(Recorded(seq_len, batch, recording_from_text(text)))
    return found


def read_rows(ledger: sqlite3.Connection) -> list[LedgerRow]:
    """All trials, failed ones too, in the order of recording."""
    with _explained(_path_of(ledger)):
        rows = ledger.execute(
            "SELECT id, time_utc, device, budget_bytes, model, head, seq_len, levers_key, "
            f"versions_key, budget_key, workload_key, {_TRIAL_COLUMNS} FROM trials ORDER BY id"
        ).fetchall()
    return [_row(row) for row in rows]


def count_prunable(
    ledger: sqlite3.Connection,
    *,
    before: datetime | None = None,
    failed: bool = False,
    other_than: str | None = None,
) -> int:
    """Number of trials that `prune` would take away."""
    where, values = _which(before, failed, other_than)
    with _explained(_path_of(ledger)):
        count: int = ledger.execute(f"SELECT count(*) FROM trials{where}", values).fetchone()[0]
    return count


def prune(
    ledger: sqlite3.Connection,
    *,
    before: datetime | None = None,
    failed: bool = False,
    other_than: str | None = None,
) -> int:
    """Take trials away that meet every condition, and recordings with them; all without one.

    Args:
        ledger: open.
        before: only those that were recorded earlier.
        failed: only failed ones; recordings stay then, for they are of trials that fit.
        other_than: only those of other versions than these, see `versions_key`.

    Returns:
        Number of trials that were taken away.
    """
    where, values = _which(before, failed, other_than)
    with _explained(_path_of(ledger)):
        ledger.execute("BEGIN IMMEDIATE")
        try:
            count: int = ledger.execute(f"DELETE FROM trials{where}", values).rowcount
            if not failed:
                ledger.execute(f"DELETE FROM recordings{where}", values)
            ledger.execute("COMMIT")
        except BaseException:
            if ledger.in_transaction:
                ledger.execute("ROLLBACK")
            raise
        # A full disk has no room to make the file smaller; what comes next uses it again.
        with contextlib.suppress(sqlite3.OperationalError):
            ledger.execute("VACUUM")
    return count


def _which(
    before: datetime | None, failed: bool, other_than: str | None
) -> tuple[str, tuple[str, ...]]:
    conditions = ["outcome = 'failed'"] * failed
    values: list[str] = []
    if before is not None:
        conditions.append("time_utc < ?")
        values.append(before.astimezone(timezone.utc).isoformat(timespec="seconds"))
    if other_than is not None:
        conditions.append("versions_key != ?")
        values.append(other_than)
    return (" WHERE " + " AND ".join(conditions) if conditions else ""), tuple(values)


def versions_key() -> str:
    """Canonical text of the versions that decide a trial's outcome, without importing them."""
    versions = {
        "tensorflow": _version("tensorflow", "tensorflow-cpu", "tf-nightly", "tf-nightly-cpu"),
        "bertbench": _version("bertbench"),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    return json.dumps(versions, sort_keys=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _trial(row: tuple[Any, ...]) -> Trial:
    values = dict(zip(_TRIAL_COLUMNS.split(", "), row, strict=True))
    return Trial(**{**values, "fresh": bool(values["fresh"])})


def _row(row: tuple[Any, ...]) -> LedgerRow:
    number, time_utc, device, budget_bytes, model, head, seq_len, *keys = row[:11]
    levers, versions, budget, workload = keys
    return LedgerRow(
        id=number,
        time_utc=time_utc,
        device=device,
        budget_bytes=budget_bytes,
        model=model,
        head=head,
        seq_len=seq_len,
        levers=json.loads(levers),
        versions=json.loads(versions),
        trial=_trial(row[11:]),
        question=(budget, versions, workload, levers),
    )


def _path_of(ledger: sqlite3.Connection) -> Path:
    return Path(ledger.execute("PRAGMA database_list").fetchone()[2])


def _prepare(ledger: sqlite3.Connection, path: Path) -> None:
    """Check that the file is a ledger that this version reads, or make it one."""
    if _pragma(ledger, "user_version") < SCHEMA_VERSION:
        ledger.execute("BEGIN IMMEDIATE")  # one of several processes makes it, the others wait
        try:
            version = _pragma(ledger, "user_version")
            if version == 0 and ledger.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise _not_a_ledger(path)
            if version and _pragma(ledger, "application_id") != APPLICATION_ID:
                raise _not_a_ledger(path)
            if version < 1:
                ledger.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            for schema in (_SCHEMA_1, _SCHEMA_2)[version:]:
                for statement in schema.split(";"):
                    ledger.execute(statement)
            # Unless another process was faster.
            if version < SCHEMA_VERSION:
                ledger.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            ledger.execute("COMMIT")
        except BaseException:
            if ledger.in_transaction:  # a full disk has ended it already
                ledger.execute("ROLLBACK")
            raise
    version = _pragma(ledger, "user_version")
    if _pragma(ledger, "application_id") != APPLICATION_ID:
        raise _not_a_ledger(path)
    if version > SCHEMA_VERSION:
        raise InputError(
            f"the ledger has format {version}, and this version reads up to {SCHEMA_VERSION}",
            path=path,
            hint="upgrade bertbench, or choose another ledger with BERTBENCH_LEDGER",
        )
    _use_wal(ledger)
    ledger.execute("PRAGMA synchronous = FULL")


def _use_wal(ledger: sqlite3.Connection) -> None:
    # The change of mode does not wait for other processes as other statements do.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            ledger.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _pragma(ledger: sqlite3.Connection, name: str) -> int:
    return int(ledger.execute(f"PRAGMA {name}").fetchone()[0])


def _not_a_ledger(path: Path) -> InputError:
    return InputError(
        "an SQLite file of another program, not a bertbench ledger",
        path=path,
        hint="choose another file with BERTBENCH_LEDGER",
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of the file into ones that name it and say what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:  # full disk, read-only, locked, no permission
        raise InputError(
            f"cannot use the ledger ({error})",
            path=path,
            hint="make it writable with room on its disk, or choose another with BERTBENCH_LEDGER",
        ) from error
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"not a usable ledger ({error})",
            path=path,
            hint="move the file away, or choose another with BERTBENCH_LEDGER",
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot use the ledger ({error.strerror})",
            path=path,
            hint="choose another with BERTBENCH_LEDGER",
        ) from error
