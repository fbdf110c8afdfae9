"""The ledger's file: where it is, what is in it, and what its troubles mean."""

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
        damaged: places of rows that were passed over because they cannot be read. A place is the
            table's name and the row's keys, so that a row that is read twice counts once.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Connect, as `sqlite3.connect` says."""
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
    """Open a ledger to write in it, making it where it does not exist.

    It is closed with the `with` block; then one line on standard error says how many damaged rows
    were passed over, if any were.

    Args:
        path: the file; None means `default_ledger_path()`.

    Raises:
        InputError: it is damaged, not a ledger, of a newer version, or cannot be written. So do
            the functions of `bertbench.ledger.records` that are called inside the block.
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
    """Open what a ledger holds, in this version's format; otherwise as `open_ledger`.

    Nothing is written to it: it may be on a disk that cannot be written, and one of an older
    version is copied into memory. Whatever only reads a ledger reads it here.

    Args:
        path: the file, which exists.

    Raises:
        InputError: it is damaged, not a ledger, of a newer version, or cannot be read.
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
    """Open a file and begin to read it; what others write from now on is not seen."""
    ways = ["mode=rw"]
    log = Path(f"{path}-wal")
    if not log.exists() or not log.stat().st_size:
        # Even a reader writes beside a file in WAL mode. Where it cannot, nobody else can, and all
        # that there is is in the file.
        ways.append("mode=ro&immutable=1")
    for how in ways:
        address = f"{path.absolute().as_uri()}?{how}"
        ledger = sqlite3.connect(
            address, timeout=_BUSY_SECONDS, isolation_level=None, uri=True, factory=Ledger
        )
        try:
            ledger.execute("PRAGMA query_only = ON")
            ledger.execute("BEGIN")
            # This waits for a lock, but not without end as a backup would.
            ledger.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return ledger
        except BaseException as error:
            ledger.close()
            can_try_again = isinstance(error, sqlite3.OperationalError) and how != ways[-1]
            if not can_try_again or "locked" in str(error):
                raise
    raise AssertionError("not reached")


_told: set[tuple[object, ...]] = set()
"""Files and places of rows that a line has been said about: one a command is enough."""


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
        return data  # no text, as whoever reads the row finds


@contextlib.contextmanager
def explained(ledger: Ledger) -> Iterator[None]:
    """Turn errors of an open ledger into ones that name its file and say what to do."""
    path = ledger.execute("PRAGMA database_list").fetchone()[2]
    with _explained(Path(path)) if path else contextlib.nullcontext():  # a copy: see `read_ledger`
        yield


def _prepare(ledger: Ledger, path: Path) -> None:
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


def _use_wal(ledger: Ledger) -> None:
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
    """Turn errors of the file into ones that name it and say what to do."""
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
        # What SQLite says of a damaged file quotes it, and Python cannot always decode that.
        raise _unusable(path, error) from error
    except OSError as error:
        raise InputError(
            f"cannot use the ledger ({error.strerror})",
            path=path,
            hint="choose another with BERTBENCH_LEDGER",
        ) from error
