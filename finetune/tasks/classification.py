"""Sentence and sentence-pair classification: examples, model inputs, result files.

It gives the model inputs of `convert_single_example` in the original's `run_classifier.py`, and the
same result files. `finetune.tasks.glue` and `finetune.tasks.table_files` read the examples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from finetune.errors import InputError
from finetune.storage.files import write_atomically
from finetune.tasks.classification_metrics import Metric
from finetune.text.tokenization import Tokenizer


@dataclass(frozen=True)
class ClassificationExamples:
    """The n examples of one split, column by column, in the order of the file.

    Attributes:
        guids: names of the examples, such as `train-1`; n strings.
        texts_a: the first or only sentences; n strings.
        texts_b: the second sentences; n strings, or None for a task of single sentences.
        label_ids: int32 [n]; zeros if the split has no labels, as in the original.
        has_labels: False for a split without labels.
        label_values: float32 [n], numbers that a regression should predict; None for classes.
        skipped_lines: numbers of the malformed lines that were skipped, from 1.
    """

    guids: tuple[str, ...]
    texts_a: tuple[str, ...]
    texts_b: tuple[str, ...] | None
    label_ids: npt.NDArray[np.int32] = field(repr=False)
    has_labels: bool
    label_values: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    skipped_lines: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.guids)


@dataclass(frozen=True)
class ClassificationFeatures:
    """Model inputs: n examples of s tokens.

    Attributes:
        input_ids: int32 [n, s], `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, then padding.
        input_mask: int32 [n, s], 1 for tokens, 0 for padding.
        segment_ids: int32 [n, s], 1 for `b [SEP]`, 0 elsewhere.
        label_ids: int32 [n].
        label_values: float32 [n], for a regression; else None.
    """

    input_ids: npt.NDArray[np.int32]
    input_mask: npt.NDArray[np.int32]
    segment_ids: npt.NDArray[np.int32]
    label_ids: npt.NDArray[np.int32]
    label_values: npt.NDArray[np.float32] | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        return len(self.label_ids)


@dataclass(frozen=True)
class ClassificationData:
    """A task, with the examples of some splits.

    Attributes:
        name: name of the task, for users.
        labels: the labels as the files spell them, in the order of their ids; empty for a
            regression.
        metrics: metrics to report; the first is the most important.
        splits: examples by the name of the split: `train`, `dev`, `test`, `dev_…` or `test_…`.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...]
    splits: Mapping[str, ClassificationExamples] = field(repr=False)

    @property
    def is_regression(self) -> bool:
        """Whether the task is to predict a number, not a label."""
        return not self.labels


def featurize(
    examples: ClassificationExamples, tokenizer: Tokenizer, *, max_seq_length: int
) -> ClassificationFeatures:
    """Turn examples into model inputs (`convert_single_example` of the original).

    A pair that is too long loses tokens one at a time, from the end of the sentence that is longer
    at the moment. A second sentence without tokens is left out, together with its `[SEP]`.

    Args:
        examples: n examples.
        tokenizer: tokenizer of the model.
        max_seq_length: number of tokens of every example (s), including padding; at least 3.

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
    return ClassificationFeatures(
        input_ids, input_mask, segment_ids, examples.label_ids, examples.label_values
    )


def truncated_lengths(length_a: int, length_b: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each sentence of a pair are kept so that both fit into `room`.

    The original (`_truncate_seq_pair`) removes a token from the end of the longer sentence, or of
    the second if they are equally long, until they fit. The result here is the same.
    """
    if length_a + length_b <= room:
        return length_a, length_b
    # The longer sentence gets the room that the shorter one leaves. If both are longer than half of
    # the room, they shrink in turn, the second first, so the first is never the shorter one.
    keep_a = min(length_a, max(room - length_b, room - room // 2))
    return keep_a, room - keep_a


def write_eval_results(path: str | os.PathLike[str], results: Mapping[str, object]) -> None:
    """Write `eval_results.txt` as the original does: sorted lines `key = value`.

    The original's keys are `eval_accuracy`, `eval_loss`, `global_step` and `loss`. The file appears
    complete or not at all, and replaces an existing one.
    """
    # With `str`: formatting would print float32 values with 16 digits.
    lines = (" = ".join((key, str(results[key]))) for key in sorted(results))
    write_atomically(path, "".join(line + "\n" for line in lines))


def write_test_results(
    path: str | os.PathLike[str],
    probabilities: npt.NDArray[np.floating] | Sequence[Sequence[float]],
) -> None:
    """Write `test_results.tsv` as the original does: an example on each line, a label per column.

    Args:
        path: the file, which appears complete or not at all; an existing one is replaced.
        probabilities: [n, labels].
    """
    write_atomically(path, "".join("\t".join(map(str, row)) + "\n" for row in probabilities))
