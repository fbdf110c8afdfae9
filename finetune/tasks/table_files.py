"""Sentence classification on anybody's tables: TSV, CSV and JSON lines, by column names."""

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

# How programs spell that a value is missing, in lower case.
_MISSING = frozenset({"nan", "<na>", "#n/a", "null"})
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

Row = tuple[int, Mapping[str, str | None]]
"""A line's number from 1, and its cells by column; None: neither a text nor a finite number."""


@dataclass(frozen=True)
class TableTask:
    """A task of one's own.

    Attributes:
        files: `.tsv`, `.csv` or `.jsonl` files by split, `train`, `dev` and `test`.
        text_a: column of the (first) sentence.
        text_b: column of the second sentence; None for single sentences.
        label: column of the label; the test split need not have it.
        labels: all labels, in the order of their ids; None takes those of the training file, in
            which a word for a missing value, such as "nan", is then none.
        is_regression: the label is a number to predict.
        metrics: what to report; None: accuracy (for two labels also F1 of the second), or Pearson
            and Spearman correlation.
    """

    files: Mapping[str, Path]
    text_a: str
    text_b: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    is_regression: bool = False
    metrics: tuple[Metric, ...] | None = None


def read_table_task(task: TableTask) -> ClassificationData:
    """Reads all files of a task.

    Args:
        task: files and columns.

    Raises:
        InputError: a file is missing, not of its format or empty, a column is missing, or a label
            is unknown, missing or not a number; with the line.
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
    """Reads a table with named columns.

    A `.tsv` file has no quoting, as GLUE's; a `.csv` file has it as spreadsheets write it; a
    `.jsonl` file has one object of texts and numbers a line.

    Yields:
        Line number (of a CSV row's last line) and cells.

    Raises:
        InputError: the file is missing or not what its name says.
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
    r"""Reads the lines of a text file; they end with `\n` or `\r\n` and with nothing else.

    Args:
        path: UTF-8, with or without byte order mark.
        hint: what to do if it is not there.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    text = _read_text(path, hint)
    # Not `splitlines`: sentences may hold characters that it takes for line ends.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def without_empty_end(lines: list[str]) -> list[str]:
    """Returns the lines but the empty ones at the end, which editors and programs leave there."""
    count = len(lines)
    while count and not lines[count - 1]:
        count -= 1
    return lines[:count]


def parse_number(text: str, path: Path, line: int) -> float:
    """Reads the label of a regression.

    Raises:
        InputError: it is not a finite number, as float32 too.
    """
    try:
        # Python alone takes "1_0" for a number.
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
    # A cell may be as long as the file; the module's limit guards against unbalanced quotes, which
    # `strict` finds too.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(_read_text(path, ""), newline=""), strict=True)

        def rows() -> Iterator[tuple[int, list[str]]]:
            try:
                for row in reader:
                    if row:  # An empty line is no row, as to spreadsheets.
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
    # Spreadsheets leave several columns without a name.
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
    """As TSV would spell it: true stays apart from 1, and 1 from 1.0."""
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
    """Orders numbers by value and other labels by text; no two labels are equal in it."""
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
