"""The ledger's file, an SQLite database: where it is, its tables, and its errors explained.

Example:
    >>> with open_ledger("ledger.sqlite") as ledger:
    ...     rows = bertbench.ledger.records.read_rows(ledger)
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bertbench.core.private_folders import state_folder
from bertbench.core.terminal import say
from finetune.errors import InputError

SCHEMA_VERSION = 3
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

# What version 3 adds.
_SCHEMA_3 = """
CREATE TABLE compilations (
    target_key TEXT NOT NULL,
    versions_key TEXT NOT NULL,
    workload_key TEXT NOT NULL,
    levers_key TEXT NOT NULL,
    micro_batch INTEGER NOT NULL,
    time_utc TEXT NOT NULL,
    outcome TEXT NOT NULL,
    memory TEXT,
    message TEXT NOT NULL,
    seconds REAL NOT NULL,
    PRIMARY KEY (target_key, versions_key, workload_key, levers_key, micro_batch)
);
"""


def default_ledger_path() -> Path:
    """`$BERTBENCH_LEDGER`, or `ledger.sqlite` in `state_folder()`.

    Raises:
        InputError: the user has no home, and no temporary folder.
    """
    chosen = os.environ.get("BERTBENCH_LEDGER")
    if chosen:
        return Path(chosen)
    folder = state_folder()
    if folder is None:
        raise InputError(
            "no place for the ledger is known: the user has no home folder",
            hint="name a file with BERTBENCH_LEDGER, or set HOME",
        )
    return folder / "ledger.sqlite"


class Ledger(sqlite3.Connection):
    """An open ledger.

    Attributes:
        damaged: rows that were passed over because they cannot be read. Each is a tuple of the
            table's name and the row's keys, so a row that is read twice is counted once.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Connect to a file; the arguments are those of `sqlite3.connect`."""
        super().__init__(*arguments, **named)
        self.damaged: set[tuple[object, ...]] = set()
        # One text that is not UTF-8 would end a whole query.
        self.text_factory = _text


def ledger_exists(path: Path) -> bool:
    """Whether there is such a file; what else is wrong with it is told when it is opened."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def open_ledger(path: str | os.PathLike[str] | None = None) -> Iterator[Ledger]:
    """Open a ledger to read and write; a file that does not exist is made.

    The ledger is closed at the end of the `with` block. If damaged rows were passed over, one line
    on standard error then says how many.

    Args:
        path: the file; None means `default_ledger_path()`.

    Raises:
        InputError: the file is damaged, not a ledger, of a newer version, or cannot be written.
            Functions of `bertbench.ledger.records` raise it too, for the same reasons.
    """
    path = Path(default_ledger_path() if path is None else path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: each statement is a transaction of its own.
        connection = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, isolation_level=None, factory=Ledger
        )
    try:
        with _explained(path):
            _prepare(connection, path)
        yield connection
    finally:
        connection.close()
        _tell_damage(connection, path)


@contextlib.contextmanager
def read_ledger(path: Path) -> Iterator[Ledger]:
    """Open a ledger to read it, in this version's format.

    Nothing is written to the file, so it may be on a disk that is read-only. A ledger of an older
    version is copied into memory, and the copy is brought to this version. Damaged rows are told
    of as by `open_ledger`.

    Args:
        path: the file, which exists.

    Raises:
        InputError: the file is damaged, not a ledger, of a newer version, or cannot be read.
    """
    with contextlib.ExitStack() as stack, _explained(path):
        ledger = stack.enter_context(contextlib.closing(_open_to_read(path)))
        is_current = _pragma(ledger, "user_version") == SCHEMA_VERSION
        if not is_current or _pragma(ledger, "application_id") != APPLICATION_ID:
            copy = sqlite3.connect(":memory:", isolation_level=None, factory=Ledger)
            stack.callback(copy.close)
            ledger.backup(copy)
            _prepare(copy, path)
            ledger = copy
        try:
            yield ledger
        finally:
            _tell_damage(ledger, path)


def _open_to_read(path: Path) -> Ledger:
    """Open a file and begin a transaction that reads it.

    What other processes write from now on is not seen.
    """
    ways = ["mode=rw"]
    log = Path(f"{path}-wal")
    if not log.exists() or not log.stat().st_size:
        # In WAL mode even a reader makes files beside the database. Where that is not allowed,
        # no other process can write either, so the database file alone holds everything.
        ways.append("mode=ro&immutable=1")
    for how in ways:
        address = f"{path.absolute().as_uri()}?{how}"
        ledger = sqlite3.connect(
            address, timeout=_BUSY_SECONDS, isolation_level=None, uri=True, factory=Ledger
        )
        try:
            ledger.execute("PRAGMA query_only = ON")
            ledger.execute("BEGIN")
            # This waits for a lock for _BUSY_SECONDS; `backup` would wait without end.
            ledger.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return ledger
        except BaseException as error:
            ledger.close()
            can_try_again = isinstance(error, sqlite3.OperationalError) and how != ways[-1]
            if not can_try_again or "locked" in str(error):
                raise
    raise AssertionError("not reached")


_told: set[tuple[object, ...]] = set()
"""Damaged rows, with their file, that a warning has named: one warning a command is enough."""


def _tell_damage(ledger: Ledger, path: Path) -> None:
    found = {(path, *place) for place in ledger.damaged} - _told
    _told.update(found)
    if found:
        rows = "1 damaged row" if len(found) == 1 else f"{len(found):,} damaged rows"
        trials = any(place[1] == "trials" for place in found)
        hint = "; `bertbench ledger prune --damaged` takes them away" if trials else ""
        say(f"warning: {path}: passed over {rows}{hint}")


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data  # the reader of the row finds bytes instead of text, and calls it damaged


@contextlib.contextmanager
def explained(ledger: Ledger) -> Iterator[None]:
    """Turn SQLite's errors inside the block into errors that name the file and what to do.

    Example:
        >>> with explained(ledger):
        ...     ledger.execute("SELECT count(*) FROM trials")
    """
    path = ledger.execute("PRAGMA database_list").fetchone()[2]
    with _explained(Path(path)) if path else contextlib.nullcontext():  # a copy: see `read_ledger`
        yield


def _prepare(ledger: Ledger, path: Path) -> None:
    """Make an empty file a ledger, bring an older ledger to this version, and refuse others."""
    if _pragma(ledger, "user_version") < SCHEMA_VERSION:
        ledger.execute("BEGIN IMMEDIATE")  # of several processes one does it, the others wait
        try:
            version = _pragma(ledger, "user_version")
            if version == 0 and ledger.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise _not_a_ledger(path)
            if version and _pragma(ledger, "application_id") != APPLICATION_ID:
                raise _not_a_ledger(path)
            if version < 1:
                ledger.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            for schema in (_SCHEMA_1, _SCHEMA_2, _SCHEMA_3)[version:]:
                for statement in schema.split(";"):
                    ledger.execute(statement)
            # If another process was faster, the version is the current one already.
            if version < SCHEMA_VERSION:
                ledger.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            ledger.execute("COMMIT")
        except BaseException:
            if ledger.in_transaction:  # SQLite itself rolls back when the disk is full
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


def _use_wal(ledger: Ledger) -> None:
    # Unlike other statements, this one does not wait for a lock that another process holds.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            ledger.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _pragma(ledger: Ledger, name: str) -> int:
    return int(ledger.execute(f"PRAGMA {name}").fetchone()[0])


def _not_a_ledger(path: Path) -> InputError:
    return InputError(
        "an SQLite file of another program, not a bertbench ledger",
        path=path,
        hint="choose another file with BERTBENCH_LEDGER",
    )


def _unusable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"not a usable ledger ({error})",
        path=path,
        hint="move the file away, or choose another with BERTBENCH_LEDGER",
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's and the system's errors into errors that name the file and what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:  # full disk, read-only, locked, no permission
        if str(error).startswith("no such"):  # a table or column that every ledger has
            raise _unusable(path, error) from error
        raise InputError(
            f"cannot use the ledger ({error})",
            path=path,
            hint="make it writable with room on its disk, or choose another with BERTBENCH_LEDGER",
        ) from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # SQLite's message quotes bytes of the damaged file, which may not be UTF-8.
        raise _unusable(path, error) from error
    except OSError as error:
        raise InputError(
            f"cannot use the ledger ({error.strerror})",
            path=path,
            hint="choose another with BERTBENCH_LEDGER",
        ) from error
