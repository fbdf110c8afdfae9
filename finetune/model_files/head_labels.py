"""Which label each row of a trained classifier's head stands for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.model_files.model_folder import read_config_values, run_record

_HINT = "list the labels in the head's order with --labels, or mend the file"
_PLACEHOLDER = re.compile(r"LABEL_\d+")
# Models whose classifier scores each token, or each of several texts.
_OTHER_HEADS = ("TokenClassification", "MultipleChoice")


@dataclasses.dataclass(frozen=True)
class TrainedHead:
    """What a folder says about the task head among its weights.

    Attributes:
        folder: the folder.
        labels: the label of each row; None if the folder does not say.
        why_other: why the head cannot be a classifier that gives each text one class; "" if it
            may be one.
    """

    folder: Path
    labels: tuple[str, ...] | None
    why_other: str = ""


def read_trained_head(folder: Path) -> TrainedHead:
    """Read what a folder says about its head, from the record of its run or its configuration.

    Args:
        folder: the folder with the weights.

    Raises:
        InputError: a file cannot be read, or contradicts itself.
    """
    recorded = recorded_labels(folder)
    if recorded is not None:
        return TrainedHead(folder, recorded)
    path, values = read_config_values(folder)
    if path is None:
        return TrainedHead(folder, None)
    names = values.get("architectures")
    for name in names if isinstance(names, list) else []:
        if str(name).endswith(_OTHER_HEADS):
            return TrainedHead(folder, None, f"it is of a {name!s:.60}")
    if values.get("problem_type") == "multi_label_classification":
        return TrainedHead(folder, None, "its problem_type is multi_label_classification")
    return TrainedHead(folder, labels_of_config(values, path))


def recorded_labels(folder: Path) -> tuple[str, ...] | None:
    """Return the labels in the record of a folder's run; None without record or labels.

    Raises:
        InputError: there is a record, but it cannot be read.
    """
    labels = run_record(folder).get("labels")
    return tuple(map(str, labels)) if isinstance(labels, list) and labels else None


def labels_of_config(values: Mapping[str, Any], path: Path) -> tuple[str, ...] | None:
    """Read the labels of a head from a configuration of Hugging Face.

    Returns:
        Labels by row, or None if there are only placeholders, `LABEL_0` and so on.

    Raises:
        InputError: ids are not 0, 1 and so on, two rows have one label, or `id2label` and
            `label2id` disagree.
    """
    by_id = _by_row(values.get("id2label"), "id2label", path)
    inverse = values.get("label2id")
    by_label = None
    if isinstance(inverse, dict):
        turned = {str(row): label for label, row in inverse.items()}
        if len(turned) != len(inverse):
            raise InputError("two labels in label2id have one id", path=path, hint=_HINT)
        by_label = _by_row(turned, "label2id", path)
    if by_id is not None and by_label is not None and by_id != by_label:
        raise InputError("id2label and label2id disagree", path=path, hint=_HINT)
    return by_label if by_id is None else by_id


def _by_row(named: Any, key: str, path: Path) -> tuple[str, ...] | None:
    if not isinstance(named, dict) or not named:
        return None
    wanted = [str(row) for row in range(len(named))]
    if set(named) != set(wanted):
        raise InputError(
            f"the ids of {key} are not 0 to {len(named) - 1}, but {', '.join(named)[:60]}",
            path=path,
            hint=_HINT,
        )
    labels = tuple(str(named[row]) for row in wanted)
    if all(_PLACEHOLDER.fullmatch(label) for label in labels):
        return None
    if len(set(labels)) != len(labels):
        raise InputError(f"{key} names a label twice", path=path, hint=_HINT)
    return labels


def rows_of(labels: Sequence[str], head: TrainedHead) -> tuple[int, ...] | None:
    """Find the row of a trained head for each label of a task.

    Labels are the same if they differ only in case, or in the characters between their words.

    Args:
        labels: the labels of the task.
        head: a head with as many rows.

    Returns:
        Rows in the order of the task's labels; None if nothing tells their order, because the
        head's labels are unknown or all have other names.

    Raises:
        InputError: some labels of task and head are the same, and others are not.
    """
    if head.labels is None:
        return None
    ours, theirs = ([_plain(label) for label in named] for named in (labels, head.labels))
    if set(ours) == set(theirs) and len(set(ours)) == len(ours):
        return tuple(theirs.index(label) for label in ours)
    if set(ours) & set(theirs) or len(ours) != len(theirs):
        raise InputError(
            f"the classifier there has the labels {', '.join(head.labels)}, and the task "
            f"{', '.join(labels)}",
            path=head.folder,
            hint="give weights for these labels, or train",
        )
    return None


def _plain(label: str) -> str:
    return re.sub(r"[\s_-]+", "_", label.strip().casefold())
