"""Tests of finetune.model_files.head_labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.model_files.head_labels import (
    TrainedHead,
    labels_of_config,
    read_trained_head,
    rows_of,
)
from helpers.model_folders import CONFIG, write_json

MNLI = ("contradiction", "entailment", "neutral")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"id2label": {"0": "no", "1": "yes"}}, ("no", "yes")),
        ({"id2label": {"1": "yes", "0": "no"}, "label2id": {"yes": 1, "no": 0}}, ("no", "yes")),
        ({"label2id": {"yes": 1, "no": "0"}}, ("no", "yes")),
        # Names that `transformers` makes up say nothing, also where the other key says something.
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ("a", "b")),
        ({"id2label": {str(n): str(n * 10) for n in range(12)}},
         tuple(str(n * 10) for n in range(12))),
        ({"id2label": {"0": 3, "1": 4}}, ("3", "4")),
        ({"id2label": None, "label2id": None}, None),
    ],
)  # fmt: skip
def test_labels_by_row(values: Mapping[str, Any], expected: tuple[str, ...] | None) -> None:
    assert labels_of_config(values, Path("config.json")) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "ids of id2label are not 0 to 1, but 0, 2"),
        ({"id2label": {"1": "a", "2": "b"}}, "ids of id2label are not 0 to 1"),
        ({"id2label": {"a": "0", "b": "1"}}, "ids of id2label are not"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label names a label twice"),
        ({"label2id": {"a": 0, "b": 0}}, "two labels in label2id have one id"),
        ({"label2id": {"a": 0, "b": 5}}, "ids of label2id are not 0 to 1"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, "disagree"),
    ],
)
def test_labels_that_contradict_themselves(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        labels_of_config(values, Path("config.json"))
    assert "config.json: " in str(caught.value)


def test_what_a_folder_says(tmp_path: Path) -> None:
    assert read_trained_head(tmp_path) == TrainedHead(tmp_path, None)
    config = {**CONFIG, "id2label": {"0": "b", "1": "a"}}
    write_json(tmp_path / "config.json", config)
    assert read_trained_head(tmp_path).labels == ("b", "a")
    for change, why in (
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
    ):
        write_json(tmp_path / "config.json", {**config, **change})
        assert why in read_trained_head(tmp_path).why_other
    # The record of a run tells of the weights beside it, whatever they began as.
    write_json(tmp_path / "run.json", {"labels": ["x", "y"]})
    (tmp_path / "best").mkdir()
    assert read_trained_head(tmp_path).labels == ("x", "y")
    assert read_trained_head(tmp_path / "best").labels == ("x", "y")


@given(st.permutations(MNLI))
def test_rows_follow_the_names(theirs: list[str]) -> None:
    shown = tuple(name.upper() for name in theirs)
    rows = rows_of(MNLI, TrainedHead(Path(), shown))
    assert rows is not None
    assert [theirs[row] for row in rows] == list(MNLI)


def test_names_that_differ_in_separators_only() -> None:
    assert rows_of(("entailment", "not_entailment"),
                   TrainedHead(Path(), ("Not Entailment", "Entailment"))) == (1, 0)  # fmt: skip


def test_names_that_tell_no_order_or_contradict() -> None:
    assert rows_of(("0", "1"), TrainedHead(Path(), ("equivalent", "not_equivalent"))) is None
    assert rows_of(("0", "1"), TrainedHead(Path(), None)) is None
    with pytest.raises(InputError, match="labels neutral, entailment, other, and the task contr"):
        rows_of(MNLI, TrainedHead(Path("there"), ("neutral", "entailment", "other")))
    with pytest.raises(InputError, match="there: the classifier there has the labels a, b, and"):
        rows_of(MNLI, TrainedHead(Path("there"), ("a", "b")))
