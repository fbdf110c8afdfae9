"""SQuAD: reading the official JSON files.

It gives the examples of `read_squad_examples` in the original's `run_squad.py`.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from finetune.errors import InputError
from finetune.storage.json_files import get_value, load_json

_HINT = "give a SQuAD JSON file"
_get = functools.partial(get_value, hint=_HINT)
_logger = logging.getLogger(__name__)

# Only these characters separate the words of a paragraph; `str.split` knows more. Other white space
# stays inside of a word, and so in the text of an answer.
_WORD = re.compile("[^ \\t\\r\\n\\u202f]+")


@dataclass(frozen=True)
class SquadParagraph:
    """A paragraph and its words; all questions about it share it.

    Attributes:
        context: text of the paragraph, as in the file.
        doc_tokens: its words, which white space separates.
        word_starts: offset in `context` of each word's first character, ascending.
    """

    context: str = field(repr=False)
    doc_tokens: tuple[str, ...] = field(repr=False)
    word_starts: tuple[int, ...] = field(repr=False)

    @classmethod
    def from_context(cls, context: str) -> SquadParagraph:
        """Split a text into words."""
        spans = [match.span() for match in _WORD.finditer(context)]
        words = tuple([context[start:end] for start, end in spans])
        return cls(context, words, tuple([start for start, _ in spans]))

    def word_at(self, offset: int) -> int:
        """Return the index of the word at an offset; in white space, of the word before, or -1."""
        return bisect_right(self.word_starts, offset) - 1


@dataclass(frozen=True)
class SquadExample:
    """A question.

    Attributes:
        qas_id: id of the question; several questions of a file may have the same id.
        question: text of the question.
        paragraph: the paragraph with the answer.
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


# Why an answer is left out; the words follow "an answer" in a message.
EMPTY = "that is empty"
OUTSIDE = "whose offset is outside of the paragraph"
ELSEWHERE = "that is not at its offset"
BEFORE_WORDS = "that begins in the white space before the first word"
WHITE_SPACE = "with white space that to the original is a part of a word, such as U+00A0"

# Values that are not as they should be, but that the original reads too.
_NUMBER_ID = "ids that are numbers"
_SAME_ID = "ids that occur before, of which the last question's answer counts"
_NO_ANSWERS = "questions whose answers are null or missing"
_ODD_FLAG = "questions whose 'is_impossible' is null or a number"


@dataclass(frozen=True)
class SkippedAnswer:
    """A training question left out because its answer cannot be found, as in the original.

    Attributes:
        qas_id: id of the question.
        answer_text: text of the answer, as in the file.
        found_text: the words at the answer's offset; "" if the offset is outside the paragraph.
        reason: why it is left out, such as `ELSEWHERE`.
    """

    qas_id: str
    answer_text: str
    found_text: str
    reason: str


@dataclass(frozen=True)
class SquadExamples:
    """The questions of a file, in its order, and the skipped ones.

    Attributes:
        items: the questions; several may have the same id.
        skipped: training questions that are left out.
    """

    items: tuple[SquadExample, ...] = field(repr=False)
    skipped: tuple[SkippedAnswer, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[SquadExample]:
        return iter(self.items)

    def __getitem__(self, index: int) -> SquadExample:
        return self.items[index]


def describe_skipped(reasons: Mapping[str, int]) -> str:
    """Return one line that says how many questions were left out, by reason."""
    parts = (f"{count:,} with an answer {reason}" for reason, count in reasons.items())
    return f"left out {sum(reasons.values()):,} questions: {'; '.join(parts)}"


def read_squad(
    path: str | os.PathLike[str], *, is_training: bool, version_2_with_negative: bool
) -> SquadExamples:
    """Read a file in SQuAD's format.

    Every file that the original reads is read. One warning counts the values that are not as they
    should be: ids that are numbers or occur twice, answers of null, and an `is_impossible` that is
    null or a number. Ids become texts, as in the files of predictions.

    Example:
        >>> examples = read_squad("dev-v1.1.json", is_training=False, version_2_with_negative=False)
        >>> len(examples)
        10570

    Args:
        path: a JSON file of SQuAD 1.1 or 2.0.
        is_training: read the answers too. A question whose answer is not at its offset is left out
            with a warning.
        version_2_with_negative: questions may be impossible (SQuAD 2.0).

    Raises:
        InputError: the file is not in this format, or, for training, a question that is not
            impossible does not have exactly one answer.
    """
    root = load_json(path, hint=_HINT, finite=False, large_integers="keep")
    examples: list[SquadExample] = []
    skipped: list[SkippedAnswer] = []
    seen: set[str] = set()
    odd: Counter[str] = Counter()
    for where, qa, paragraph in _iter_questions(root, path):
        example = _read_question(
            qa, paragraph, where, path, is_training, version_2_with_negative, odd
        )
        odd[_SAME_ID] += example.qas_id in seen
        seen.add(example.qas_id)
        if isinstance(example, SkippedAnswer):
            skipped.append(example)
        else:
            examples.append(example)
    if odd.total():
        parts = (f"{what} ({count:,})" for what, count in odd.items() if count)
        _logger.warning("%s: read as the original does: %s", os.fspath(path), "; ".join(parts))
    if skipped:
        first = skipped[0]
        _logger.warning(
            "%s: %s; the first is %r: %.60r against %.60r",
            os.fspath(path),
            describe_skipped(Counter(skip.reason for skip in skipped)),
            first.qas_id,
            first.answer_text,
            first.found_text,
        )
    return SquadExamples(tuple(examples), tuple(skipped))


def _iter_questions(
    root: object, path: str | os.PathLike[str]
) -> Iterator[tuple[str, object, SquadParagraph]]:
    """Yield position, unchecked question and paragraph of each question."""
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
    paragraph: SquadParagraph,
    where: str,
    path: str | os.PathLike[str],
    is_training: bool,
    version_2_with_negative: bool,
    odd: Counter[str],
) -> SquadExample | SkippedAnswer:
    """Read a question; count in `odd` the values that are not as they should be."""
    question = _get(qa, "question", str, where, path)
    assert isinstance(qa, dict)  # It has a question.
    qas_id = _read_id(qa, where, path, odd)
    is_impossible = version_2_with_negative and _read_flag(qa, where, path, is_training, odd)
    # A file to predict on may have no answers.
    if qa.get("answers") is None and ("answers" in qa or not is_training):
        odd[_NO_ANSWERS] += 1
        answers: list[object] = []
    else:
        answers = _get(qa, "answers", list, where, path)
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
    found, answer_words = _find_answer(paragraph, gold[0], offset)
    if isinstance(answer_words, str):
        return SkippedAnswer(qas_id, gold[0], found, answer_words)
    return SquadExample(qas_id, question, paragraph, gold[0], answer_words, False, gold)


def _read_id(
    qa: dict[str, object], where: str, path: str | os.PathLike[str], odd: Counter[str]
) -> str:
    qas_id = qa.get("id")
    if isinstance(qas_id, (int, float)) and not isinstance(qas_id, bool):
        odd[_NUMBER_ID] += 1
        return str(qas_id)
    return _get(qa, "id", str, where, path)


def _read_flag(
    qa: dict[str, object],
    where: str,
    path: str | os.PathLike[str],
    is_training: bool,
    odd: Counter[str],
) -> bool:
    """Return whether a question is impossible; a file to predict on need not say it."""
    flag = qa.get("is_impossible", None if is_training else False)
    if isinstance(flag, bool):
        return flag
    if "is_impossible" in qa and (flag is None or isinstance(flag, (int, float))):
        odd[_ODD_FLAG] += 1
        return bool(flag)
    return _get(qa, "is_impossible", bool, where, path)


def _find_answer(
    paragraph: SquadParagraph, text: str, offset: int
) -> tuple[str, tuple[int, int] | str]:
    """Find the words of an answer as the original does.

    The original uses offsets as Python's indices, so an offset below 0 counts from the paragraph's
    end. Unlike there, an empty answer is left out: the original would train on a span that ends
    before it begins.

    Returns:
        The words at the offset; and the indices of the first and last of them, or the reason why
        the answer is left out.
    """
    size, words = len(paragraph.context), paragraph.doc_tokens
    cleaned = " ".join(text.split())
    last_offset = offset + len(text) - 1
    if not cleaned:
        return "", EMPTY
    if not (-size <= offset < size and -size <= last_offset < size):
        return "", OUTSIDE
    first, last = paragraph.word_at(offset % size), paragraph.word_at(last_offset % size)
    found = " ".join(words[first : last + 1])
    if cleaned in found:
        # The original's first word is -1 if white space comes before the paragraph's only word.
        return found, (first % len(words), last)
    if " ".join(paragraph.context[offset : last_offset + 1].split()) != cleaned:
        return found, ELSEWHERE
    return found, BEFORE_WORDS if first < 0 else WHITE_SPACE
