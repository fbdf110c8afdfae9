"""Tests of finetune.tasks.squad_metrics."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.tasks.squad_examples import SquadExample, SquadParagraph
from finetune.tasks.squad_metrics import (
    evaluate_v1,
    exact_match_score,
    f1_score,
    normalize_answer,
)


def question(qas_id: str, *answers: str) -> SquadExample:
    return SquadExample(qas_id, "?", SquadParagraph.from_context("x"), gold_answers=answers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Quick, brown\tfox!", "quick brown fox"),
        ("a an the", ""),
        ("Theatre another", "theatre another"),
        ("U.S.A.", "usa"),
        # Punctuation goes first, so what it kept apart grows together and is no article any more.
        ("the-end", "theend"),
        ("“the” end", "“ ” end"),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat", "cat sat down", 0.8),
        ("cat cat cat", "cat", 0.5),
        ("cat cat", "cat cat dog dog", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 0.0),  # both empty after normalization: no word in common
    ],
)
def test_f1(prediction: str, answer: str, expected: float) -> None:
    assert f1_score(prediction, answer) == pytest.approx(expected)


@given(st.text("ab .the", max_size=12), st.text("ab .the", max_size=12))
def test_f1_is_symmetric_and_one_for_exact_matches(left: str, right: str) -> None:
    assert f1_score(left, right) == pytest.approx(f1_score(right, left))
    assert 0 <= f1_score(left, right) <= 1
    if exact_match_score(left, right) and normalize_answer(left):
        assert f1_score(left, right) == 1.0


def test_best_answer_counts_and_missing_predictions_are_wrong() -> None:
    examples = [
        question("exact", "dog", "The cat."),
        question("partly", "cat sat down", "dog"),
        question("missing", "cat"),
        question("wrong", "cat"),
    ]
    predictions = {"exact": "cat", "partly": "the cat sat", "wrong": "dog", "unknown": "cat"}
    scores = evaluate_v1(examples, predictions)
    assert scores == {"exact_match": 25.0, "f1": pytest.approx(45.0)}


def test_exact_match_and_f1_may_come_from_different_answers() -> None:
    scores = evaluate_v1([question("q", "a", "cat dog")], {"q": "the"})
    assert scores == {"exact_match": 100.0, "f1": 0.0}


def test_nothing_to_score() -> None:
    with pytest.raises(InputError, match="no questions"):
        evaluate_v1([], {})
    with pytest.raises(InputError, match="'q' has no answers"):
        evaluate_v1([question("q")], {"q": "cat"})
