"""Reads and writes the ledger: all trials, and recordings of some of them.

Each trial is one transaction, which is on the disk when `record` returns. Several processes may
write at once. A recording has the requests that a trial made of the allocator. From recordings of
small batches the limit of a setup is predicted, and that of the same model with other lengths.

Example:
    >>> question = Question(budget, setup)
    >>> with open_ledger() as ledger:
    ...     record(ledger, question, trial)
    ...     limit = find_limit(find(ledger, question))
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
    """One trial as a row of the ledger, for exports and reports.

    Attributes:
        id: number of the row; a later trial has a larger number.
        time_utc: when the trial was recorded, as in `2026-01-31T12:00:00+00:00`.
        device: name of the device.
        budget_bytes: what the allocator could use.
        model: name of the model.
        head: task head.
        seq_len: tokens per example.
        levers: lever settings, as `Levers.to_json` writes them.
        versions: versions of the software; the names are those of
            `bertbench.ledger.question.versions_key`.
        trial: batch, outcome and measurements.
        question: the question that the trial answers.
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
        """Values for JSON, in one flat object; the question is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["trial"], values["question"]
        return {**values, **self.trial.to_json()}


def record(ledger: Ledger, question: Question, trial: Trial) -> None:
    """Write one trial; it is on the disk when this returns.

    Args:
        ledger: opened by `open_ledger`.
        question: what the trial answers.
        trial: the trial.

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
    """Return the trials that answer a question, the oldest first.

    Failed trials are left out: they say nothing about the batch and have to be repeated. Steps of
    runs are left out too: they are evidence for plans only. Damaged rows are passed over, and added
    to `Ledger.damaged`.
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
    """Write the recording of a batch, in place of an earlier recording of the same batch.

    Raises:
        InputError: the file cannot be written, for instance because the disk is full.
    """
    seq_len = question.setup.workload.seq_len
    values = (*_recording_key(question), seq_len, batch, _now(), recording_to_text(recording))
    with explained(ledger):
        ledger.execute("INSERT OR REPLACE INTO recordings VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)


def find_allocations(ledger: Ledger, question: Question) -> list[Recorded]:
    """Return recordings of a question's model and levers on its device, under any budget.

    They are of the three recorded sequence lengths that are nearest to the question's. A damaged
    recording is passed over, and added to `Ledger.damaged`.
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
    """The part of a recording's key that any budget and any sequence length have in common."""
    workload, levers = question.setup.workload, question.setup.levers
    return question.budget.device.key(), question.versions, workload.model_key(), levers.key()


def read_rows(ledger: Ledger) -> list[LedgerRow]:
    """Return all trials, failed ones too, the oldest first.

    Damaged rows are passed over, and added to `Ledger.damaged`.
    """
    with explained(ledger):
        rows = ledger.execute(f"{_SELECT_ROWS} ORDER BY id").fetchall()
    return _read_each(ledger, rows, _row)


def read_device_rows(
    ledger: Ledger, device: Device, versions: str, workload: Workload, most: int
) -> list[LedgerRow]:
    """Return the trials on a device that fitted or ran out of memory, the oldest first.

    They are of any budget. Damaged rows are passed over, and added to `Ledger.damaged`.

    Args:
        ledger: the open ledger.
        device: the device that the trials ran on.
        versions: versions of the software, see `bertbench.ledger.question.versions_key`.
        workload: the workload of which all trials are returned.
        most: how many trials of other workloads are returned, the newest ones.
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
    """Which trials to delete: those that meet every condition. No condition means all trials.

    Example:
        >>> Prunable(failed=True).where()
        (" WHERE outcome = 'failed'", ())

    Attributes:
        before: only trials that were recorded before this time.
        failed: only failed trials. No recording is deleted then, because a recording is of a trial
            that fitted.
        other_than: only trials with other versions of the software than these, which are as
            `bertbench.ledger.question.versions_key` writes them.
        ids: only trials with these numbers, see `damaged_ids`. No recording is deleted then,
            because a recording has no number.
    """

    before: datetime | None = None
    failed: bool = False
    other_than: str | None = None
    ids: tuple[int, ...] | None = None

    def where(self) -> tuple[str, tuple[str, ...]]:
        """Return the condition as SQL, and the values of its placeholders."""
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
    """Return the numbers of damaged trials, and take these out of `Ledger.damaged`.

    So no warning names them at the end, for they are about to be deleted.
    """
    read_rows(ledger)
    found = [place for place in ledger.damaged if place[0] == "trials"]
    ledger.damaged.difference_update(found)
    return tuple(sorted(int(str(place[1])) for place in found))


def count_prunable(ledger: Ledger, which: Prunable) -> int:
    """Return the number of trials that `prune` would delete."""
    where, values = which.where()
    with explained(ledger):
        count: int = ledger.execute(f"SELECT count(*) FROM trials{where}", values).fetchone()[0]
    return count


def prune(ledger: Ledger, which: Prunable) -> int:
    """Delete trials, and recordings that meet the same conditions; return the number of trials."""
    where, values = which.where()
    with explained(ledger):
        ledger.execute("BEGIN IMMEDIATE")
        try:
            count: int = ledger.execute(f"DELETE FROM trials{where}", values).rowcount
            if not which.failed and which.ids is None:
                ledger.execute(f"DELETE FROM recordings{where}", values)
                if which.other_than is None:  # the versions of compilers are others
                    ledger.execute(f"DELETE FROM compilations{where}", values)
            ledger.execute("COMMIT")
        except BaseException:
            if ledger.in_transaction:
                ledger.execute("ROLLBACK")
            raise
        # Making the file smaller takes room, which a full disk lacks. The ledger's next rows then
        # use the freed pages.
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
    """Read rows whose first value is their number; pass over damaged ones."""
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
        ValueError: the row is damaged.
    """
    number, time_utc, device, budget_bytes, model, head, seq_len, *keys = row[:11]
    levers, versions, budget, workload = keys
    if not all(isinstance(text, str) for text in (time_utc, device, model, head, *keys)):
        raise ValueError("a value is not text")
    if not all(type(size) is int and size > 0 for size in (number, budget_bytes, seq_len)):
        raise ValueError("a value is not a positive number")
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
    """Read a JSON object whose values are plain, as the key of levers is.

    Raises:
        ValueError: the text is something else.
    """
    return dict(_parsed_object(text))


@functools.lru_cache(maxsize=64)  # most rows of a ledger share a few texts
def _parsed_object(text: str) -> dict[str, Any]:
    values = parse_json(text)
    if not isinstance(values, dict) or any(isinstance(v, (dict, list)) for v in values.values()):
        raise ValueError("not a JSON object of plain values")
    return values
