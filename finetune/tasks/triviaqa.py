"""TriviaQA: its question-document pairs as SQuAD's JSON, with the offsets of answers.

According to BERT's README, an epoch on TriviaQA in SQuAD's format, before SQuAD itself, gives
better results. The conversion follows `utils/convert_to_squad_format.py` of mandarjoshi90/triviaqa:

- Each pair becomes a paragraph with the id `QuestionId--Filename`.
- The context is the beginning of the document.
- The answer is the first alias that is found.
- The pairs are in the order of the same shuffle.
- At most 80,000 questions of the web training split are taken.
- Of a verified set only verified questions and documents are taken.

It differs from the original in this:

- The context is the document's text, cut after `max_words` words between white space. The
  original joins NLTK's tokens, of which 800 are some 700 words.
- An answer consists of whole words, spelled as in the context. The original looks for the
  normalized alias as a part of the lower-cased context, and gives the alias. So it finds `us` in
  `because`, and BERT skips nearly every answer with a capital letter.
- A training question without an answer is left out. The original writes it without answers.
- A document that cannot be read is counted and skipped. The original stops at it.
"""

from __future__ import annotations

import functools
import os
import random
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from finetune.errors import InputError
from finetune.storage.json_files import get_value, json_text, load_json

MAX_WORDS = 800
SEED = 10
WEB_TRAIN_QUESTIONS = 80_000

Source = Literal["wikipedia", "web"]
OUTCOMES = {
    "answered": "questions with an answer",
    "impossible": "questions marked as impossible",
    "unanswered": "questions without an answer",
    "no_answer": "left out: the answer is not in the context",
    "missing": "left out: the document is not there",
    "unreadable": "left out: the document cannot be read",
    "empty": "left out: the document is empty",
    "duplicate": "left out: the id occurs before",
}
"""What becomes of a pair, in words; pairs with the first three outcomes are written."""

_WRITTEN = ("answered", "impossible", "unanswered")
_SOURCES: dict[str, Source] = {"EntityPages": "wikipedia", "SearchResults": "web"}
_HINT = "give a JSON file of TriviaQA's qa folder"
_get = functools.partial(get_value, hint=_HINT)
_DOCUMENT_MARK = "DocPartOfVerifiedEval"


@dataclass(frozen=True)
class TriviaQuestion:
    """A question.

    Attributes:
        question_id: its id in TriviaQA.
        text: text of the question.
        aliases: spellings of the answer, in the file's order; None in a test split.
    """

    question_id: str
    text: str
    aliases: tuple[str, ...] | None = field(repr=False)


@dataclass(frozen=True)
class TriviaPair:
    """A question and a document that may hold its answer.

    Attributes:
        question: the question; all of its pairs share it.
        source: name of the evidence folder with the document.
        filename: path of the document in that folder; "" if the question file has none.
        title: title of the document, or else its file name.
    """

    question: TriviaQuestion
    source: Source
    filename: str
    title: str


@dataclass(frozen=True)
class TriviaQA:
    """A question file.

    Attributes:
        pairs: the pairs in the file's order; Wikipedia pages of a question before its web pages.
        split: `train`, `dev` or `test`.
        domain: `Wikipedia` or `Web`.
        version: version in the file.
    """

    pairs: tuple[TriviaPair, ...] = field(repr=False)
    split: str
    domain: str
    version: object

    @property
    def default_max_questions(self) -> int | None:
        """Number of questions that the original takes; None for all."""
        is_sampled = self.split == "train" and self.domain == "Web"
        return WEB_TRAIN_QUESTIONS if is_sampled else None


@dataclass(frozen=True)
class Conversion:
    """What became of a question file.

    Attributes:
        text: JSON in SQuAD's format.
        counts: number of pairs for each outcome.
        questions: number of questions in `text`.
        not_utf8: number of contexts in which bytes that are not UTF-8 were replaced.
        not_needed: number of pairs that were not read, because there were enough questions.
        first_lost: the first document that is missing or unreadable; "" if there is none.
    """

    text: str = field(repr=False)
    counts: dict[str, int]
    questions: int
    not_utf8: int
    not_needed: int
    first_lost: str


def read_triviaqa(path: str | os.PathLike[str], split: str | None = None) -> TriviaQA:
    """Read a question file of TriviaQA, as in `qa/wikipedia-train.json`.

    Args:
        path: the file.
        split: `train`, `dev` or `test`; None takes what the file says.

    Raises:
        InputError: it is not such a file, it has no pairs, a training question has no answer, or
            the name of a document leads out of its folder.
    """
    root = _present(load_json(path, hint=_HINT, finite=False, large_integers="keep"))
    data = _get(root, "Data", list, "the top level", path)
    domain = _get(root, "Domain", str, "the top level", path)
    if split is None:
        split = _get(root, "Split", str, "the top level", path, hint="say which with --split")
    is_verified = _get(root, "VerifiedEval", bool, "the top level", path, default=False)
    marks_documents = is_verified and domain == "Web"
    pairs: list[TriviaPair] = []
    for i, datum in enumerate(map(_present, data)):
        where = f"Data[{i}]"
        if is_verified and not _get(datum, "QuestionPartOfVerifiedEval", bool, where, path):
            continue
        question = TriviaQuestion(
            _get(datum, "QuestionId", str, where, path),
            _get(datum, "Question", str, where, path),
            _read_aliases(datum, where, path, is_needed=split == "train"),
        )
        for key, source in _SOURCES.items():
            pages = _get(datum, key, list, where, path, default=[])
            for j, page in enumerate(map(_present, pages)):
                in_page = f"{where}.{key}[{j}]"
                # In the Wikipedia domain the mark is on questions only.
                if marks_documents and not _get(page, _DOCUMENT_MARK, bool, in_page, path):
                    continue
                filename = _get(page, "Filename", str, in_page, path, default="")
                _refuse_escape(filename, in_page, path)
                title = _get(page, "Title", str, in_page, path, default=filename)
                pairs.append(TriviaPair(question, source, filename, title))
    if not pairs:
        raise InputError("no question has a document", path=path, hint=_HINT)
    return TriviaQA(tuple(pairs), split, domain, root.get("Version", 1.0))


def convert_pairs(
    data: TriviaQA,
    folders: dict[Source, Path],
    *,
    max_words: int = MAX_WORDS,
    version_2_with_negative: bool = False,
    seed: int = SEED,
    max_questions: int | None = None,
    on_pair: Callable[[int, int], None] = lambda looked_at, written: None,
) -> Conversion:
    """Convert a question file.

    Documents are read one at a time, each only as far as its context. The result is held in memory,
    about 5 KB for each question.

    Args:
        data: the question file.
        folders: evidence folder of each source. Without the folder of a source, its documents count
            as missing.
        max_words: most words of a context.
        version_2_with_negative: write questions whose answer is not in the context as impossible
            questions of SQuAD 2.0. Otherwise they are left out of a training split, and written
            without answers in other splits.
        seed: seed of the order of the pairs, and so of what `max_questions` takes.
        max_questions: stop after this number of questions; None takes all.
        on_pair: called after each pair with the numbers of pairs read and of questions written.

    Raises:
        InputError: all documents are missing, no question is left, or a document is outside of its
            folder.
    """
    pairs = list(data.pairs)
    random.Random(seed).shuffle(pairs)
    counts: Counter[str] = Counter()
    entries: dict[str, str] = {}
    not_utf8 = 0
    first_lost = ""
    for pair in pairs:
        if max_questions is not None and len(entries) >= max_questions:
            break
        qas_id = f"{pair.question.question_id}--{pair.filename}"
        outcome = "duplicate" if qas_id in entries else None
        if outcome is None:
            outcome, context, is_utf8 = _read_pair_context(pair, folders, max_words)
            not_utf8 += not is_utf8
        if outcome is None:
            outcome, qa = _answer(pair, context, data.split == "train", version_2_with_negative)
            if outcome in _WRITTEN:
                paragraph = {"context": context, "qas": [{"id": qas_id, **qa}]}
                entries[qas_id] = json_text({"title": pair.title, "paragraphs": [paragraph]})
        elif outcome in ("missing", "unreadable") and not first_lost:
            first_lost = str(folders.get(pair.source, Path()) / pair.filename)
        counts[outcome] += 1
        on_pair(counts.total(), len(entries))
    if counts["missing"] + counts["unreadable"] == counts.total():
        raise InputError(
            f"none of the {counts.total()} documents can be read",
            path=first_lost,
            hint="give the evidence folder that holds TriviaQA's wikipedia and web folders",
        )
    if not entries:
        reasons = ", ".join(f"{n} {OUTCOMES[outcome]}" for outcome, n in counts.items())
        raise InputError(f"no question remains ({reasons})", hint="raise --max_words")
    version = json_text(data.version)
    return Conversion(
        text=f'{{"version": {version}, "data": [\n' + ",\n".join(entries.values()) + "\n]}\n",
        counts={outcome: counts[outcome] for outcome in OUTCOMES},
        questions=len(entries),
        not_utf8=not_utf8,
        not_needed=len(pairs) - counts.total(),
        first_lost=first_lost,
    )


def read_context(path: str | os.PathLike[str], max_words: int) -> tuple[str, bool]:
    r"""Read the beginning of a document.

    Within a line, white space becomes a single space. Empty lines are left out. So a space and `\n`
    are the only white space of the context: beside other white space, such as a no-break space,
    BERT's `run_squad.py` would not find an answer.

    Args:
        path: the document; bytes that are not UTF-8 become U+FFFD, which BERT's tokenizer drops.
        max_words: most words of the context.

    Returns:
        The context, and whether all of it was UTF-8.

    Raises:
        OSError: the document cannot be read.
    """
    lines: list[str] = []
    left = max_words
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            words = line.split(maxsplit=left)[:left]
            if words:
                lines.append(" ".join(words))
            left -= len(words)
            if not left:
                break
    escaped = "\n".join(lines)
    context = _ESCAPED_BYTES.sub("\ufffd", escaped)
    return context, context == escaped


def find_answer(context: str, aliases: Iterable[str]) -> tuple[int, int] | None:
    r"""Find the first alias that occurs in a context, at its first place.

    Words are compared as TriviaQA's official evaluation compares answers (`normalize_answer`):
    without regard to case, punctuation between them, and articles. Unlike there, punctuation
    outside of ASCII separates words too. An answer does not go beyond its line.

    Args:
        context: lines that end with `\n`.
        aliases: spellings of the answer, in the order to try; normalized ones will do.

    Returns:
        Offsets of its first character and behind its last one, or None.

    Example:
        >>> find_answer("By J.K. Rowling", ["j k rowling"])
        (3, 15)
    """
    # In " " + word + " " + word + " ", `str.find` finds an alias only at whole words. It is much
    # faster than a regular expression for each of hundreds of aliases.
    parts = [" "]
    word_offsets: list[int] = []
    spans: list[tuple[int, int]] = []
    length = 1
    for match in _WORD_OR_LINE_END.finditer(context):
        word = match.group().lower()
        if word not in _ARTICLES:
            word_offsets.append(length)
            spans.append(match.span())
            parts += [word, " "]
            length += len(word) + 1
    haystack = "".join(parts)
    for alias in aliases:
        words = [word.lower() for word in _WORD.findall(alias)]
        words = [word for word in words if word not in _ARTICLES]
        found = haystack.find(f" {' '.join(words)} ") if words else -1
        if found >= 0:
            first = bisect_left(word_offsets, found + 1)
            return spans[first][0], spans[first + len(words) - 1][1]
    return None


def _punctuation() -> str:
    """Return characters that separate words: those of `normalize_answer` and other punctuation."""
    ascii_signs = "".join(c for c in map(chr, range(128)) if c.isprintable() and not c.isalnum())
    others = (chr(code) for code in range(128, 0x3100))
    return ascii_signs + "´" + "".join(c for c in others if unicodedata.category(c)[0] == "P")


_ARTICLES = frozenset(("a", "an", "the"))
_WORD = re.compile(rf"[^\s{re.escape(_punctuation())}]+")
_WORD_OR_LINE_END = re.compile(rf"{_WORD.pattern}|\n")
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]")


def _read_pair_context(
    pair: TriviaPair, folders: dict[Source, Path], max_words: int
) -> tuple[str | None, str, bool]:
    """Return why there is no context, or None; the context; whether it was all UTF-8."""
    folder = folders.get(pair.source)
    if folder is None or not pair.filename:
        return "missing", "", True
    path = folder / pair.filename
    try:
        # The names were checked when the file was read, but a symbolic link may lead out too.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                "the document lies outside of the evidence folder",
                path=path,
                hint="put the document itself there instead of a link",
            )
        context, is_utf8 = read_context(path, max_words)
    except (FileNotFoundError, NotADirectoryError):
        return "missing", "", True
    # Links in a circle are a RuntimeError; a name may hold what no file name can.
    except (OSError, RuntimeError, UnicodeEncodeError):
        return "unreadable", "", True
    return (None if context else "empty"), context, is_utf8


def _answer(
    pair: TriviaPair, context: str, is_training: bool, version_2_with_negative: bool
) -> tuple[str, dict[str, Any]]:
    """Return the outcome, and the question without its id."""
    question = pair.question
    qa: dict[str, Any] = {"qid": question.question_id, "question": question.text, "answers": []}
    if question.aliases is None:
        return "unanswered", qa
    span = find_answer(context, question.aliases)
    if version_2_with_negative:
        qa["is_impossible"] = span is None
    if span is not None:
        qa["answers"] = [{"text": context[slice(*span)], "answer_start": span[0]}]
        return "answered", qa
    if version_2_with_negative:
        return "impossible", qa
    return ("no_answer" if is_training else "unanswered"), qa


def _present(node: Any) -> Any:
    """Leave out keys whose value is null, which programs write for a missing value."""
    if not isinstance(node, dict):
        return node
    return {key: value for key, value in node.items() if value is not None}


def _read_aliases(
    datum: object, where: str, path: str | os.PathLike[str], *, is_needed: bool
) -> tuple[str, ...] | None:
    if isinstance(datum, dict) and "Answer" not in datum and not is_needed:
        return None
    answer = _present(_get(datum, "Answer", dict, where, path))
    in_answer = f"{where}.Answer"
    aliases = _get(answer, "NormalizedAliases", list, in_answer, path, default=[])
    if not aliases and not is_needed and not {"Value", "Aliases"} & answer.keys():
        return None
    if not aliases:
        value = _get(answer, "Value", str, in_answer, path)
        aliases = [value, *_get(answer, "Aliases", list, in_answer, path, default=[])]
    if not all(isinstance(alias, str) for alias in aliases):
        raise InputError(
            f"an alias in {in_answer} is not text", path=path, hint="fetch the file again"
        )
    return tuple(aliases)


def _refuse_escape(filename: str, where: str, path: str | os.PathLike[str]) -> None:
    is_absolute = PurePosixPath(filename).is_absolute()
    if is_absolute or ".." in re.split(r"[/\\]", filename) or "\0" in filename:
        raise InputError(
            f"'Filename' in {where} leads out of the evidence folder: {filename!r}",
            path=path,
            hint="do not trust this file; fetch TriviaQA from its own site",
        )
