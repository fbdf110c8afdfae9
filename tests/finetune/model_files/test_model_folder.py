"""Tests of finetune.model_files.model_folder and of the files that it reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.model_files.model_folder import (
    FoundTokenizer,
    ModelFiles,
    find_model_files,
    find_tokenizer,
    infer_do_lower_case,
)
from finetune.text.tokenization import (
    CASED,
    UNCASED,
    AddedToken,
    Normalization,
    SpecialTokens,
    make_tokenizer,
)
from finetune.text.tokenizer_files import write_tokenizer_files
from finetune.text.vocabulary import Vocabulary, read_vocabulary
from helpers.model_folders import CONFIG, SPECIAL, WORDS, tokenizer_json, write_json, write_vocab


def make_folder(folder: Path, **files: object) -> Path:
    """A folder with a configuration, a vocabulary, and files by name without `.json`."""
    write_vocab(folder)
    write_json(folder / "config.json", CONFIG)
    for name, values in files.items():
        write_json(folder / f"{name}.json", values)
    return folder


def found_in(folder: Path, **asked: bool | None) -> FoundTokenizer:
    return find_tokenizer(find_model_files(folder, None, None, None), asked)


def tokens_in(folder: Path, text: str = "Ich möchte 中国", **asked: bool | None) -> list[str]:
    return found_in(folder, **asked).tokenizer.tokenize(text)


CASED_TOKENS = ["Ich", "möchte", "中", "国"]
UNCASED_TOKENS = ["ich", "mochte", "中", "国"]


# Which file tells how text is normalized


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"do_lower_case": False}}, CASED_TOKENS),
        ({"tokenizer_config": {"do_lower_case": True}}, UNCASED_TOKENS),
        ({"tokenizer": tokenizer_json(normalizer={"lowercase": False})}, CASED_TOKENS),
        ({"tokenizer": tokenizer_json()}, UNCASED_TOKENS),
        ({"run": {"do_lower_case": False, "strip_accents": "no"}}, CASED_TOKENS),
        ({"tokenizer_config": {"do_lower_case": True, "strip_accents": False}},
         ["ich", "möchte", "中", "国"]),
        ({"tokenizer_config": {"do_lower_case": False, "strip_accents": True}},
         ["Ich", "mochte", "中", "国"]),
        ({"tokenizer_config": {"do_lower_case": False, "tokenize_chinese_chars": False}},
         ["Ich", "möchte", "中国"]),
        ({"tokenizer": tokenizer_json(normalizer={"strip_accents": False})},
         ["ich", "möchte", "中", "国"]),
        ({"tokenizer": tokenizer_json(normalizer={"handle_chinese_chars": False})},
         ["ich", "mochte", "中国"]),
        ({"run": {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False}},
         ["ich", "möchte", "中国"]),
    ],
)  # fmt: skip
def test_the_folder_tells(tmp_path: Path, files: dict[str, Any], expected: list[str]) -> None:
    found = found_in(make_folder(tmp_path, **files))
    assert found.tokenizer.tokenize("Ich möchte 中国") == expected
    assert (found.guess, found.remarks) == (None, ())


def test_the_most_telling_source_counts_and_others_are_named(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path,
        run={"do_lower_case": False},
        tokenizer_config={"do_lower_case": True, "strip_accents": False},
        tokenizer=tokenizer_json(normalizer={"lowercase": False}),
    )
    found = found_in(folder)
    # The run of an older version has stripped accents or not as letters were lowered.
    assert found.tokenizer.normalization == CASED
    assert found.remarks == (
        f"do_lower_case is False by {folder / 'run.json'}, and True by "
        f"{folder / 'tokenizer_config.json'}: using False",
    )
    assert tokens_in(folder, do_lower_case=True) == UNCASED_TOKENS
    assert "True by the flag, and False by" in found_in(folder, do_lower_case=True).remarks[0]
    (folder / "run.json").unlink()
    found = found_in(folder)
    assert found.tokenizer.normalization == Normalization(True, strip_accents=False)
    assert "and False by" in found.remarks[0]
    (folder / "tokenizer_config.json").unlink()
    assert found_in(folder).tokenizer.normalization == CASED


@pytest.mark.parametrize("key", ["strip_accents", "tokenize_chinese_chars"])
@pytest.mark.parametrize("value", [True, False])
def test_flags_come_first(tmp_path: Path, key: str, value: bool) -> None:
    folder = make_folder(tmp_path, tokenizer_config={"do_lower_case": True, key: not value})
    assert getattr(found_in(folder, **{key: value}).tokenizer.normalization, key) is value


def test_a_finished_run_is_evaluated_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its folder's name, from within it, by links, by its best weights, as a first stage."""
    trained = Normalization(False, strip_accents=True, tokenize_chinese_chars=False)
    base = make_folder(tmp_path / "uncased_base")
    out = tmp_path / "uncased_experiments" / "out"
    out.mkdir(parents=True)
    tokenizer = make_tokenizer(read_vocabulary(base / "vocab.txt"), trained)
    for place in (out, out / "best"):
        place.mkdir(exist_ok=True)
        write_json(place / "bert_config.json", CONFIG)
        write_tokenizer_files(place, tokenizer, 16)
    record = write_json(out / "run.json", vars(trained))
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "vocab-link.txt").symlink_to(out / "vocab.txt")
    monkeypatch.chdir(out)
    prefix = out / "model.ckpt-10"
    for files in (
        find_model_files(out, None, None, None),
        find_model_files(Path("."), None, None, None),
        find_model_files(Path("../out/"), None, None, None),
        find_model_files(tmp_path / "link", None, None, None),
        find_model_files(out / "best", None, None, None),
        find_model_files(Path("best"), None, None, None),
        # The second of two stages, as the original's README has it.
        find_model_files(base, None, None, out),
        find_model_files(None, base / "config.json", base / "vocab.txt", prefix),
        find_model_files(None, base / "config.json", tmp_path / "vocab-link.txt", None),
    ):
        found = find_tokenizer(files, {})
        assert found.tokenizer == tokenizer, files
        assert (found.guess, found.remarks) == (None, ()), files
    # What lies in the output folder decides although weights are named that are not used.
    assert (
        find_tokenizer(find_model_files(base, None, None, None), {}, [out]).tokenizer == tokenizer
    )
    # Without the record, as in a copy, the folder still tells.
    record.unlink()
    assert found_in(out).tokenizer == tokenizer


def test_guesses_are_said(tmp_path: Path) -> None:
    for name, lowered in (("cased_L-2", False), ("uncased_L-2", True)):
        found = found_in(make_folder(tmp_path / name))
        assert found.tokenizer.normalization == Normalization(lowered)
        assert found.guess == f"the name {tmp_path / name}"
    found = found_in(make_folder(tmp_path / "model"))
    assert (found.tokenizer.normalization, found.guess) == (UNCASED, "")
    (tmp_path / "link").symlink_to(tmp_path / "cased_L-2")
    assert found_in(tmp_path / "link").tokenizer.normalization == CASED
    # A large vocabulary tells by its letters; the names of special tokens are none.
    for words, lowered in (("word{}", True), ("Word{}", False)):
        write_vocab(tmp_path / "model", [words.format(number) for number in range(1000)])
        found = found_in(tmp_path / "model")
        assert found.tokenizer.normalization == Normalization(lowered)
        assert found.guess is not None
        assert "capital letters in" in found.guess


def test_doubts_are_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "cased_L-2", tokenizer_config={"do_lower_case": True})
    assert "looks like a cased model" in found_in(folder).remarks[0]
    folder = make_folder(tmp_path / "model", tokenizer_config={"do_lower_case": True})
    write_vocab(folder, [f"Word{number}" for number in range(1000)])
    assert "look like a cased model" in found_in(folder).remarks[0]
    assert found_in(folder, do_lower_case=False).remarks[0].startswith("do_lower_case is False by")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("models/uncased_L-12_H-768_A-12/bert_model.ckpt", True),
        ("models/cased_L-24_H-1024_A-16/bert_model.ckpt", False),
        ("wwm_uncased_L-24_H-1024_A-16", True),
        ("wwm_cased_L-24_H-1024_A-16", False),
        ("multi_cased_L-12_H-768_A-12", False),
        ("multilingual_L-12_H-768_A-12", True),
        ("chinese_L-12_H-768_A-12", True),
        ("bert-base-uncased", True),
        ("BERT-Large-Cased", False),
        ("cased_models/uncased_L-12_H-768_A-12/model.ckpt-10", True),
        ("showcased/unencased", None),
        ("squad_output", None),
        ("", None),
    ],
)
def test_case_from_names(name: str, expected: bool | None) -> None:
    assert infer_do_lower_case(name) is expected


# Vocabularies


def test_a_folder_with_tokenizer_json_alone(tmp_path: Path) -> None:
    folder = tmp_path / "saved-by-5"
    write_json(folder / "config.json", CONFIG)
    values = tokenizer_json(normalizer={"lowercase": False, "strip_accents": False})
    path = write_json(folder / "tokenizer.json", values)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    found = found_in(folder)
    text = f"Ich möchte 中国! {'a' * 150}"
    assert found.tokenizer.tokenize(text) == theirs.encode(text, add_special_tokens=False).tokens
    assert found.tokenizer.vocab_size == len(SPECIAL) + len(WORDS)
    assert (found.tokenizer.max_chars_per_word, found.guess) == (100, None)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    write_json(folder / "config.json", CONFIG)
    entry = {"content": "<x>", "id": 20, "single_word": True, "normalized": True, "special": False}
    values = tokenizer_json(normalizer={"lowercase": False})
    values["added_tokens"] += [entry, {"content": "[E 1]", "id": 21, "special": True}]
    write_json(folder / "tokenizer.json", values)
    tokenizer = found_in(folder).tokenizer
    assert tokenizer.added == (
        AddedToken("<x>", 20, normalized=True, single_word=True),
        AddedToken("[E 1]", 21),
    )
    out = tmp_path / "ours"
    write_json(out / "config.json", CONFIG)
    write_tokenizer_files(out, tokenizer, 16)
    again = found_in(out).tokenizer
    assert again == tokenizer
    text = "Ich<x> <x>möchte[E 1]中"
    assert again.encode_ids(text) == tokenizer.encode_ids(text)


@given(
    st.dictionaries(
        st.text(st.sampled_from("ab#é中 \n\u2028"), min_size=1, max_size=4), st.integers(4, 30)
    ),
    st.booleans(),
)
def test_any_vocabulary_survives_writing(
    tmp_path_factory: pytest.TempPathFactory, more: dict[str, int], lowered: bool
) -> None:
    folder = tmp_path_factory.mktemp("model")
    words = {word: number for number, word in {n: w for w, n in more.items()}.items()}
    ids = {**dict(zip(("[PAD]", "[UNK]", "[CLS]", "[SEP]"), range(4), strict=True)), **words}
    vocabulary = Vocabulary(folder / "tokenizer.json", ids, max(ids.values()) + 1)
    tokenizer = make_tokenizer(vocabulary, Normalization(lowered))
    write_tokenizer_files(folder, tokenizer, 16)
    write_json(folder / "config.json", CONFIG)
    again = found_in(folder).tokenizer
    assert again.vocab_size == tokenizer.vocab_size
    for text in ("ab a b é", "aab中b #a", "\u2028 a"):
        assert again.encode_ids(text) == tokenizer.encode_ids(text)


def test_added_tokens_from_every_file(tmp_path: Path) -> None:
    entry = {"content": "<a>", "special": True}
    folder = make_folder(
        tmp_path,
        tokenizer_config={
            "do_lower_case": True,
            "added_tokens_decoder": {"0": "[PAD]", "14": entry},
            "additional_special_tokens": ["<a>", {"content": "<c>"}, "中国"],
        },
        added_tokens={"<b>": 15, "<c>": 16},
    )
    found = found_in(folder).tokenizer
    assert found.added == (
        # A token of the vocabulary that is called special.
        AddedToken("中国", 13),
        AddedToken("<a>", 14),
        AddedToken("<b>", 15, normalized=True),
        AddedToken("<c>", 16),
    )
    assert found.tokenize("<a>ich<C>中国[PAD]")[:3] == ["<a>", "ich", "[UNK]"]
    assert "中国" in found.tokenize("<a>ich<C>中国[PAD]")
    assert found.vocab_size == 17


def test_special_tokens_of_other_names(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path,
        tokenizer_config={"do_lower_case": True, "cls_token": {"content": "ich"}},
        special_tokens_map={"sep_token": "中", "cls_token": "ich"},
    )
    special = SpecialTokens(cls="ich", sep="中")
    assert found_in(folder).tokenizer.special == special
    write_json(folder / "special_tokens_map.json", {"cls_token": "Ich"})
    with pytest.raises(InputError, match="cls_token is 'Ich', and 'ich' in"):
        found_in(folder)


# What cannot be honoured


def changed(path: str, value: object) -> dict[str, Any]:
    """A `tokenizer.json` with one value changed, named by its place."""
    values = tokenizer_json()
    *places, last = path.split(".")
    inner = values
    for place in places:
        inner = inner[place]
    inner[last] = value
    return values


REFUSED: list[tuple[str, Mapping[str, Any], str]] = [
    ("tokenizer_config", {"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class is 'Roberta"),
    ("tokenizer_config", {"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer"),
    # A class without rules of its own needs the file that has them.
    ("tokenizer_config", {"tokenizer_class": "PreTrainedTokenizerFast"}, "PreTrainedTokenizerFast"),
    ("tokenizer_config", {"do_basic_tokenize": False}, "do_basic_tokenize is False"),
    ("tokenizer_config", {"never_split": ["ich"]}, r"never_split is \['ich'\]"),
    ("tokenizer_config", {"word_tokenizer_type": "mecab"}, "word_tokenizer_type is 'mecab'"),
    ("tokenizer_config", {"wordpieces_prefix": "@"}, "wordpieces_prefix is '@'"),
    ("tokenizer_config", {"do_lower_case": "no"}, "do_lower_case is 'no', not true or false"),
    ("tokenizer_config", {"cls_token": 3}, "cls_token is 3"),
    ("tokenizer_config", {"pad_token": "<pad>"}, "vocabulary has no <pad>"),
    ("tokenizer_config", {"added_tokens_decoder": {"x": "<a>"}}, "id of '<a>' is None"),
    ("tokenizer_config", {"added_tokens_decoder": {"20": "ich"}}, "'ich' has the id 20"),
    ("tokenizer_config", {"additional_special_tokens": ["<e>"]}, "special token '<e>' has no id"),
    ("tokenizer_config", {"max_chars_per_word": 0}, "max_chars_per_word is 0"),
    ("tokenizer_config", {"auto_map": {"AutoTokenizer": "x.Y"}}, "auto_map is"),
    ("config", {**CONFIG, "tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer"),
    ("added_tokens", {"<a>": -1}, "id of '<a>' is -1"),
    ("added_tokens", {"<a>": True}, "id of '<a>' is True"),
    ("tokenizer", changed("model.type", "BPE"), "model is 'BPE'"),
    ("tokenizer", changed("model.continuing_subword_prefix", "@@"), "subword_prefix is '@@'"),
    ("tokenizer", changed("model.max_input_chars_per_word", "9"), "chars_per_word is '9'"),
    ("tokenizer", changed("model.vocab", {}), "no vocabulary"),
    ("tokenizer", changed("model.vocab", ["ich"]), "no vocabulary"),
    ("tokenizer", changed("model.vocab", {"ich": 1.5}), "id of 'ich' is 1.5"),
    ("tokenizer", changed("model.vocab", {"\ud800": 1}), "not Unicode"),
    ("tokenizer", changed("model.vocab", {"ich": 10**12}), "id of 'ich' is"),
    ("tokenizer", changed("model.vocab.ich", 8), "'ich' has the id 9, and 8 in tokenizer.json"),
    ("tokenizer", changed("normalizer", None), "normalizer is None"),
    ("tokenizer", changed("normalizer.type", "NFKC"), "normalizer is 'NFKC'"),
    ("tokenizer", changed("normalizer.clean_text", False), "clean_text false"),
    ("tokenizer", changed("normalizer.lowercase", 1), "do_lower_case 1"),
    ("tokenizer", changed("pre_tokenizer.type", "Whitespace"), "pre_tokenizer is 'Whitespace'"),
    ("tokenizer", changed("pre_tokenizer", None), "pre_tokenizer is None"),
    ("tokenizer", changed("post_processor.single", []), "post_processor"),
    ("tokenizer", changed("post_processor.type", "RobertaProcessing"), "post_processor"),
    ("tokenizer", changed("post_processor.pair", 3), "post_processor"),
    ("tokenizer", changed("added_tokens", 3), "added_tokens are not a list"),
    ("tokenizer", changed("added_tokens", [3]), "'3' is no added token"),
    ("run", [], "not a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "message"), REFUSED)
def test_refused_by_name(
    tmp_path: Path, name: str, values: Mapping[str, Any], message: str
) -> None:
    folder = make_folder(tmp_path, **{"tokenizer_config": {"do_lower_case": True}, name: values})
    if name == "tokenizer" and "'ich' has" not in message:
        (folder / "vocab.txt").unlink()
    with pytest.raises(InputError, match=message) as caught:
        found_in(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 50)
    | st.sampled_from(["", "[CLS]", "BertTokenizer"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("a0"), inner),
    max_leaves=4,
)
PLACES = [
    "tokenizer_config", "tokenizer_config.tokenizer_class", "tokenizer_config.do_lower_case",
    "tokenizer_config.strip_accents", "tokenizer_config.added_tokens_decoder",
    "tokenizer_config.extra_special_tokens", "tokenizer_config.sep_token",
    "tokenizer_config.mask_token", "tokenizer_config.never_split", "special_tokens_map",
    "special_tokens_map.cls_token", "added_tokens", "run", "run.do_lower_case", "tokenizer",
    "tokenizer.model", "tokenizer.model.vocab", "tokenizer.model.unk_token", "tokenizer.normalizer",
    "tokenizer.normalizer.type", "tokenizer.pre_tokenizer", "tokenizer.post_processor",
    "tokenizer.post_processor.pair", "tokenizer.post_processor.type", "tokenizer.added_tokens",
]  # fmt: skip


@given(st.sampled_from(PLACES), JSON)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: str, value: object
) -> None:
    folder = tmp_path_factory.mktemp("model")
    files: dict[str, Any] = {
        "config": dict(CONFIG), "tokenizer": tokenizer_json(), "run": {},
        "tokenizer_config": {}, "special_tokens_map": {}, "added_tokens": {},
    }  # fmt: skip
    inner, (*places, last) = files, place.split(".")
    for name in places:
        inner = inner[name]
    inner[last] = value
    for name, values in files.items():
        write_json(folder / f"{name}.json", values)
    message = ""
    try:
        found_in(folder).tokenizer.tokenize("Ich möchte")
    except InputError as error:
        message = str(error)
    assert "\n" not in message


def test_a_class_without_rules_needs_tokenizer_json(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path,
        tokenizer_config={"tokenizer_class": "TokenizersBackend"},
        tokenizer=tokenizer_json(),
    )
    assert found_in(folder).tokenizer.normalization == UNCASED


@pytest.mark.parametrize("name", ["BertTokenizerFast", "DistilBertTokenizer", "ElectraTokenizer"])
def test_classes_that_split_as_bert_does(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path, tokenizer_config={"tokenizer_class": name})
    assert found_in(folder).tokenizer.normalization == UNCASED


def test_keys_that_are_not_known_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harmless = {
        "name_or_path": "x", "model_max_length": 1e30, "backend": "tokenizers", "is_local": True,
        "padding_side": "right", "mask_token": "[MASK]", "clean_up_tokenization_spaces": True,
        "special_tokens_map_file": None, "tokenizer_file": None, "never_split": None,
    }  # fmt: skip
    config = {"do_lower_case": True, **harmless}
    folder = make_folder(tmp_path, tokenizer_config=config)
    with caplog.at_level(logging.WARNING):
        found_in(folder)
    assert caplog.text == ""
    config |= {"unheard_of": 1, "padding_side": "left"}
    write_json(folder / "tokenizer_config.json", config)
    found_in(folder)
    expected = "tokenizer_config.json: keys that are not used: unheard_of, padding_side"
    assert expected in caplog.text


def test_files_of_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", tokenizer=tokenizer_json())
    files = find_model_files(folder, None, None, None)
    assert files == ModelFiles(folder / "config.json", folder / "vocab.txt", folder, folder)
    (folder / "vocab.txt").unlink()
    files = find_model_files(folder, None, None, None)
    assert files.vocab_file == folder / "tokenizer.json"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no vocab\.txt or tokenizer\.json in the model's folder"):
        find_model_files(folder, None, None, None)


def test_two_configurations_that_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The word `gelu` means another function in each."""
    folder = make_folder(tmp_path)
    write_json(folder / "bert_config.json", {**CONFIG, "hidden_act": "gelu_python"})
    find_model_files(folder, None, None, None)
    assert caplog.text == ""
    write_json(folder / "bert_config.json", {**CONFIG, "hidden_act": "gelu_new"})
    assert find_model_files(folder, None, None, None).config_file.name == "bert_config.json"
    assert "bert_config.json and config.json differ in hidden_act: using the first" in caplog.text
    caplog.clear()
    (folder / "config.json").write_text("{}")
    find_model_files(folder, None, None, None)
    assert "are of different models: using the first" in caplog.text


def test_the_written_file_is_what_transformers_reads(tmp_path: Path) -> None:
    """Under the names that its `BertTokenizer` takes."""
    vocabulary = read_vocabulary(write_vocab(tmp_path))
    write_tokenizer_files(
        tmp_path, make_tokenizer(vocabulary, Normalization(False, None, False)), 16
    )
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written == {
        "tokenizer_class": "BertTokenizer", "do_lower_case": False, "do_basic_tokenize": True,
        "tokenize_chinese_chars": False, "strip_accents": None, "unk_token": "[UNK]",
        "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
        "model_max_length": 16, "max_chars_per_word": 200,
    }  # fmt: skip
