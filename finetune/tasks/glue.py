"""The tasks of GLUE, and XNLI: the layout of their files, and reading them.

It reads what the processors of the original's `run_classifier.py` read (MNLI, MRPC, CoLA, XNLI),
and also the other tasks of GLUE (Wang et al. 2019). A task is one row of `TASKS`; a new task needs
no other code. Unlike the original, a file with another layout than that of its task is refused,
with the line that is wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from finetune.errors import InputError
from finetune.tasks.classification import ClassificationData, ClassificationExamples
from finetune.tasks.classification_metrics import REGRESSION_METRICS, Metric
from finetune.tasks.table_files import parse_number, read_lines, without_empty_end


@dataclass(frozen=True)
class SplitFormat:
    """The layout of one tab-separated file; columns are counted from 0.

    Attributes:
        file: name of the file in the task's folder.
        columns: number of columns of every line.
        text_a: column of the first or only sentence.
        text_b: column of the second sentence; None for single sentences.
        label: column of the label; None for a split without labels.
        guid: column of the example's name; None for the number of the line, from 0, as in the
            original.
        has_header: whether the first line names the columns.
        only: a column, and its value in the lines that are kept; None keeps all lines.
        names: names of the sentences' columns in the published header, in lower case.
        skips_malformed: skip and count lines with another number of columns. Only for files that
            are published with such lines.
    """

    file: str
    columns: int
    text_a: int
    text_b: int | None = None
    label: int | None = None
    guid: int | None = None
    has_header: bool = True
    only: tuple[int, str] | None = None
    names: tuple[str, ...] = ()
    skips_malformed: bool = False


@dataclass(frozen=True)
class GlueTask:
    """One classification task.

    Attributes:
        name: usual spelling of its name; it is found in lower case too.
        labels: the labels as the files spell them; the id of a label is its place here. Empty for a
            regression, whose labels are numbers.
        train: layout of the training split; `dev` and `test` are those of the other splits.
        metrics: metrics that GLUE reports, the most important first (the paper's table 1).
        more: further splits to evaluate or predict, by names such as `dev_mismatched`; each is
            used if its file exists.
        other_labels: other spellings of labels, and the label of each.
    """

    name: str
    labels: tuple[str, ...]
    train: SplitFormat
    dev: SplitFormat
    test: SplitFormat
    metrics: tuple[Metric, ...] = ("accuracy",)
    more: Mapping[str, SplitFormat] = field(default_factory=dict)
    other_labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "f1" in self.metrics and len(self.labels) != 2:
            raise ValueError(f"{self.name}: f1 is defined here for two labels only")
        if bool(self.labels) == any(metric in REGRESSION_METRICS for metric in self.metrics):
            raise ValueError(f"{self.name}: labels and metrics do not belong together")

    @property
    def splits(self) -> dict[str, SplitFormat]:
        """The layouts of all splits by name."""
        return {"train": self.train, "dev": self.dev, "test": self.test, **self.more}


_NLI_LABELS = ("contradiction", "entailment", "neutral")
# A few questions in the published training file contain line ends.
_QQP_NAMES = ("question1", "question2")
_QQP_LABELLED = SplitFormat(
    "", 6, text_a=3, text_b=4, label=5, guid=0, names=_QQP_NAMES, skips_malformed=True
)
_MRPC_NAMES = ("#1 string", "#2 string")
_PAIR_NAMES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")


def _pair_task(
    name: str, labels: tuple[str, ...], names: tuple[str, str] = _PAIR_NAMES
) -> GlueTask:
    """Make a task whose files have the columns `index, sentence, sentence, label`."""
    labelled = SplitFormat("train.tsv", columns=4, text_a=1, text_b=2, label=3, guid=0, names=names)
    return GlueTask(
        name,
        labels,
        train=labelled,
        dev=dataclasses.replace(labelled, file="dev.tsv"),
        test=SplitFormat("test.tsv", columns=3, text_a=1, text_b=2, guid=0, names=names),
    )


def _mnli_split(file: str, columns: int, label: int | None) -> SplitFormat:
    return SplitFormat(file, columns, text_a=8, text_b=9, label=label, guid=0, names=_PAIR_NAMES)


def _xnli(language: str) -> GlueTask:
    def evaluated(file: str, label: int | None) -> SplitFormat:
        return SplitFormat(
            file, 19, text_a=6, text_b=7, label=label, only=(0, language), names=_PAIR_NAMES
        )

    return GlueTask(
        name="XNLI",
        labels=_NLI_LABELS,
        train=SplitFormat(
            f"multinli/multinli.train.{language}.tsv",
            columns=3,
            text_a=0,
            text_b=1,
            label=2,
            names=("premise", "hypo"),
        ),
        dev=evaluated("xnli.dev.tsv", 1),
        test=evaluated("xnli.test.tsv", None),
        other_labels={"contradictory": "contradiction"},
    )


TASKS: tuple[GlueTask, ...] = (
    GlueTask(
        name="CoLA",
        labels=("0", "1"),
        train=SplitFormat("train.tsv", columns=4, text_a=3, label=1, has_header=False),
        dev=SplitFormat("dev.tsv", columns=4, text_a=3, label=1, has_header=False),
        test=SplitFormat("test.tsv", columns=2, text_a=1, names=("sentence",)),
        metrics=("matthews", "accuracy"),
    ),
    GlueTask(
        name="MNLI",
        labels=_NLI_LABELS,
        train=_mnli_split("train.tsv", 12, 11),
        dev=_mnli_split("dev_matched.tsv", 16, 15),
        test=_mnli_split("test_matched.tsv", 10, None),
        more={
            "dev_mismatched": _mnli_split("dev_mismatched.tsv", 16, 15),
            "test_mismatched": _mnli_split("test_mismatched.tsv", 10, None),
        },
    ),
    GlueTask(
        name="MRPC",
        labels=("0", "1"),
        train=SplitFormat("train.tsv", columns=5, text_a=3, text_b=4, label=0, names=_MRPC_NAMES),
        dev=SplitFormat("dev.tsv", columns=5, text_a=3, text_b=4, label=0, names=_MRPC_NAMES),
        test=SplitFormat("test.tsv", columns=5, text_a=3, text_b=4, names=_MRPC_NAMES),
        metrics=("f1", "accuracy"),
    ),
    _pair_task("QNLI", _ENTAILMENT, ("question", "sentence")),
    GlueTask(
        name="QQP",
        labels=("0", "1"),
        train=dataclasses.replace(_QQP_LABELLED, file="train.tsv"),
        dev=dataclasses.replace(_QQP_LABELLED, file="dev.tsv"),
        test=SplitFormat("test.tsv", 3, text_a=1, text_b=2, guid=0, names=_QQP_NAMES),
        metrics=("f1", "accuracy"),
    ),
    _pair_task("RTE", _ENTAILMENT),
    GlueTask(
        name="SST-2",
        labels=("0", "1"),
        train=SplitFormat("train.tsv", columns=2, text_a=0, label=1, names=("sentence",)),
        dev=SplitFormat("dev.tsv", columns=2, text_a=0, label=1, names=("sentence",)),
        test=SplitFormat("test.tsv", columns=2, text_a=1, guid=0, names=("sentence",)),
    ),
    GlueTask(
        name="STS-B",
        labels=(),
        train=SplitFormat(
            "train.tsv", columns=10, text_a=7, text_b=8, label=9, guid=0, names=_PAIR_NAMES
        ),
        dev=SplitFormat(
            "dev.tsv", columns=10, text_a=7, text_b=8, label=9, guid=0, names=_PAIR_NAMES
        ),
        test=SplitFormat("test.tsv", columns=9, text_a=7, text_b=8, guid=0, names=_PAIR_NAMES),
        metrics=("spearman", "pearson"),
    ),
    _pair_task("WNLI", ("0", "1")),
    _xnli("zh"),
)


def find_task(name: str, *, language: str = "zh") -> GlueTask:
    """Find a task by its name, in upper or lower case.

    Args:
        name: name such as `MRPC`; `SST2` and `STSB` are accepted too.
        language: language of XNLI; the original always takes Chinese.

    Raises:
        InputError: there is no such task; the message lists all tasks.
    """
    wanted = name.lower().replace("-", "")
    for task in TASKS:
        if task.name.lower().replace("-", "") == wanted:
            return _xnli(language) if task.name == "XNLI" else task
    known = ", ".join(task.name for task in TASKS)
    raise InputError(
        f"unknown task {name!r}", hint=f"known tasks: {known}; or give --train_file and columns"
    )


def read_task(
    task: GlueTask, data_dir: str | os.PathLike[str], wanted: Collection[str]
) -> ClassificationData:
    """Read splits of a task; with `dev` or `test` also their further parts, if the files exist.

    Args:
        task: a row of `TASKS`, or a task of the caller.
        data_dir: the folder that holds the task's files.
        wanted: some of `train`, `dev` and `test`.

    Raises:
        InputError: see `read_examples`.
    """
    splits = {}
    for split, layout in task.splits.items():
        is_there = split not in task.more or (Path(data_dir) / layout.file).is_file()
        if split.partition("_")[0] in wanted and is_there:
            splits[split] = read_examples(task, data_dir, split)
    return ClassificationData(task.name, task.labels, task.metrics, splits)


def read_examples(
    task: GlueTask, data_dir: str | os.PathLike[str], split: str
) -> ClassificationExamples:
    """Read one split of a task.

    As in the original there is no quoting: a quotation mark is a character of the text. A line ends
    with a line feed, or with carriage return and line feed; no other character ends a line.

    Args:
        task: a row of `TASKS`, or a task of the caller.
        data_dir: the folder that holds the task's files.
        split: one of `task.splits`.

    Raises:
        InputError: the file is missing, empty or not UTF-8, or a line has too few or too many
            columns or an unknown label, or the header is missing or in another order.
    """
    layout = task.splits[split]
    path = Path(data_dir) / layout.file
    first = int(layout.has_header)
    rows: list[tuple[int, list[str]]] = []
    skipped: list[int] = []
    for index, line in enumerate(without_empty_end(read_lines(path, hint=_FOLDER_HINT))):
        cells = line.split("\t")
        if len(cells) != layout.columns:
            if layout.skips_malformed and index >= first:
                skipped.append(index + 1)
                continue
            raise InputError(
                f"{len(cells)} columns instead of {layout.columns}"
                if line
                else "the line is empty",
                path=path,
                line=index + 1,
                hint=f"{task.name}'s {split} split has {layout.columns} tab-separated columns",
            )
        if layout.has_header and index == 0 and _looks_like_data(cells, layout, task):
            raise InputError(
                "the header is missing",
                path=path,
                line=1,
                hint=f"{task.name}'s {split} split begins with a line that names the columns",
            )
        if layout.has_header and index == 0:
            _check_names(cells, layout, path)
        if index >= first and (layout.only is None or cells[layout.only[0]] == layout.only[1]):
            rows.append((index, cells))
    if not rows:
        what = "" if layout.only is None else f" with {layout.only[1]!r} in column 1"
        raise InputError(f"no examples{what} in the file", path=path, hint="download it again")
    label_ids = np.zeros(len(rows), np.int32)
    label_values = None if task.labels else np.zeros(len(rows), np.float32)
    if layout.label is not None:
        ids = {label: label_id for label_id, label in enumerate(task.labels)}
        ids |= {other: ids[label] for other, label in task.other_labels.items()}
        for row, (index, cells) in enumerate(rows):
            label = cells[layout.label]
            if label_values is not None:
                label_values[row] = parse_number(label, path, index + 1)
            elif label not in ids:
                raise InputError(
                    f"unknown label {label!r} in column {layout.label + 1}",
                    path=path,
                    line=index + 1,
                    hint=f"{task.name} has the labels {', '.join(task.labels)}",
                )
            else:
                label_ids[row] = ids[label]
    text_b, guid = layout.text_b, layout.guid
    prefix = split.partition("_")[0]
    return ClassificationExamples(
        guids=tuple(f"{prefix}-{i if guid is None else cells[guid]}" for i, cells in rows),
        texts_a=tuple(cells[layout.text_a] for _, cells in rows),
        texts_b=None if text_b is None else tuple(cells[text_b] for _, cells in rows),
        label_ids=label_ids,
        has_labels=layout.label is not None,
        label_values=label_values,
        skipped_lines=tuple(skipped),
    )


def _check_names(header: list[str], layout: SplitFormat, path: Path) -> None:
    """Refuse a header whose columns of sentences are in another order than the published one."""
    found = [name.strip().lower() for name in header]
    wanted = (layout.text_a, layout.text_b)
    for column, name in zip(wanted, layout.names, strict=False):
        if column is not None and found[column] != name and name in found:
            raise InputError(
                f"{name!r} is column {found.index(name) + 1} instead of {column + 1}",
                path=path,
                line=1,
                hint="put the columns in the published order, or give --train_file and columns",
            )


_FOLDER_HINT = "give the folder that holds the task's .tsv files"


def _looks_like_data(cells: list[str], layout: SplitFormat, task: GlueTask) -> bool:
    """Return whether the first line is not a header, but an example that would be lost.

    In GLUE's files with a header, every other line begins with a number or has a label.
    """
    has_label = layout.label is not None and cells[layout.label] in task.labels
    return has_label or cells[0].isdecimal()
