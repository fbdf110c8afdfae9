"""Sentence classification on a user's own tables: TSV, CSV and JSON lines, by column names."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.errors import InputError
from finetune.storage.files import decode_utf8, read_bytes
from finetune.storage.json_files import json_text, parse_json
from finetune.tasks.classification import ClassificationData, ClassificationExamples
from finetune.tasks.classification_metrics import REGRESSION_METRICS, Metric

_SUFFIXES = (".tsv", ".csv", ".jsonl")

# Words that programs write for a missing value, in lower case.
_MISSING = frozenset({"nan", "<na>", "#n/a", "null"})
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

Row = tuple[int, Mapping[str, str | None]]
"""Number of a line, from 1, and its cells by column; a cell is None if it is neither a text nor a
finite number."""


@dataclass(frozen=True)
class TableTask:
    """A user's own task.

    Attributes:
        files: `.tsv`, `.csv` or `.jsonl` files by split, `train`, `dev` and `test`.
        text_a: column of the first or only sentence.
        text_b: column of the second sentence; None for single sentences.
        label: column of the label; the test split need not have it.
        labels: all labels, in the order of their ids. None takes the labels of the training file,
            where a word for a missing value, such as "nan", is then refused.
        is_regression: the label is a number to predict.
        metrics: metrics to report. None reports accuracy, and F1 of the second label if there are
            two; for a regression Pearson and Spearman correlation.
    """

    files: Mapping[str, Path]
    text_a: str
    text_b: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    is_regression: bool = False
    metrics: tuple[Metric, ...] | None = None


def read_table_task(task: TableTask) -> ClassificationData:
    """Read all files of a task.

    Args:
        task: files and columns.

    Raises:
        InputError: a file is missing, empty or damaged, a column is missing, or a label is unknown,
            missing or not a number; the message names the line.
    """
    tables = {split: list(read_table(path)) for split, path in task.files.items()}
    for split, path in task.files.items():
        if not tables[split]:
            raise InputError("no examples in the file", path=path)
    labels = () if task.is_regression else _find_labels(task, tables)
    metrics = task.metrics
    if metrics is None:
        metrics = REGRESSION_METRICS if task.is_regression else ("accuracy",)
        if len(labels) == 2:
            metrics = (*metrics, "f1")
    for metric in metrics:
        if (metric in REGRESSION_METRICS) != task.is_regression:
            kind = "a regression" if task.is_regression else "classes"
            raise InputError(f"{metric} is no metric for {kind}")
        if metric == "f1" and len(labels) != 2:
            raise InputError(f"f1 is for two labels, and here are {len(labels)}")
    splits = {
        split: _examples(task, split, path, tables[split], labels)
        for split, path in task.files.items()
    }
    return ClassificationData("table", labels, metrics, splits)


def read_table(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Read a table with named columns.

    A `.tsv` file has no quoting, like GLUE's files. A `.csv` file is quoted as spreadsheets do. A
    `.jsonl` file has one object of texts and numbers on each line.

    Yields:
        Number of the line (the last one of a CSV row) and cells.

    Raises:
        InputError: the file is missing, or its content is not as its name says.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return _read_json_lines(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".tsv":
        lines = read_lines(path)
        if lines and "\t" in lines[0]:  # In a single column, an empty line is an empty text.
            lines = without_empty_end(lines)
        return _named(path, ((n, line.split("\t")) for n, line in enumerate(lines, 1)))
    raise InputError(
        f"unknown kind of file {path.suffix!r}", path=path, hint=f"use {', '.join(_SUFFIXES)}"
    )


def read_lines(path: Path, *, hint: str = "") -> list[str]:
    r"""Read the lines of a text file; only `\n` and `\r\n` end a line.

    Args:
        path: a file in UTF-8, with or without byte order mark.
        hint: what the user should do if it is missing.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    text = _read_text(path, hint)
    # Not `splitlines`, for which other characters, which sentences may hold, end a line too.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def without_empty_end(lines: list[str]) -> list[str]:
    """Return the lines without the empty ones at the end, which some programs write."""
    count = len(lines)
    while count and not lines[count - 1]:
        count -= 1
    return lines[:count]


def parse_number(text: str, path: Path, line: int) -> float:
    """Read the label of a regression.

    Raises:
        InputError: the text is not a number, or not finite as float32.
    """
    try:
        # Only Python reads "1_0" as a number.
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _LARGEST_FLOAT32:
        raise InputError(f"label {text!r} is not a number", path=path, line=line)
    return value


def _read_text(path: Path, hint: str) -> str:
    try:
        # Some copies of MRPC begin with a byte order mark.
        data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(
            f"cannot read the data ({error.strerror})", path=path, hint=hint
        ) from error
    return decode_utf8(data, path, hint="convert the file to UTF-8")


def _read_csv(path: Path) -> Iterator[Row]:
    # A cell may be as long as the file. The module's limit is against unbalanced quotes, which
    # `strict` finds too.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(_read_text(path, ""), newline=""), strict=True)

        def rows() -> Iterator[tuple[int, list[str]]]:
            try:
                for row in reader:
                    if row:  # An empty line is not a row, as in spreadsheets.
                        yield reader.line_num, row
            except csv.Error as error:
                raise InputError(
                    f"not CSV ({error})",
                    path=path,
                    line=reader.line_num,
                    hint="are its quotation marks balanced?",
                ) from error

        yield from _named(path, rows())
    finally:
        csv.field_size_limit(limit)


def _named(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    _, header = next(rows, (1, []))
    # Spreadsheets may write several columns without a name.
    named = [name for name in header if name]
    if len(set(named)) != len(named):
        raise InputError("two columns have the same name", path=path, line=1)
    for line, cells in rows:
        if len(cells) != len(header):
            raise InputError(
                f"{len(cells)} columns instead of {len(header)}" if any(cells) else "empty line",
                path=path,
                line=line,
                hint=f"the header names {', '.join(header)}",
            )
        yield line, dict(zip(header, cells, strict=True))


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(without_empty_end(read_lines(path)), 1):
        try:
            values = parse_json(line, finite=False, large_integers="keep")
        except ValueError as error:
            raise InputError(f"not JSON ({error})", path=path, line=number) from error
        if not isinstance(values, dict):
            raise InputError("not a JSON object", path=path, line=number)
        yield number, {key: _spelled(value) for key, value in values.items()}


def _spelled(value: object) -> str | None:
    """Return a value as TSV would spell it; true and 1 stay different, and so do 1 and 1.0."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json_text(value)
    return None


def _find_labels(task: TableTask, tables: Mapping[str, list[Row]]) -> tuple[str, ...]:
    if task.labels is not None:
        if len(set(task.labels)) != len(task.labels) or len(task.labels) < 2:
            raise InputError(f"labels {', '.join(task.labels)} are not two or more different ones")
        if not all(label.strip() for label in task.labels):
            raise InputError(f"one of the labels {','.join(task.labels)} is empty")
        return task.labels
    if "train" not in task.files:
        raise InputError(
            "the labels are unknown without training", hint="list them, as in --labels no,yes"
        )
    path = task.files["train"]
    lines: dict[str, int] = {}
    for row in tables["train"]:
        lines.setdefault(_label(row, task.label, path), row[0])
    spellings: dict[str, str] = {}
    for label, line in lines.items():
        if label.strip().lower() in _MISSING:
            raise InputError(
                f"the label {label!r} stands for a missing value",
                path=path,
                line=line,
                hint=f"if it is one of the labels, list them all, as in --labels no,{label}",
            )
        other = spellings.setdefault(label.strip(), label)
        if other != label:
            raise InputError(
                f"the label {label!r} differs from {other!r} only in white space around it",
                path=path,
                line=line,
                hint="spell it in one way, or list all labels with --labels",
            )
    if len(lines) < 2:
        raise InputError(
            f"the column {task.label!r} has only the label {', '.join(lines)}", path=path
        )
    if len(lines) > 1000:
        raise InputError(
            f"the column {task.label!r} has {len(lines)} different labels",
            path=path,
            hint="for numbers to predict use --regression",
        )
    return tuple(sorted(lines, key=_label_order(lines)))


def _label_order(labels: Iterable[str]) -> Callable[[str], tuple[int, str]]:
    """Return a key that orders numbers by value and other labels by text, without ties."""
    if all(label.removeprefix("-").isdecimal() and len(label) < 100 for label in labels):
        return lambda label: (int(label), label)
    return lambda label: (0, label)


def _examples(
    task: TableTask, split: str, path: Path, rows: list[Row], labels: tuple[str, ...]
) -> ClassificationExamples:
    ids = {label: label_id for label_id, label in enumerate(labels)}
    label_ids = np.zeros(len(rows), np.int32)
    values = np.zeros(len(rows), np.float32) if task.is_regression else None
    if split != "test":
        for index, row in enumerate(rows):
            label = _label(row, task.label, path)
            if values is not None:
                values[index] = parse_number(label, path, row[0])
            elif label in ids:
                label_ids[index] = ids[label]
            else:
                raise InputError(
                    f"unknown label {label!r} in the column {task.label!r}",
                    path=path,
                    line=row[0],
                    hint=f"known labels: {', '.join(labels)}",
                )
    text_b = task.text_b
    return ClassificationExamples(
        guids=tuple(f"{split}-{line}" for line, _ in rows),
        texts_a=tuple(_cell(row, task.text_a, path) for row in rows),
        texts_b=None if text_b is None else tuple(_cell(row, text_b, path) for row in rows),
        label_ids=label_ids,
        has_labels=split != "test",
        label_values=values,
    )


def _label(row: Row, column: str, path: Path) -> str:
    label = _cell(row, column, path)
    if not label.strip():
        raise InputError(
            f"no label in the column {column!r}",
            path=path,
            line=row[0],
            hint="fill it in, or leave out the line",
        )
    return label


def _cell(row: Row, column: str, path: Path) -> str:
    line, cells = row
    if column not in cells:
        raise InputError(
            f"no column {column!r}", path=path, line=line, hint=f"there are {', '.join(cells)}"
        )
    text = cells[column]
    if text is None:
        raise InputError(
            f"neither a text nor a finite number in the column {column!r}", path=path, line=line
        )
    return text
