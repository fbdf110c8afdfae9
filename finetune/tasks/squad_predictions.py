"""SQuAD: from start and end logits to answer texts, n-best lists and null odds.

It gives the results of `write_predictions` and `get_final_text` in the original's `run_squad.py`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from finetune.errors import InputError
from finetune.storage.files import write_atomically
from finetune.storage.json_files import json_text
from finetune.tasks.squad_examples import SquadExample, SquadExamples
from finetune.tasks.squad_features import SquadFeatures
from finetune.text.tokenization import Normalization, basic_tokenize


class NbestEntry(TypedDict):
    """One candidate of a question; "" as text means that there is no answer."""

    text: str
    probability: float
    start_logit: float
    end_logit: float


@dataclass(frozen=True)
class SquadPredictions:
    """Answers by question id, in the order of the examples.

    Attributes:
        predictions: text of the answer; "" for no answer.
        nbest: candidates, best first.
        null_odds: score of having no answer, minus the score of the best answer. It is empty unless
            the answers were chosen with `version_2_with_negative`.
    """

    predictions: dict[str, str] = field(repr=False)
    nbest: dict[str, list[NbestEntry]] = field(repr=False)
    null_odds: dict[str, float] = field(repr=False)


@dataclass(frozen=True)
class _Candidate:
    text: str
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are chosen; the defaults are the original's.

    Attributes:
        n_best_size: candidates kept of each question, and positions considered of each feature.
        max_answer_length: longest answer, in tokens.
        version_2_with_negative: a question may have no answer. The score of having none is then
            that of [CLS], the least over the question's features.
        null_score_diff_threshold: null odds above this give the answer "".
    """

    n_best_size: int = 20
    max_answer_length: int = 30
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings with which no answer can be chosen."""
        if self.n_best_size < 1 or self.max_answer_length < 1:
            raise InputError(
                f"n_best_size {self.n_best_size} or max_answer_length {self.max_answer_length} "
                "is below 1",
                hint="the original's are 20 and 30",
            )


ORIGINAL_ANSWERS = AnswerSettings()
"""The settings of the original's `run_squad.py` for SQuAD 1.1."""


@dataclass(frozen=True)
class _Logits:
    """The logits of n features of s positions, and the k best positions of each feature."""

    start: npt.NDArray[np.float64]  # [n, s]
    end: npt.NDArray[np.float64]  # [n, s]
    top_starts: npt.NDArray[np.intp]  # [n, k], best first
    top_ends: npt.NDArray[np.intp]  # [n, k], best first


@dataclass(frozen=True)
class _Spans:
    """The candidate spans of one question, best first; all arrays are [m]."""

    rows: npt.NDArray[np.intp]
    starts: npt.NDArray[np.intp]
    ends: npt.NDArray[np.intp]
    start_logits: npt.NDArray[np.float64]
    end_logits: npt.NDArray[np.float64]


def predict_answers(
    examples: SquadExamples,
    features: SquadFeatures,
    start_logits: npt.ArrayLike,
    end_logits: npt.ArrayLike,
    normalization: Normalization,
    settings: AnswerSettings = ORIGINAL_ANSWERS,
) -> SquadPredictions:
    """Choose the best answers to each question over all windows of its paragraph.

    Example:
        >>> start_logits, end_logits = predict(batch)
        >>> answers = predict_answers(
        ...     examples, features, start_logits, end_logits, tokenizer.normalization
        ... )
        >>> answers.predictions["56be4db0acb8001400a502ec"]
        'Denver Broncos'

    Args:
        examples: the questions.
        features: of these questions.
        start_logits: [n, s], of each position of each feature as the answer's first token.
        end_logits: [n, s], as its last token.
        normalization: that of the tokenizer that made the features.
        settings: how answers are chosen.

    Returns:
        The answers. A question without any allowed span gets "empty" as in the original, or with
        `version_2_with_negative` (where the original stops) the answer "", and as odds the score
        of having none.

    Raises:
        FloatingPointError: a logit is not finite.
        ValueError: the logits do not have the shape of the features.
    """
    logits = _read_logits(features, start_logits, end_logits, settings.n_best_size)
    # Features of a question are neighbours: question i has rows bounds[i] to bounds[i + 1].
    bounds = np.searchsorted(features.example_index, np.arange(len(examples) + 1))
    result = SquadPredictions({}, {}, {})
    for example, first, last in zip(examples, bounds[:-1], bounds[1:], strict=True):
        null = None
        if settings.version_2_with_negative:
            null = _null_candidate(logits.start[first:last, 0], logits.end[first:last, 0])
        spans = _ranked_spans(features, np.arange(first, last), logits, settings.max_answer_length)
        candidates = _texts(example, features, spans, normalization)
        nbest = _best_candidates(candidates, null, settings.n_best_size)
        result.nbest[example.qas_id] = _nbest_entries(nbest)
        text = nbest[0].text
        if null is not None:
            best = next((candidate for candidate in nbest if candidate.text), None)
            odds = null.score if best is None else null.score - best.start_logit - best.end_logit
            result.null_odds[example.qas_id] = odds
            above = odds > settings.null_score_diff_threshold
            text = "" if best is None or above else best.text
        result.predictions[example.qas_id] = text
    return result


def answers_at_threshold(predictions: SquadPredictions, threshold: float) -> dict[str, str]:
    """Choose again between the best answer and no answer, with another threshold.

    Args:
        predictions: made with `version_2_with_negative`.
        threshold: null odds above this give the answer ""; with infinity no answer is "".

    Returns:
        Texts by question id, in the same order.
    """
    answers = {}
    for qas_id, candidates in predictions.nbest.items():
        best = next((candidate["text"] for candidate in candidates if candidate["text"]), "")
        answers[qas_id] = "" if predictions.null_odds[qas_id] > threshold else best
    return answers


def write_predictions(predictions: SquadPredictions, output_dir: str | os.PathLike[str]) -> None:
    """Write `predictions.json`, `nbest_predictions.json` and, if there are any, `null_odds.json`.

    Each file appears complete or not at all, and replaces an existing one.

    Raises:
        OSError: the folder cannot be created or written to, or the disk is full.
    """
    folder = Path(output_dir)
    files: dict[str, Mapping[str, object]] = {
        "predictions.json": predictions.predictions,
        "nbest_predictions.json": predictions.nbest,
    }
    if predictions.null_odds:
        files["null_odds.json"] = predictions.null_odds
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, json_text(content, indent=4) + "\n")


def recover_text(tok_text: str, orig_text: str, *, normalization: Normalization) -> str:
    """Find the part of a paragraph's words that some tokens stand for (`get_final_text`).

    Tokens have no capitals, accents and white space, and the paragraph's words ("Smith's") may hold
    more than the answer ("smith"). Both texts are aligned by their characters other than spaces. If
    that fails, all of the words are returned.

    Example:
        >>> recover_text("steve smith", "Steve Smith's", normalization=UNCASED)
        'Steve Smith'

    Args:
        tok_text: tokens of an answer, joined to words.
        orig_text: the words of the paragraph with these tokens.
        normalization: that of the tokenizer.

    Returns:
        A part of `orig_text`.
    """
    words = " ".join(basic_tokenize(orig_text, normalization))
    start = words.find(tok_text)
    if start < 0 or not tok_text:
        return orig_text
    end = start + len(tok_text) - 1
    orig_positions = [i for i, char in enumerate(orig_text) if char != " "]
    if len(orig_positions) != len(words) - words.count(" "):
        return orig_text
    first = start - words.count(" ", 0, start)
    last = end - words.count(" ", 0, end)
    return orig_text[orig_positions[first] : orig_positions[last] + 1]


def _read_logits(
    features: SquadFeatures,
    start_logits: npt.ArrayLike,
    end_logits: npt.ArrayLike,
    n_best_size: int,
) -> _Logits:
    start = np.asarray(start_logits, np.float64)
    end = np.asarray(end_logits, np.float64)
    shape = features.input_ids.shape
    if start.shape != shape or end.shape != shape:
        raise ValueError(f"logits are {start.shape} and {end.shape}, but features are {shape}")
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        raise FloatingPointError("the model gives logits that are not finite")
    return _Logits(
        start, end, _best_positions(start, n_best_size), _best_positions(end, n_best_size)
    )


def _best_positions(logits: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """Return the positions of the greatest logits of each row, greatest first, [n, count].

    Of equal logits the earlier position comes first. Padding competes too, as in the original.
    """
    return np.argsort(-logits, axis=1, kind="stable")[:, :count]


def _ranked_spans(
    features: SquadFeatures,
    rows: npt.NDArray[np.intp],
    logits: _Logits,
    max_answer_length: int,
) -> _Spans:
    """Return the allowed spans of one question's features, best first.

    A span lies within one window, starts where its first token has the most context, and is not too
    long. Equal scores keep the order of feature, rank of start, rank of end.
    """
    starts = logits.top_starts[rows][:, :, None]  # [r, k, 1]
    ends = logits.top_ends[rows][:, None, :]  # [r, 1, k]
    at = rows[:, None, None]
    allowed = (
        (features.token_to_orig[at, starts] >= 0)
        & features.token_is_max_context[at, starts]
        & (features.token_to_orig[at, ends] >= 0)
        & (starts <= ends)
        & (ends - starts < max_answer_length)
    )  # [r, k, k]
    which, start_rank, end_rank = np.nonzero(allowed)
    row = rows[which]
    start = logits.top_starts[row, start_rank]
    end = logits.top_ends[row, end_rank]
    start_logits, end_logits = logits.start[row, start], logits.end[row, end]
    order = np.argsort(-(start_logits + end_logits), kind="stable")
    return _Spans(row[order], start[order], end[order], start_logits[order], end_logits[order])


def _texts(
    example: SquadExample, features: SquadFeatures, spans: _Spans, normalization: Normalization
) -> Iterator[_Candidate]:
    """Yield spans as candidates with text, best first; of equal texts only the first."""
    seen = set()
    for row, start, end, start_logit, end_logit in zip(
        spans.rows.tolist(),
        spans.starts.tolist(),
        spans.ends.tolist(),
        spans.start_logits.tolist(),
        spans.end_logits.tolist(),
        strict=True,
    ):
        ids = features.input_ids[row, start : end + 1].tolist()
        pieces = " ".join([features.vocab_tokens[i] for i in ids])
        tok_text = " ".join(pieces.replace(" ##", "").replace("##", "").split())
        first_word = features.token_to_orig[row, start]
        last_word = features.token_to_orig[row, end]
        orig_text = " ".join(example.doc_tokens[first_word : last_word + 1])
        text = recover_text(tok_text, orig_text, normalization=normalization)
        if text in seen:
            continue
        seen.add(text)
        yield _Candidate(text, start_logit, end_logit)


def _best_candidates(
    candidates: Iterator[_Candidate], null: _Candidate | None, count: int
) -> list[_Candidate]:
    """Return the best candidates, at least one; the null candidate, if any, is among them."""
    nbest = list(itertools.islice(_with_null(candidates, null), count))
    if null is not None and all(candidate.text for candidate in nbest):
        nbest.append(null)
    return nbest or [_Candidate("empty", 0.0, 0.0)]


def _nbest_entries(nbest: list[_Candidate]) -> list[NbestEntry]:
    probabilities = _softmax([candidate.score for candidate in nbest])
    return [
        NbestEntry(
            text=candidate.text,
            probability=probability,
            start_logit=candidate.start_logit,
            end_logit=candidate.end_logit,
        )
        for candidate, probability in zip(nbest, probabilities, strict=True)
    ]


def _with_null(candidates: Iterator[_Candidate], null: _Candidate | None) -> Iterator[_Candidate]:
    """Yield candidates, with the null candidate after all that are at least as good."""
    for candidate in candidates:
        if null is not None and null.score > candidate.score:
            yield null
            null = None
        yield candidate
    if null is not None:
        yield null


def _null_candidate(start: npt.NDArray[np.float64], end: npt.NDArray[np.float64]) -> _Candidate:
    """Return "no answer" with the logits of the feature where it scores least; both [r]."""
    if len(start) == 0:
        return _Candidate("", 0.0, 0.0)
    least = int(np.argmin(start + end))
    return _Candidate("", float(start[least]), float(end[least]))


def _softmax(scores: list[float]) -> list[float]:
    greatest = max(scores)
    exps = [math.exp(score - greatest) for score in scores]
    # From Python 3.12 on, `sum` rounds differently; adding one by one gives the original's bits.
    total = 0.0
    for value in exps:
        total += value
    return [value / total for value in exps]
