"""Sentence and sentence-pair classification: MRPC and CoLA, and what they have in common.

Reproduces the data side of `run_classifier.py` of google-research/bert: its processors, its
`convert_single_example` and its result files. A task is one row of `TASKS`; adding one needs no
other code. Unlike the original, a file that does not look as its task says is refused, with the
line that is wrong, instead of being read in some other way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from finetune.errors import InputError
from finetune.files import write_atomically
from finetune.tokenization import Tokenizer

Split = Literal["train", "dev", "test"]
Metric = Literal["f1", "matthews"]


@dataclass(frozen=True)
class SplitFormat:
    """The layout of one tab-separated file; columns are counted from 0.

    Attributes:
        file: name inside the task's folder.
        columns: number of columns that every line has.
        text_a: column of the (first) sentence.
        text_b: column of the second sentence; None for single sentences.
        label: column of the label; None for a split without labels.
        guid: column of the example's name; None: its line number from 0, as in the original.
        has_header: whether the first line names the columns.
    """

    file: str
    columns: int
    text_a: int
    text_b: int | None = None
    label: int | None = None
    guid: int | None = None
    has_header: bool = True


@dataclass(frozen=True)
class GlueTask:
    """One classification task.

    Attributes:
        name: its usual spelling; looked up without regard to case.
        labels: the labels as the files spell them; a label's id is its place here.
        train: layout of the training split; `dev` and `test` likewise.
        metric: what GLUE reports beside the accuracy: `f1` (of label id 1) or `matthews` (the
            Matthews correlation), both for two labels; None for accuracy only.
    """

    name: str
    labels: tuple[str, ...]
    train: SplitFormat
    dev: SplitFormat
    test: SplitFormat
    metric: Metric | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and len(self.labels) != 2:
            raise ValueError(f"{self.name}: {self.metric} is defined here for two labels only")


TASKS: tuple[GlueTask, ...] = (
    GlueTask(
        name="MRPC",
        labels=("0", "1"),
        train=SplitFormat("train.tsv", columns=5, text_a=3, text_b=4, label=0),
        dev=SplitFormat("dev.tsv", columns=5, text_a=3, text_b=4, label=0),
        test=SplitFormat("test.tsv", columns=5, text_a=3, text_b=4),
        metric="f1",
    ),
    GlueTask(
        name="CoLA",
        labels=("0", "1"),
        train=SplitFormat("train.tsv", columns=4, text_a=3, label=1, has_header=False),
        dev=SplitFormat("dev.tsv", columns=4, text_a=3, label=1, has_header=False),
        test=SplitFormat("test.tsv", columns=2, text_a=1),
        metric="matthews",
    ),
)


@dataclass(frozen=True)
class ClassificationExamples:
    """The examples of one split, column by column, in file order; n of them.

    Attributes:
        guids: `train-1` and so on; n strings.
        texts_a: the (first) sentences; n strings.
        texts_b: the second sentences; n strings, or None for a task of single sentences.
        label_ids: int32 [n]; zeros if the split has no labels, as in the original.
        has_labels: False for a split without labels.
    """

    guids: tuple[str, ...]
    texts_a: tuple[str, ...]
    texts_b: tuple[str, ...] | None
    label_ids: npt.NDArray[np.int32] = field(repr=False)
    has_labels: bool

    def __len__(self) -> int:
        return len(self.guids)


@dataclass(frozen=True)
class ClassificationFeatures:
    """What the model is fed: n examples of s tokens.

    Attributes:
        input_ids: int32 [n, s], `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, then padding.
        input_mask: int32 [n, s], 1 for tokens, 0 for padding.
        segment_ids: int32 [n, s], 1 for `b [SEP]`, 0 elsewhere.
        label_ids: int32 [n].
    """

    input_ids: npt.NDArray[np.int32]
    input_mask: npt.NDArray[np.int32]
    segment_ids: npt.NDArray[np.int32]
    label_ids: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.label_ids)


def find_task(name: str) -> GlueTask:
    """Returns the task called `name`, in any case.

    Raises:
        InputError: there is none; lists those that there are.
    """
    for task in TASKS:
        if task.name.lower() == name.lower():
            return task
    known = ", ".join(task.name for task in TASKS)
    raise InputError(f"unknown task {name!r}", hint=f"known tasks: {known}")


def read_examples(
    task: GlueTask, data_dir: str | os.PathLike[str], split: Split
) -> ClassificationExamples:
    """Reads one split of a task.

    As in the original there is no quoting: a quotation mark is a character of the text. Lines end
    with a line feed, or carriage return and line feed; no other character ends a line.

    Args:
        task: a row of `TASKS`, or one's own.
        data_dir: the folder that holds the task's files.
        split: `train`, `dev` or `test`.

    Raises:
        InputError: the file is missing, empty or not UTF-8, or a line has too few or too many
            columns or an unknown label, or the header is missing.
    """
    layout: SplitFormat = {"train": task.train, "dev": task.dev, "test": task.test}[split]
    path = Path(data_dir) / layout.file
    lines = _read_lines(path)
    rows: list[list[str]] = []
    for index, line in enumerate(lines):
        cells = line.split("\t")
        if len(cells) != layout.columns:
            raise InputError(
                f"{len(cells)} columns instead of {layout.columns}"
                if line
                else "the line is empty",
                path=path,
                line=index + 1,
                hint=f"{task.name}'s {split} split has {layout.columns} tab-separated columns",
            )
        rows.append(cells)
    first = int(layout.has_header)
    if layout.has_header and rows and _looks_like_data(rows[0], layout, task):
        raise InputError(
            "the header is missing",
            path=path,
            line=1,
            hint=f"{task.name}'s {split} split begins with a line that names the columns",
        )
    if len(rows) <= first:
        raise InputError("no examples in the file", path=path, hint="download it again")
    label_ids = np.zeros(len(rows) - first, np.int32)
    if layout.label is not None:
        ids = {label: label_id for label_id, label in enumerate(task.labels)}
        for index, cells in enumerate(rows[first:]):
            label = cells[layout.label]
            if label not in ids:
                raise InputError(
                    f"unknown label {label!r} in column {layout.label + 1}",
                    path=path,
                    line=index + first + 1,
                    hint=f"{task.name} has the labels {', '.join(task.labels)}",
                )
            label_ids[index] = ids[label]
    text_b, guid = layout.text_b, layout.guid
    return ClassificationExamples(
        guids=tuple(
            f"{split}-{index if guid is None else cells[guid]}"
            for index, cells in enumerate(rows[first:], first)
        ),
        texts_a=tuple(cells[layout.text_a] for cells in rows[first:]),
        texts_b=None if text_b is None else tuple(cells[text_b] for cells in rows[first:]),
        label_ids=label_ids,
        has_labels=layout.label is not None,
    )


def featurize(
    examples: ClassificationExamples, tokenizer: Tokenizer, *, max_seq_length: int
) -> ClassificationFeatures:
    """Turns examples into model inputs (`convert_single_example` of the original).

    A pair that is too long loses tokens from the end of whichever sentence is longer, one at a
    time. A second sentence without tokens is left out, with its `[SEP]`.

    Args:
        examples: n examples.
        tokenizer: of the model's vocabulary.
        max_seq_length: s, number of tokens of every example, padding included; at least 3.

    Raises:
        InputError: `max_seq_length` is less than 3.
    """
    if max_seq_length < 3:
        raise InputError(
            f"max_seq_length {max_seq_length} has no room for text", hint="use 3 or more"
        )
    count = len(examples)
    ids_a = tokenizer.encode_batch(examples.texts_a)
    ids_b = [[]] * count if examples.texts_b is None else tokenizer.encode_batch(examples.texts_b)
    input_ids = np.full((count, max_seq_length), tokenizer.pad_id, np.int32)
    input_mask = np.zeros((count, max_seq_length), np.int32)
    segment_ids = np.zeros((count, max_seq_length), np.int32)
    for row, (a, b) in enumerate(zip(ids_a, ids_b, strict=True)):
        if b:
            keep_a, keep_b = truncated_lengths(len(a), len(b), max_seq_length - 3)
        else:
            keep_a, keep_b = min(len(a), max_seq_length - 2), 0
        tokens = [tokenizer.cls_id, *a[:keep_a], tokenizer.sep_id]
        if keep_b:
            segment_ids[row, len(tokens) : len(tokens) + keep_b + 1] = 1
            tokens += [*b[:keep_b], tokenizer.sep_id]
        input_ids[row, : len(tokens)] = tokens
        input_mask[row, : len(tokens)] = 1
    return ClassificationFeatures(input_ids, input_mask, segment_ids, examples.label_ids)


def truncated_lengths(length_a: int, length_b: int, room: int) -> tuple[int, int]:
    """Returns how many tokens of each sentence of a pair remain when both must fit in `room`.

    The same as taking a token from the end of the longer one, and of the second if they are
    equally long, until they fit (`_truncate_seq_pair` of the original).
    """
    if length_a + length_b <= room:
        return length_a, length_b
    # The longer one shrinks to what the shorter leaves; at half of the room they shrink in turn,
    # the second first, so that the first is never the shorter of the two.
    keep_a = min(length_a, max(room - length_b, room - room // 2))
    return keep_a, room - keep_a


def evaluate(
    task: GlueTask, label_ids: npt.ArrayLike, predicted_ids: npt.ArrayLike
) -> dict[str, float]:
    """Compares predictions with labels.

    Args:
        task: gives the labels and the metric.
        label_ids: [n] integers, n at least 1.
        predicted_ids: [n] integers.

    Returns:
        `accuracy`, and `f1` or `matthews` where the task has it; as fractions, not percentages. An
        F1 or a correlation whose denominator is zero is 0.

    Raises:
        ValueError: the two differ in shape, are empty, or hold something other than label ids.
    """
    labels, predicted = np.asarray(label_ids), np.asarray(predicted_ids)
    if labels.ndim != 1 or labels.shape != predicted.shape or not labels.size:
        raise ValueError(f"cannot compare labels {labels.shape} with predictions {predicted.shape}")
    for ids in (labels, predicted):
        if not np.isin(ids, np.arange(len(task.labels))).all():
            raise ValueError(f"ids of {task.name} are 0 to {len(task.labels) - 1}")
    results = {"accuracy": int(np.sum(labels == predicted)) / labels.size}
    if task.metric is None:
        return results
    # Python's integers, because the product below leaves int64 from about 10^5 examples on.
    true_positive = int(np.sum((labels == 1) & (predicted == 1)))
    true_negative = int(np.sum((labels == 0) & (predicted == 0)))
    false_positive = int(np.sum((labels == 0) & (predicted == 1)))
    false_negative = int(np.sum((labels == 1) & (predicted == 0)))
    if task.metric == "f1":
        denominator = 2 * true_positive + false_positive + false_negative
        results["f1"] = 2 * true_positive / denominator if denominator else 0.0
    else:
        product = (
            (true_positive + false_positive)
            * (true_positive + false_negative)
            * (true_negative + false_positive)
            * (true_negative + false_negative)
        )
        covariance = true_positive * true_negative - false_positive * false_negative
        results["matthews"] = covariance / math.sqrt(product) if product else 0.0
    return results


def write_eval_results(path: str | os.PathLike[str], results: Mapping[str, object]) -> None:
    """Writes `eval_results.txt` as the original does: sorted lines `key = value`.

    The original's keys are `eval_accuracy`, `eval_loss`, `global_step` and `loss`. The file
    appears complete or not at all; one that was there is replaced.
    """
    # `str`, not formatting, which would print float32 values with 16 digits.
    lines = (" = ".join((key, str(results[key]))) for key in sorted(results))
    write_atomically(path, "".join(line + "\n" for line in lines))


def write_test_results(
    path: str | os.PathLike[str],
    probabilities: npt.NDArray[np.floating] | Sequence[Sequence[float]],
) -> None:
    """Writes `test_results.tsv` as the original does: an example a line, a column a label.

    Args:
        path: the file; it appears complete or not at all, and one that was there is replaced.
        probabilities: [n, labels].
    """
    write_atomically(path, "".join("\t".join(map(str, row)) + "\n" for row in probabilities))


def _read_lines(path: Path) -> list[str]:
    try:
        # Some copies of MRPC begin with a byte order mark.
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(
            f"cannot read the data ({error.strerror})",
            path=path,
            hint="give the folder that holds the task's .tsv files",
        ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8 text ({error.reason})",
            path=path,
            line=data.count(b"\n", 0, error.start) + 1,
            hint="convert the file to UTF-8",
        ) from error
    # Not `splitlines`: sentences may hold characters that it takes for line ends.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _looks_like_data(cells: list[str], layout: SplitFormat, task: GlueTask) -> bool:
    """Whether the line in the header's place would be lost as an example.

    GLUE's files with a header begin with a number in every line but that, or have a label column.
    """
    has_label = layout.label is not None and cells[layout.label] in task.labels
    return has_label or cells[0].isdecimal()
