"""SQuAD: reading the official JSON files.

Reproduces `read_squad_examples` of `run_squad.py` in google-research/bert.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from finetune.errors import InputError
from finetune.json_files import get_value, load_json

_HINT = "give a SQuAD JSON file"
_get = functools.partial(get_value, hint=_HINT)
_logger = logging.getLogger(__name__)

# What separates words in a paragraph: fewer characters than `str.split` knows. Other white space
# stays inside a word, and with it in the text of an answer.
_WORD = re.compile("[^ \\t\\r\\n\\u202f]+")


@dataclass(frozen=True)
class SquadParagraph:
    """A paragraph and its words; all its questions share it.

    Attributes:
        context: the text as in the file.
        doc_tokens: its words, split at white space.
        word_starts: offset in `context` of each word's first character, ascending.
    """

    context: str = field(repr=False)
    doc_tokens: tuple[str, ...] = field(repr=False)
    word_starts: tuple[int, ...] = field(repr=False)

    @classmethod
    def from_context(cls, context: str) -> SquadParagraph:
        """Splits a text into words."""
        spans = [match.span() for match in _WORD.finditer(context)]
        words = tuple([context[start:end] for start, end in spans])
        return cls(context, words, tuple([start for start, _ in spans]))

    def word_at(self, offset: int) -> int:
        """Returns the word that holds a character; for white space, the word before it, or -1."""
        return bisect_right(self.word_starts, offset) - 1


@dataclass(frozen=True)
class SquadExample:
    """A question.

    Attributes:
        qas_id: its id, unique in the file.
        question: its text.
        paragraph: where the answer is to be found.
        answer_text: the training answer; "" if impossible or not read for training.
        answer_words: first and last word of the training answer in `paragraph.doc_tokens`; None if
            impossible or not read for training.
        is_impossible: the question has no answer (SQuAD 2.0).
        gold_answers: the texts of all answers in the file, for evaluation.
    """

    qas_id: str
    question: str
    paragraph: SquadParagraph = field(repr=False)
    answer_text: str = ""
    answer_words: tuple[int, int] | None = None
    is_impossible: bool = False
    gold_answers: tuple[str, ...] = ()

    @property
    def context(self) -> str:
        """The paragraph's text."""
        return self.paragraph.context

    @property
    def doc_tokens(self) -> tuple[str, ...]:
        """The paragraph's words."""
        return self.paragraph.doc_tokens


@dataclass(frozen=True)
class SkippedAnswer:
    """A training question left out because its answer is not where the file says.

    Attributes:
        qas_id: the question.
        answer_text: the answer as in the file.
        found_text: the words at the answer's offset; "" if the offset is outside the paragraph.
    """

    qas_id: str
    answer_text: str
    found_text: str


@dataclass(frozen=True)
class SquadExamples:
    """The questions of a file, in its order, and those left out.

    Attributes:
        items: the questions.
        skipped: training questions left out.
    """

    items: tuple[SquadExample, ...] = field(repr=False)
    skipped: tuple[SkippedAnswer, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[SquadExample]:
        return iter(self.items)

    def __getitem__(self, index: int) -> SquadExample:
        return self.items[index]


def read_squad(
    path: str | os.PathLike[str], *, is_training: bool, version_2_with_negative: bool
) -> SquadExamples:
    """Reads a file in SQuAD's format.

    Args:
        path: a JSON file of SQuAD 1.1 or 2.0.
        is_training: answers are needed; a question whose answer is not found at its offset is left
            out, with a warning.
        version_2_with_negative: questions may be impossible (SQuAD 2.0).

    Raises:
        InputError: not a file in this format, an id occurs twice, or, for training, a possible
            question does not have exactly one answer.
    """
    root = load_json(path, hint=_HINT)
    examples: list[SquadExample] = []
    skipped: list[SkippedAnswer] = []
    seen: dict[str, str] = {}
    for where, qa, paragraph in _iter_questions(root, path):
        qas_id = _get(qa, "id", str, where, path)
        if qas_id in seen:
            raise InputError(
                f"{where} has the id {qas_id!r}, which {seen[qas_id]} has already",
                path=path,
                hint="give every question an id of its own",
            )
        seen[qas_id] = where
        example = _read_question(
            qa, qas_id, paragraph, where, path, is_training, version_2_with_negative
        )
        if isinstance(example, SkippedAnswer):
            skipped.append(example)
        else:
            examples.append(example)
    if skipped:
        _logger.warning(
            "%s: left out %d questions whose answer is not where the file says; the first is %s",
            os.fspath(path),
            len(skipped),
            skipped[0],
        )
    return SquadExamples(tuple(examples), tuple(skipped))


def _iter_questions(
    root: object, path: str | os.PathLike[str]
) -> Iterator[tuple[str, object, SquadParagraph]]:
    """Yields place, raw question and paragraph."""
    for i, entry in enumerate(_get(root, "data", list, "the top level", path)):
        in_entry = f"data[{i}]"
        for j, raw in enumerate(_get(entry, "paragraphs", list, in_entry, path)):
            in_paragraph = f"{in_entry}.paragraphs[{j}]"
            context = _get(raw, "context", str, in_paragraph, path)
            paragraph = SquadParagraph.from_context(context)
            for k, qa in enumerate(_get(raw, "qas", list, in_paragraph, path)):
                yield f"{in_paragraph}.qas[{k}]", qa, paragraph


def _read_question(
    qa: object,
    qas_id: str,
    paragraph: SquadParagraph,
    where: str,
    path: str | os.PathLike[str],
    is_training: bool,
    version_2_with_negative: bool,
) -> SquadExample | SkippedAnswer:
    question = _get(qa, "question", str, where, path)
    needs_flag = version_2_with_negative and is_training
    is_impossible = version_2_with_negative and _get(
        qa, "is_impossible", bool, where, path, default=None if needs_flag else False
    )
    # An unlabelled file to predict on may leave out the answers.
    answers = _get(qa, "answers", list, where, path, default=None if is_training else [])
    gold = tuple(
        _get(answer, "text", str, f"{where}.answers[{i}]", path) for i, answer in enumerate(answers)
    )
    if not is_training or is_impossible:
        return SquadExample(qas_id, question, paragraph, "", None, is_impossible, gold)
    if len(gold) != 1:
        raise InputError(
            f"{where} (id {qas_id!r}) has {len(gold)} answers, but training needs exactly 1",
            path=path,
            hint="for SQuAD 2.0 files set version_2_with_negative"
            if not version_2_with_negative
            else "correct the file",
        )
    offset = _get(answers[0], "answer_start", int, f"{where}.answers[0]", path)
    last_offset = offset + len(gold[0]) - 1
    first = last = -1
    if 0 <= offset <= last_offset < len(paragraph.context):
        first, last = paragraph.word_at(offset), paragraph.word_at(last_offset)
    found = " ".join(paragraph.doc_tokens[first : last + 1]) if first >= 0 else ""
    if first < 0 or " ".join(gold[0].split()) not in found:
        return SkippedAnswer(qas_id, gold[0], found)
    return SquadExample(qas_id, question, paragraph, gold[0], (first, last), False, gold)
