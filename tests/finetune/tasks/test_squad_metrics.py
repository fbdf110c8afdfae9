"""Tests of finetune.tasks.squad_metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.tasks.squad_examples import SquadExample, SquadParagraph
from finetune.tasks.squad_metrics import (
    evaluate_v1,
    evaluate_v2,
    exact_match_score,
    f1_score,
    find_best_threshold,
    normalize_answer,
    precision_recall,
    score_questions,
    tune_threshold,
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


TEXTS = st.sampled_from(["", "the", "red fox", "fox", "Red Fox!", "a red"])
ODDS = st.sampled_from([-2.5, -1.0, 0.0, 0.5, 0.5000001, 3.0])
QUESTIONS = st.lists(st.tuples(st.lists(TEXTS, max_size=3), TEXTS, ODDS), min_size=1, max_size=9)
Drawn = list[tuple[list[str], str, float]]


def scored(drawn: Drawn, with_odds: bool = True):
    examples = [question(str(i), *answers) for i, (answers, _, _) in enumerate(drawn)]
    predictions = {str(i): text for i, (_, text, _) in enumerate(drawn)}
    odds = {str(i): value for i, (_, _, value) in enumerate(drawn)} if with_odds else None
    return score_questions(examples, predictions, odds)


@pytest.mark.parametrize(
    ("answers", "prediction", "exact", "f1"),
    [
        ([], "", 1, 1),
        ([], "fox", 0, 0),
        (["red fox"], "", 0, 0),
        (["red fox", "fox"], "The fox", 1, 1),
        (["red fox"], "fox", 0, 2 / 3),
        # Nothing is left of this answer, so "" is right, although the question counts as answered.
        (["the"], "", 1, 1),
        (["the", "fox"], "", 0, 0),
        (["the"], "a", 1, 1),
    ],
)
def test_v2_scores_of_one_question(
    answers: list[str], prediction: str, exact: float, f1: float
) -> None:
    scores = scored([(answers, prediction, 0.0)])
    assert scores.exact.tolist() == [exact]
    assert scores.f1.tolist() == pytest.approx([f1])
    assert scores.has_answer.tolist() == [bool(answers)]


@given(QUESTIONS, ODDS)
def test_v2_averages(drawn: Drawn, threshold: float) -> None:
    results = evaluate_v2(scored(drawn), threshold=threshold)
    expected: dict[str, list[float]] = {"": [], "HasAns_": [], "NoAns_": []}
    for answers, text, odds in drawn:
        gold = [a for a in answers if normalize_answer(a)] or [""]
        right = max(exact_match_score(text, a) for a in gold)
        if odds > threshold:
            right = float(not answers)
        expected[""].append(right)
        expected["HasAns_" if answers else "NoAns_"].append(right)
    for prefix, values in expected.items():
        if values:
            assert results[f"{prefix}exact"] == pytest.approx(100 * sum(values) / len(values))
            assert results[f"{prefix}total"] == len(values)
        else:
            assert f"{prefix}exact" not in results


@given(QUESTIONS)
def test_best_threshold_walks_as_the_official_script(drawn: Drawn) -> None:
    scores = scored(drawn)
    current = best = sum(not answers for answers, _, _ in drawn)
    where = 0.0
    for index in sorted(range(len(drawn)), key=lambda i: drawn[i][2]):
        answers, text, odds = drawn[index]
        current += scores.f1[index] if answers else -bool(text)
        if current > best:
            best, where = current, odds
    score, threshold = find_best_threshold(scores, scores.f1)
    assert score == pytest.approx(100 * best / len(drawn))
    assert threshold == where
    results = evaluate_v2(scores, best_thresholds=True)
    assert (results["best_f1"], results["best_f1_thresh"]) == (score, threshold)


@given(QUESTIONS)
def test_no_threshold_is_better_than_the_tuned_one(drawn: Drawn) -> None:
    scores = scored(drawn)
    tuned = evaluate_v2(scores, threshold=tune_threshold(scores, scores.f1))["f1"]
    for other in (-math.inf, math.inf, *(odds for _, _, odds in drawn)):
        assert evaluate_v2(scores, threshold=other)["f1"] <= tuned + 1e-9


@given(QUESTIONS)
def test_precision_and_recall_are_those_of_thresholds(drawn: Drawn) -> None:
    scores = scored(drawn)
    curve = precision_recall(scores, scores.exact)
    answerable = [row for row in drawn if row[0]]
    if not answerable:
        assert curve is None
        return
    assert curve is not None
    points, average, before = [(1.0, 0.0)], 0.0, 0.0
    for threshold in sorted({odds for _, _, odds in drawn}):
        kept = [i for i, row in enumerate(drawn) if row[2] <= threshold]
        right = sum(scores.exact[i] for i in kept if drawn[i][0])
        points.append((right / len(kept), right / len(answerable)))
        average += points[-1][0] * (points[-1][1] - before)
        before = points[-1][1]
    got = list(zip(curve.precisions, curve.recalls, strict=True))
    np.testing.assert_allclose(got, points)
    assert curve.average_precision == pytest.approx(100 * average)


def test_v2_needs_a_prediction_for_every_question() -> None:
    with pytest.raises(InputError, match="'7' has no prediction"):
        score_questions([question("7")], {})
    with pytest.raises(InputError, match="'7' has no null odds"):
        score_questions([question("7")], {"7": ""}, {})
    with pytest.raises(InputError, match="no questions"):
        score_questions([], {})
