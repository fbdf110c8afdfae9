"""`eval squad` beside the official script of SQuAD 2.0, whose steps are written out here anew."""

from __future__ import annotations

import json
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertbench.cli.eval import command
from finetune.tasks.squad_examples import read_squad
from finetune.tasks.squad_metrics import evaluate_v1, evaluate_v2, precision_recall, score_questions

Questions = list[tuple[str, list[str]]]


def words(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def word_f1(gold: str, predicted: str) -> float:
    expected, got = words(gold), words(predicted)
    if not expected or not got:
        return float(expected == got)
    same = sum((Counter(expected) & Counter(got)).values())
    if not same:
        return 0.0
    precision, recall = same / len(got), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def official_results(
    questions: Questions, predictions: dict[str, str], odds: dict[str, float] | None, limit: float
) -> dict[str, float]:
    """What evaluate-v2.0.py prints: all of it goes by id, so that the last of equal ids counts."""
    answerable = {qas_id: bool(answers) for qas_id, answers in questions}
    exact: dict[str, float] = {}
    f1: dict[str, float] = {}
    for qas_id, answers in questions:
        gold = [answer for answer in answers if words(answer)] or [""]
        exact[qas_id] = max(float(words(g) == words(predictions[qas_id])) for g in gold)
        f1[qas_id] = max(word_f1(g, predictions[qas_id]) for g in gold)
    used = dict.fromkeys(predictions, 0.0) if odds is None else odds

    def cut(scores: dict[str, float]) -> dict[str, float]:
        return {
            qas_id: float(not answerable[qas_id]) if used[qas_id] > limit else score
            for qas_id, score in scores.items()
        }

    results: dict[str, float] = {}
    for prefix, wanted in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        ids = [qas_id for qas_id, kind in answerable.items() if kind in wanted]
        if ids:
            for name, scores in (("exact", cut(exact)), ("f1", cut(f1))):
                total = 0.0
                for qas_id in ids:
                    total += scores[qas_id]
                results[prefix + name] = 100.0 * total / len(ids)
            results[f"{prefix}total"] = len(ids)
    if odds is not None:
        for name, scores in (("exact", exact), ("f1", f1)):
            now: float = sum(not kind for kind in answerable.values())
            best, where = now, 0.0
            for qas_id in sorted(odds, key=lambda one: odds[one]):
                if qas_id in scores:
                    gain = scores[qas_id] if answerable[qas_id] else -bool(predictions[qas_id])
                    now += gain
                    if now > best:
                        best, where = now, odds[qas_id]
            results[f"best_{name}"] = 100.0 * best / len(scores)
            results[f"best_{name}_thresh"] = where
    return results


TEXTS = st.sampled_from(["", "the", "red fox", "fox", "Red Fox!", "a red", "fox in a red box"])
ODDS = st.sampled_from([-2.5, 0.0, 0.5, 0.5, 1.0, 1.5])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Questions, dict[str, str], dict[str, float]]:
    """Questions, some with the same id; predictions and odds in other orders, also of others."""
    ids = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=9))
    questions = [(qas_id, draw(st.lists(TEXTS, max_size=3))) for qas_id in ids]
    known = sorted({*ids, *draw(st.sets(st.sampled_from("xyz")))})
    predictions = {qas_id: draw(TEXTS) for qas_id in draw(st.permutations(known))}
    odds = {qas_id: draw(ODDS) for qas_id in draw(st.permutations(known))}
    return questions, predictions, odds


def write_data(path: Path, questions: Questions) -> Path:
    qas = [
        {"id": i, "question": "?", "answers": [{"text": a, "answer_start": 0} for a in answers]}
        for i, answers in questions
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "x", "qas": qas}]}]}))
    return path


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "data.json"


@given(cases(), st.booleans(), ODDS)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_results_are_those_of_the_official_script(
    data_file: Path, case: tuple[Questions, dict[str, str], dict[str, float]], with_odds: bool,
    limit: float,
) -> None:  # fmt: skip
    questions, predictions, all_odds = case
    odds = all_odds if with_odds else None
    expected = official_results(questions, predictions, odds, limit)
    examples = read_squad(
        write_data(data_file, questions), is_training=False, version_2_with_negative=True
    )
    scores = score_questions(examples, predictions, odds)
    results = evaluate_v2(scores, threshold=limit, best_thresholds=with_odds)
    if odds is None:
        # Without odds all of them are 0, and the command asks for no threshold.
        expected = official_results(questions, predictions, odds, 1.0)
        results = evaluate_v2(scores)
    assert results == expected
    assert list(results) == list(expected)


@given(cases())
def test_the_curve_goes_by_odds_and_by_id(
    data_file: Path, case: tuple[Questions, dict[str, str], dict[str, float]]
) -> None:
    questions, predictions, odds = case
    examples = read_squad(
        write_data(data_file, questions), is_training=False, version_2_with_negative=True
    )
    scores = score_questions(examples, predictions, odds)
    answers = dict(questions)
    assert len(scores.exact) == len(answers)
    curve = precision_recall(scores, scores.exact)
    if not any(answers.values()):
        assert curve is None
        return
    assert curve is not None
    known = [qas_id for qas_id in sorted(odds, key=lambda one: odds[one]) if qas_id in answers]
    right = average = 0.0
    recall = 0.0
    exact = dict(zip(answers, scores.exact, strict=True))
    for place, qas_id in enumerate(known, 1):
        right += exact[qas_id] if answers[qas_id] else 0.0
        if place == len(known) or odds[qas_id] != odds[known[place]]:
            now = right / sum(map(bool, answers.values()))
            average += right / place * (now - recall)
            recall = now
    assert curve.average_precision == 100.0 * average


@given(cases(), st.sets(st.sampled_from("abc")))
def test_version_1_goes_by_question(
    data_file: Path, case: tuple[Questions, dict[str, str], dict[str, float]], left_out: set[str]
) -> None:
    """As evaluate-v1.1.py: equal ids count each, and one without prediction is wrong."""
    questions = [(qas_id, answers or ["fox"]) for qas_id, answers in case[0]]
    predictions = {i: text for i, text in case[1].items() if i not in left_out}
    exact = f1 = 0.0
    for qas_id, answers in questions:
        if qas_id in predictions:
            text = predictions[qas_id]
            exact += max(words(answer) == words(text) for answer in answers)
            # Unlike in version 2.0, two texts without a word have none in common.
            f1 += max(word_f1(answer, text) if words(answer) else 0.0 for answer in answers)
    examples = read_squad(
        write_data(data_file, questions), is_training=False, version_2_with_negative=False
    )
    scores = evaluate_v1(examples, predictions)
    assert scores == {
        "exact_match": 100.0 * exact / len(questions),
        "f1": 100.0 * f1 / len(questions),
    }


def evaluate(folder: Path, case: Any, *more: str) -> Any:
    """Run the command on files of these contents."""
    questions, predictions, odds = case
    data = write_data(folder / "data.json", questions)
    (folder / "predictions.json").write_text(json.dumps(predictions))
    (folder / "odds.json").write_text(json.dumps(odds))
    files = [str(data), str(folder / "predictions.json")]
    if odds is not None:
        files += ["--na_prob_file", str(folder / "odds.json")]
    return CliRunner().invoke(command, ["squad", *files, "--json", "-", *more])


# Right, wrong, and wrong to answer at all; "c" is the one with odds above 1.
CASE = (
    [("a", ["fox"]), ("b", ["fox"]), ("c", [])],
    {"a": "fox", "b": "red", "c": "red"},
    {"a": 0.5, "b": 0.5, "c": 1.5},
)


def test_ties_are_taken_in_the_order_of_the_odds_file(tmp_path: Path) -> None:
    """Whether "c" or "a" comes first among equals decides what can be reached."""
    questions, predictions, _ = CASE
    for order, best in ((("a", "b", "c"), 200 / 3), (("c", "b", "a"), 100 / 3)):
        case = (questions, predictions, dict.fromkeys(order, 0.5))
        result = evaluate(tmp_path, case)
        assert json.loads(result.stdout)["best_exact"] == pytest.approx(best)


def test_the_threshold_is_1_unless_given(tmp_path: Path) -> None:
    result = evaluate(tmp_path, CASE)
    assert json.loads(result.stdout)["exact"] == pytest.approx(200 / 3)
    assert "1 answers count as no answer" in result.stderr
    for more, exact in (
        (["--na_prob_thresh", "inf"], 100 / 3),
        (["--na_prob_thresh", "0"], 100 / 3),
    ):
        result = evaluate(tmp_path, CASE, *more)
        assert json.loads(result.stdout)["exact"] == pytest.approx(exact)
        assert not result.stderr
    without = evaluate(tmp_path, (*CASE[:2], None))
    assert json.loads(without.stdout)["exact"] == pytest.approx(100 / 3)
    assert "best_exact" not in json.loads(without.stdout)


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    questions, predictions, odds = CASE
    for case, more, message in (
        ((questions, {"a": "fox"}, odds), (), "question 'b' has no prediction, nor have 1 others"),
        ((questions, predictions, {"a": 0.5}), (), "'b' has no null odds, nor have 1 others"),
        ((questions, {**predictions, "a": None}, odds), (), "'a' has None, not a text"),
        ((questions, predictions, {**odds, "a": None}), (), "'a' has None, not a number"),
    ):
        result = evaluate(tmp_path, case, *more)
        assert message in str(result.exception), result
    result = evaluate(tmp_path, CASE, "--na_prob_thresh", "nan")
    assert (result.exit_code, "nan is not a number" in result.output) == (2, True)
