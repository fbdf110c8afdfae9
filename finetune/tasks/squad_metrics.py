"""SQuAD's official metrics of version 1.1: exact match and F1.

Gives the numbers of `evaluate-v1.1.py` (Rajpurkar et al. 2016, section 6.1).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping

from finetune.errors import InputError
from finetune.tasks.squad_examples import SquadExample

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lowers letters, drops ASCII punctuation and English articles, and joins words by a space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match_score(prediction: str, answer: str) -> float:
    """Returns 1.0 if both texts are equal after normalization, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1_score(prediction: str, answer: str) -> float:
    """Returns the harmonic mean of precision and recall over bags of normalized words, 0 to 1."""
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
    """Scores predictions against the best matching of each question's answers.

    Args:
        examples: questions with `gold_answers`; one without a prediction counts as wrong.
        predictions: question id to text.

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
