"""SQuAD's official metrics: exact match and F1, and those of version 2.0.

They are the numbers of `evaluate-v1.1.py` (Rajpurkar et al. 2016, section 6.1) and of
`evaluate-v2.0.py` (Rajpurkar et al. 2018, section 5).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from finetune.errors import InputError
from finetune.tasks.squad_examples import SquadExample

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower letters, drop ASCII punctuation and English articles, and join words by spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match_score(prediction: str, answer: str) -> float:
    """Return 1.0 if both texts are the same after normalization, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1_score(prediction: str, answer: str) -> float:
    """Return the F1 of two texts as bags of normalized words, 0 to 1.

    Example:
        >>> f1_score("the Denver Broncos", "Broncos")
        0.6666666666666666
    """
    predicted = normalize_answer(prediction).split()
    expected = normalize_answer(answer).split()
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    precision = common / len(predicted)
    recall = common / len(expected)
    return 2 * precision * recall / (precision + recall)


def evaluate_v1(
    examples: Iterable[SquadExample], predictions: Mapping[str, str]
) -> dict[str, float]:
    """Score each prediction by the best matching answer of its question.

    Args:
        examples: questions with `gold_answers`; a question without a prediction counts as wrong.
        predictions: texts by question id.

    Returns:
        `exact_match` and `f1` in percent, averaged over all questions.

    Raises:
        InputError: there are no questions, or one has no answers.
    """
    total = 0
    exact_match = f1 = 0.0
    for example in examples:
        total += 1
        if not example.gold_answers:
            raise InputError(
                f"question {example.qas_id!r} has no answers, so it cannot be scored",
                hint="evaluate SQuAD 2.0 files with the metrics of version 2.0",
            )
        if example.qas_id not in predictions:
            continue
        text = predictions[example.qas_id]
        exact_match += max(exact_match_score(text, answer) for answer in example.gold_answers)
        f1 += max(f1_score(text, answer) for answer in example.gold_answers)
    if total == 0:
        raise InputError("no questions to evaluate", hint="give a file with questions")
    return {"exact_match": 100.0 * exact_match / total, "f1": 100.0 * f1 / total}


@dataclass(frozen=True)
class QuestionScores:
    """Scores of n questions by version 2.0, before any threshold, in the order of the file.

    Of several questions with the same id the last one counts, at the place of the first.

    Attributes:
        has_answer: bool [n], the file has an answer.
        is_answered: bool [n], the prediction is not "".
        exact: float64 [n], 0 or 1; for a question without answer, 1 if the prediction is "".
        f1: float64 [n], F1, likewise.
        no_answer_odds: float64 [n], a larger number makes "no answer" likelier.
        by_odds: int [n], indices of the questions, sorted by their odds. Questions with equal odds
            are in the order in which the odds were given, which may differ from that of the
            questions.
    """

    has_answer: npt.NDArray[np.bool_] = field(repr=False)
    is_answered: npt.NDArray[np.bool_] = field(repr=False)
    exact: npt.NDArray[np.float64] = field(repr=False)
    f1: npt.NDArray[np.float64] = field(repr=False)
    no_answer_odds: npt.NDArray[np.float64] = field(repr=False)
    by_odds: npt.NDArray[np.intp] = field(repr=False)

    def at_threshold(self, threshold: float) -> QuestionScores:
        """Return the scores if questions with odds above a threshold are left unanswered."""
        silent = self.no_answer_odds > threshold
        right = (~self.has_answer).astype(np.float64)
        return QuestionScores(
            self.has_answer,
            self.is_answered & ~silent,
            np.where(silent, right, self.exact),
            np.where(silent, right, self.f1),
            self.no_answer_odds,
            self.by_odds,
        )


def score_questions(
    examples: Iterable[SquadExample],
    predictions: Mapping[str, str],
    no_answer_odds: Mapping[str, float] | None = None,
) -> QuestionScores:
    """Score each question as version 2.0 does, by its best matching answer.

    Without an answer the prediction should be "". As in the official script, answers of which
    normalization leaves nothing do not count.

    Args:
        examples: questions with their `gold_answers`.
        predictions: texts by question id, "" for no answer.
        no_answer_odds: scores by question id, as in `null_odds.json`; None for 0 everywhere.

    Raises:
        InputError: there are no questions, or a question has no prediction or no odds.
    """
    questions = {example.qas_id: example for example in examples}
    if not questions:
        raise InputError("no questions to evaluate", hint="give a file with questions")
    for what, known in (("prediction", predictions), ("null odds", no_answer_odds)):
        missing = [] if known is None else [qas_id for qas_id in questions if qas_id not in known]
        if missing:
            others = f", nor have {len(missing) - 1:,} others" if len(missing) > 1 else ""
            raise InputError(
                f"question {missing[0]!r} has no {what}{others}",
                hint="predict all questions of the file",
            )
    odds = dict.fromkeys(questions, 0.0) if no_answer_odds is None else no_answer_odds
    rows = []
    for qas_id, example in questions.items():
        text = predictions[qas_id]
        answers = [answer for answer in example.gold_answers if normalize_answer(answer)] or [""]
        rows.append(
            (
                bool(example.gold_answers),
                bool(text),
                max(exact_match_score(text, answer) for answer in answers),
                max(_f1_with_silence(text, answer) for answer in answers),
                float(odds[qas_id]),
            )
        )
    has_answer, is_answered, exact, f1, odds_of_rows = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    row_of = {qas_id: row for row, qas_id in enumerate(questions)}
    by_odds = sorted((qas_id for qas_id in odds if qas_id in row_of), key=lambda i: odds[i])
    order = np.array([row_of[qas_id] for qas_id in by_odds])
    return QuestionScores(has_answer, is_answered, exact, f1, odds_of_rows, order)


def evaluate_v2(
    scores: QuestionScores, *, threshold: float | None = None, best_thresholds: bool = False
) -> dict[str, float]:
    """Return averages of scores, under the names of the official script.

    Args:
        scores: scores of all questions.
        threshold: leave questions with larger odds unanswered; None leaves the answers unchanged.
        best_thresholds: also find the best thresholds.

    Returns:
        `exact`, `f1` (percent) and `total`; the same with `HasAns_` and `NoAns_` for questions
        with and without answers, where there are any; and with `best_thresholds` `best_exact`,
        `best_exact_thresh`, `best_f1`, `best_f1_thresh`.
    """
    final = scores if threshold is None else scores.at_threshold(threshold)
    results: dict[str, float] = {}
    groups = {
        "": np.ones(len(final.exact), np.bool_),
        "HasAns_": final.has_answer,
        "NoAns_": ~final.has_answer,
    }
    for prefix, group in groups.items():
        total = int(group.sum())
        if total:
            results[f"{prefix}exact"] = 100.0 * _sum(final.exact[group]) / total
            results[f"{prefix}f1"] = 100.0 * _sum(final.f1[group]) / total
            results[f"{prefix}total"] = total
    if best_thresholds:
        for name, values in (("exact", scores.exact), ("f1", scores.f1)):
            best, where = find_best_threshold(scores, values)
            results[f"best_{name}"] = best
            results[f"best_{name}_thresh"] = where
    return results


def find_best_threshold(
    scores: QuestionScores, values: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """Find the best threshold on the odds as the official script does (`find_best_thresh`).

    Questions with larger odds are left unanswered. As in the official script:

    - A threshold may lie between any two questions in the order of `scores.by_odds`, even if their
      odds are equal.
    - The threshold 0 stands for leaving all questions unanswered.
    - A question whose prediction is "" stays unanswered.

    Args:
        scores: scores of all questions.
        values: the scores to improve, `scores.exact` or `scores.f1`.

    Returns:
        The best average in percent, and its threshold.
    """
    order = scores.by_odds
    change = np.where(scores.has_answer, values, np.where(scores.is_answered, -1.0, 0.0))[order]
    unanswered = float((~scores.has_answer).sum())
    # Added one by one, as in the official script, because rounding may decide which is best.
    running = np.cumsum(np.concatenate([[unanswered], change]))
    best = int(np.argmax(running))
    where = 0.0 if best == 0 else float(scores.no_answer_odds[order[best - 1]])
    return 100.0 * float(running[best]) / len(values), where


def tune_threshold(scores: QuestionScores, values: npt.NDArray[np.float64]) -> float:
    """Find the threshold that gives the best average when it is applied.

    Unlike `find_best_threshold` it tries only thresholds that can be applied: questions of equal
    odds stay together, and a threshold below all odds leaves all questions unanswered.

    Args:
        scores: scores of all questions, with an answer for each, however unlikely.
        values: the scores to improve, `scores.exact` or `scores.f1`.

    Returns:
        The smallest of the best thresholds, for `null_score_diff_threshold`.
    """
    order = scores.by_odds
    odds = scores.no_answer_odds[order]
    change = (values - (~scores.has_answer))[order]
    gains = np.concatenate([[0.0], np.cumsum(change)[np.append(odds[1:] != odds[:-1], True)]])
    # For very large odds x, x - 1 is x.
    below = min(odds[0] - 1.0, np.nextafter(odds[0], -np.inf))
    thresholds = np.concatenate([[below], np.unique(odds)])
    return float(thresholds[np.argmax(gains)])


@dataclass(frozen=True)
class PrecisionRecall:
    """A precision-recall curve over thresholds.

    Attributes:
        precisions: precision at each threshold; the first is 1.0.
        recalls: recall at each threshold, rising from 0.0.
        average_precision: area under the curve in percent.
    """

    precisions: Sequence[float] = field(repr=False)
    recalls: Sequence[float] = field(repr=False)
    average_precision: float


def precision_recall(
    scores: QuestionScores, values: npt.NDArray[np.float64]
) -> PrecisionRecall | None:
    """Return precision and recall for rising thresholds on the odds.

    Args:
        scores: scores of all questions.
        values: how right each answer is: `scores.exact`, `scores.f1`, or `scores.has_answer` as
            float for the official script's oracle.

    Returns:
        The curve; None if no question has an answer.
    """
    answerable = int(scores.has_answer.sum())
    if not answerable:
        return None
    order = scores.by_odds
    odds = scores.no_answer_odds[order]
    right = np.cumsum(np.where(scores.has_answer, values, 0.0)[order])
    precision = right / np.arange(1, len(order) + 1)
    recall = right / answerable
    # A point of the curve is a threshold, so questions with equal odds make one point.
    last = np.append(odds[1:] != odds[:-1], True)
    precisions = np.concatenate([[1.0], precision[last]])
    recalls = np.concatenate([[0.0], recall[last]])
    average = 100.0 * _sum(precisions[1:] * np.diff(recalls))
    return PrecisionRecall(precisions.tolist(), recalls.tolist(), average)


def _sum(values: npt.NDArray[np.float64]) -> float:
    """Add one by one, as the official script does; NumPy's `sum` rounds differently."""
    return float(np.cumsum(values)[-1])


def _f1_with_silence(prediction: str, answer: str) -> float:
    """Return the F1 of version 2.0, by which two empty texts agree."""
    if not normalize_answer(prediction) or not normalize_answer(answer):
        return exact_match_score(prediction, answer)
    return f1_score(prediction, answer)
