"""The ledger: a durable record of all trials, in one SQLite file.

Every trial is committed, and synchronised to the disk, by itself; several processes may write at
once. Beside the trials are recordings of what some of them asked of the allocator, which tell where
the limits of their neighbours are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sqlite3
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import Any, TypeVar

from bertbench.core.workload import Workload
from bertbench.hardware.device import Device
from bertbench.ledger.database import Ledger, explained
from bertbench.ledger.question import Question, QuestionKey
from bertbench.memory.allocator.recording import Recording, recording_from_text, recording_to_text
from bertbench.memory.traces.loops import Recorded
from bertbench.trials.trial import Trial, trial_from_json
from finetune.storage.json_files import json_text, parse_json

_Read = TypeVar("_Read")

_NEAREST_LENGTHS = 3

_TRIAL_COLUMNS = (
    "batch, outcome, peak_bytes, step_seconds, seconds, message, fresh, process_peak_bytes"
)

_SELECT_ROWS = (
    "SELECT id, time_utc, device, budget_bytes, model, head, seq_len, levers_key, "
    f"versions_key, budget_key, workload_key, {_TRIAL_COLUMNS} FROM trials"
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
        versions: of the software, as `bertbench.ledger.question.versions_key` writes them.
        trial: the trial itself.
        question: keys of what it answers.
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
    question: QuestionKey

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; those of the trial beside the others."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["trial"], values["question"]
        return {**values, **self.trial.to_json()}


def record(ledger: Ledger, question: Question, trial: Trial) -> None:
    """Write one trial; it is on the disk when this returns.

    Raises:
        InputError: the file cannot be written, for instance because the disk is full.
    """
    key, budget, workload = question.key(), question.budget, question.setup.workload
    values = {
        "time_utc": _now(),
        "budget_key": key.budget,
        "versions_key": key.versions,
        "workload_key": key.workload,
        "levers_key": key.levers,
        "device": budget.device.name,
        "budget_bytes": budget.budget_bytes,
        "model": workload.model,
        "head": workload.head,
        "seq_len": workload.seq_len,
        **trial.to_json(),
    }
    names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
    with explained(ledger):
        ledger.execute(f"INSERT INTO trials ({names}) VALUES ({places})", values)


def find(ledger: Ledger, question: Question) -> list[Trial]:
    """Trials that answer a question, in the order of recording.

    Failed trials are left out: they say nothing about the batch, so they are to be repeated. So are
    the steps of runs, which are evidence for plans alone, and damaged rows, which are counted.
    """
    with explained(ledger):
        rows = ledger.execute(
            f"SELECT id, {_TRIAL_COLUMNS} FROM trials WHERE workload_key = :workload "
            "AND levers_key = :levers AND budget_key = :budget AND versions_key = :versions "
            "AND outcome IS NOT 'failed' ORDER BY id",
            dataclasses.asdict(question.key()),
        ).fetchall()
    trials = _read_each(ledger, rows, lambda row: _trial(row[1:]))
    return [trial for trial in trials if trial.outcome != "failed" and not trial.of_run]


def record_allocations(
    ledger: Ledger, question: Question, batch: int, recording: Recording
) -> None:
    """Write what a batch asked of the allocator, in place of what was known of it.

    Raises:
        InputError: the file cannot be written, for instance because the disk is full.
    """
    seq_len = question.setup.workload.seq_len
    values = (*_recording_key(question), seq_len, batch, _now(), recording_to_text(recording))
    with explained(ledger):
        ledger.execute("INSERT OR REPLACE INTO recordings VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)


def find_allocations(ledger: Ledger, question: Question) -> list[Recorded]:
    """Recordings of the same model at the nearest lengths, under any budget of the device.

    What is damaged is passed over, and counted: a search does without it.
    """
    keys = _recording_key(question)
    with explained(ledger):
        lengths = ledger.execute(
            "SELECT DISTINCT seq_len FROM recordings WHERE device_key = ? AND versions_key = ? "
            "AND model_key = ? AND levers_key = ? ORDER BY abs(seq_len - ?) LIMIT ?",
            (*keys, question.setup.workload.seq_len, _NEAREST_LENGTHS),
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
        try:
            if not all(type(size) is int and size > 0 for size in (seq_len, batch)):
                raise ValueError("no recording of a batch")
            found.append(Recorded(seq_len, batch, recording_from_text(text)))
        except ValueError:
            ledger.damaged.add(("recordings", *keys, seq_len, batch))
    return found


def _recording_key(question: Question) -> tuple[str, str, str, str]:
    """Keys of a recording that do not depend on the budget's bytes and the sequence length."""
    workload, levers = question.setup.workload, question.setup.levers
    return question.budget.device.key(), question.versions, workload.model_key(), levers.key()


def read_rows(ledger: Ledger) -> list[LedgerRow]:
    """All trials, failed ones too, in the order of recording; damaged rows are counted."""
    with explained(ledger):
        rows = ledger.execute(f"{_SELECT_ROWS} ORDER BY id").fetchall()
    return _read_each(ledger, rows, _row)


def read_device_rows(
    ledger: Ledger, device: Device, versions: str, workload: Workload, most: int
) -> list[LedgerRow]:
    """Trials on a device, under any budget, that fitted or ran out of memory; oldest first.

    Damaged rows are passed over, and counted.

    Args:
        ledger: the record.
        device: where.
        versions: of the software, see `bertbench.ledger.question.versions_key`.
        workload: that all trials are wanted of.
        most: how many of the newest of other workloads are wanted.
    """
    wanted = "device = ? AND versions_key = ? AND outcome IS NOT 'failed'"
    with explained(ledger):
        rows = ledger.execute(
            f"{_SELECT_ROWS} WHERE id IN (SELECT id FROM trials WHERE {wanted} "
            "AND workload_key != ? ORDER BY id DESC LIMIT ?) "
            f"OR ({wanted} AND workload_key = ?) ORDER BY id",
            (device.name, versions, workload.key(), most, device.name, versions, workload.key()),
        ).fetchall()
    found = _read_each(ledger, rows, _row)
    return [row for row in found if row.trial.outcome != "failed"]


@dataclasses.dataclass(frozen=True)
class Prunable:
    """Trials that may be taken away: those that meet every condition; all without one.

    Attributes:
        before: only those that were recorded earlier.
        failed: only failed ones; recordings stay then, for they are of trials that fit.
        other_than: only those of other versions of the software than these, as
            `bertbench.ledger.question.versions_key` writes them.
        ids: only those with these numbers, see `damaged_ids`; recordings have none, and stay.
    """

    before: datetime | None = None
    failed: bool = False
    other_than: str | None = None
    ids: tuple[int, ...] | None = None

    def where(self) -> tuple[str, tuple[str, ...]]:
        """Condition in SQL, and its values."""
        conditions = ["outcome = 'failed'"] * self.failed
        values: list[str] = []
        if self.before is not None:
            conditions.append("time_utc < ?")
            values.append(self.before.astimezone(timezone.utc).isoformat(timespec="seconds"))
        if self.other_than is not None:
            conditions.append("versions_key != ?")
            values.append(self.other_than)
        if self.ids is not None:
            conditions.append("id IN (SELECT value FROM json_each(?))")
            values.append(json_text(self.ids))
        return (" WHERE " + " AND ".join(conditions) if conditions else ""), tuple(values)


def damaged_ids(ledger: Ledger) -> tuple[int, ...]:
    """Numbers of the trials that are damaged, which are not told of any more."""
    read_rows(ledger)
    found = [place for place in ledger.damaged if place[0] == "trials"]
    ledger.damaged.difference_update(found)
    return tuple(sorted(int(str(place[1])) for place in found))


def count_prunable(ledger: Ledger, which: Prunable) -> int:
    """Number of trials that `prune` would take away."""
    where, values = which.where()
    with explained(ledger):
        count: int = ledger.execute(f"SELECT count(*) FROM trials{where}", values).fetchone()[0]
    return count


def prune(ledger: Ledger, which: Prunable) -> int:
    """Take trials away, and recordings that meet the same conditions; return how many trials."""
    where, values = which.where()
    with explained(ledger):
        ledger.execute("BEGIN IMMEDIATE")
        try:
            count: int = ledger.execute(f"DELETE FROM trials{where}", values).rowcount
            if not which.failed and which.ids is None:
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


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _read_each(
    ledger: Ledger,
    rows: Iterable[tuple[Any, ...]],
    read: Callable[[tuple[Any, ...]], _Read],
) -> list[_Read]:
    """Read rows that begin with their number, and pass over those that are damaged."""
    found = []
    for row in rows:
        try:
            found.append(read(row))
        except ValueError:
            ledger.damaged.add(("trials", row[0]))
    return found


def _trial(row: tuple[Any, ...]) -> Trial:
    values = dict(zip(_TRIAL_COLUMNS.split(", "), row, strict=True))
    if values["fresh"] in (0, 1):
        values["fresh"] = bool(values["fresh"])
    return trial_from_json(values)


def _row(row: tuple[Any, ...]) -> LedgerRow:
    """Read a row of `_SELECT_ROWS`.

    Raises:
        ValueError: it is damaged.
    """
    number, time_utc, device, budget_bytes, model, head, seq_len, *keys = row[:11]
    levers, versions, budget, workload = keys
    if not all(isinstance(text, str) for text in (time_utc, device, model, head, *keys)):
        raise ValueError("a text is none")
    if not all(type(size) is int and size > 0 for size in (number, budget_bytes, seq_len)):
        raise ValueError("a number is none")
    return LedgerRow(
        id=number,
        time_utc=time_utc,
        device=device,
        budget_bytes=budget_bytes,
        model=model,
        head=head,
        seq_len=seq_len,
        levers=_object(levers),
        versions={name: str(version) for name, version in _object(versions).items()},
        trial=_trial(row[11:]),
        question=QuestionKey(budget, versions, workload, levers),
    )


def _object(text: str) -> dict[str, Any]:
    """Read a key that is a JSON object of plain values, as a version's levers are.

    Raises:
        ValueError: it is not.
    """
    return dict(_parsed_object(text))


@functools.lru_cache(maxsize=64)  # most rows of a ledger share a few of them
def _parsed_object(text: str) -> dict[str, Any]:
    values = parse_json(text)
    if not isinstance(values, dict) or any(isinstance(v, (dict, list)) for v in values.values()):
        raise ValueError("no object of plain values")
    return values
