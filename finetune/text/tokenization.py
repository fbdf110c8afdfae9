"""BERT's tokenization: the original's clean-up and word splitting, then WordPiece.

It gives the tokens of `tokenization.py` of google-research/bert. Clean-up and splitting (the
original's `BasicTokenizer`) treat whole texts at once, with tables of characters made from Python's
`unicodedata`, which the original asks for each character. WordPiece runs in the library
`tokenizers`. Its `BertNormalizer` is not used: it drops private-use characters, which the original
keeps, lowers a sigma at the end of a word to another letter, and follows an older edition of
Unicode.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from finetune.errors import InputError
from finetune.storage.json_files import json_text
from finetune.text.vocabulary import Vocabulary, read_vocabulary

MAX_CHARS_PER_WORD = 200
"""Longer words are unknown, in the original's code; in Hugging Face's code the limit is 100."""

_TEXTS_AT_A_TIME = 4096

# Noncharacters, which no text should hold. The first replaces a lone surrogate, which the library
# refuses: neither is in any vocabulary. The second begins a word that stands for an added token.
_NOWHERE, _ADDED = "\uffff", "\ufdd0"

# Unicode's blocks that the original calls Chinese: unified and compatibility ideographs, without
# kana and hangul, and without the extensions that came to Unicode after the original was written.
_CJK_BLOCKS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


@dataclass(frozen=True)
class Normalization:
    """How text is changed before it is split, under the names of `tokenizer_config.json`.

    Attributes:
        do_lower_case: letters are lowered, for an uncased model.
        strip_accents: "é" becomes "e". None does what the original does: strip accents if letters
            are lowered.
        tokenize_chinese_chars: each Chinese character is a word of its own.
    """

    do_lower_case: bool
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True

    @property
    def strips_accents(self) -> bool:
        """Whether accents are stripped."""
        return self.do_lower_case if self.strip_accents is None else self.strip_accents


UNCASED, CASED = Normalization(True), Normalization(False)
"""Normalization of the original's uncased and cased models."""


@dataclass(frozen=True)
class SpecialTokens:
    """Names of the special tokens."""

    cls: str = "[CLS]"
    sep: str = "[SEP]"
    pad: str = "[PAD]"
    unk: str = "[UNK]"


@dataclass(frozen=True, order=True)
class AddedToken:
    """A token that is found in the text before the text is split, such as a marker of an entity.

    Attributes:
        content: spelling of the token.
        id: its row of the word embeddings.
        normalized: look for the normalized spelling in the normalized text.
        single_word: find the token only where no letter or digit is next to it.
    """

    content: str
    id: int
    normalized: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class _Finder:
    """Finds added tokens in a text.

    Attributes:
        indices: the token's place among all added tokens, by its spelling.
        pattern: matches each of the tokens; None if there are none.
    """

    indices: Mapping[str, int]
    pattern: re.Pattern[str] | None

    def mark(self, text: str) -> str:
        """Replace each added token by a word of its own; where several match, the longest."""
        return text if self.pattern is None else self.pattern.sub(self._word, text)

    def _word(self, match: re.Match[str]) -> str:
        index = self.indices.get(match[0])
        return match[0] if index is None else f" {_ADDED}{index} "


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into WordPiece tokens and ids; it never adds special tokens.

    As in the original, a text that spells `[CLS]` gives the pieces of the brackets and letters.

    Example:
        >>> tokenizer = load_tokenizer("vocab.txt", do_lower_case=True)
        >>> tokenizer.tokenize("Unaffable")
        ['una', '##ffa', '##ble']

    Attributes:
        vocab: id of each token; the id is the token's line in `vocab.txt`, counted from 0.
        normalization: how the text is changed first.
        vocab_size: number of ids, including those without a token.
        special: names of the special tokens.
        added: tokens that are found in the text before it is split.
        max_chars_per_word: longer words are unknown.
    """

    vocab: Mapping[str, int] = field(repr=False)
    normalization: Normalization
    vocab_size: int
    special: SpecialTokens
    added: tuple[AddedToken, ...]
    max_chars_per_word: int
    _finders: tuple[_Finder, _Finder] = field(repr=False, compare=False)
    _wordpiece: tokenizers.Tokenizer = field(repr=False, compare=False)

    @property
    def cls_id(self) -> int:
        """Id of `[CLS]`, which starts every input."""
        return self.vocab[self.special.cls]

    @property
    def sep_id(self) -> int:
        """Id of `[SEP]`, which ends every segment."""
        return self.vocab[self.special.sep]

    @property
    def pad_id(self) -> int:
        """Id of `[PAD]`, for positions that the input mask hides."""
        return self.vocab[self.special.pad]

    @property
    def unk_id(self) -> int:
        """Id of `[UNK]`, for a word that no pieces spell."""
        return self.vocab[self.special.unk]

    def description(self) -> dict[str, Any]:
        """Return all that decides which ids a text gets, as values that JSON can hold."""
        # A digest, because hashing the vocabulary itself would sort tens of thousands of entries.
        vocab = json_text([list(self.vocab), list(self.vocab.values())])
        return {
            "vocab_sha256": hashlib.sha256(vocab.encode()).hexdigest(),
            "vocab_size": self.vocab_size,
            "normalization": vars(self.normalization),
            "special": vars(self.special),
            "added": [vars(token) for token in self.added],
            "max_chars_per_word": self.max_chars_per_word,
        }

    def tokenize(self, text: str) -> list[str]:
        """Return the WordPiece tokens of `text` (`FullTokenizer.tokenize`)."""
        tokens = self._wordpiece.encode(self._prepare(text), add_special_tokens=False).tokens
        return [
            self.added[int(token[1:])].content if token.startswith(_ADDED) else token
            for token in tokens
        ]

    def ids(self, tokens: Iterable[str]) -> list[int]:
        """Return the ids of tokens.

        Raises:
            KeyError: a token is not in the vocabulary; those of `tokenize` always are.
        """
        return [self.vocab[token] for token in tokens]

    def encode_ids(self, text: str) -> list[int]:
        """Return `ids(tokenize(text))`."""
        return self._wordpiece.encode(self._prepare(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode_ids` of each text; this is much faster than a call for each text."""
        ids: list[list[int]] = []
        # A part at a time: the library's encodings take many times the memory of their ids.
        for first in range(0, len(texts), _TEXTS_AT_A_TIME):
            part = [self._prepare(text) for text in texts[first : first + _TEXTS_AT_A_TIME]]
            encodings = self._wordpiece.encode_batch_fast(part, add_special_tokens=False)
            ids += [encoding.ids for encoding in encodings]
        return ids

    def _prepare(self, text: str) -> str:
        as_spelled, normalized = self._finders
        if self.added:
            text = as_spelled.mark(text.replace(_ADDED, _NOWHERE))
        text = normalized.mark(_normalized(text, self.normalization))
        text = text.translate(_SPLIT_PUNCTUATION)
        # JSON may hold lone surrogates.
        return text if text.isascii() else re.sub("[\ud800-\udfff]", _NOWHERE, text)


def load_tokenizer(vocab_file: str | os.PathLike[str], *, do_lower_case: bool) -> Tokenizer:
    """Read the vocabulary of a model of the original release.

    Args:
        vocab_file: UTF-8 text, `vocab.txt` of a released model.
        do_lower_case: True for the uncased models.

    Raises:
        InputError: see `finetune.text.vocabulary.read_vocabulary` and `make_tokenizer`.
    """
    return make_tokenizer(read_vocabulary(vocab_file), Normalization(do_lower_case))


def make_tokenizer(
    vocabulary: Vocabulary,
    normalization: Normalization,
    special: SpecialTokens = SpecialTokens(),
    added: Sequence[AddedToken] = (),
    max_chars_per_word: int = MAX_CHARS_PER_WORD,
) -> Tokenizer:
    """Make a tokenizer from its parts.

    Args:
        vocabulary: tokens and ids.
        normalization: how the text is changed first.
        special: names of the special tokens.
        added: tokens that are found in the text before it is split.
        max_chars_per_word: longer words are unknown.

    Raises:
        InputError: the vocabulary lacks a special token, or has another id for an added one.
    """
    vocab = dict(vocabulary.ids)
    for token in added:
        if vocab.setdefault(token.content, token.id) != token.id:
            raise InputError(
                f"the added token {token.content!r} has the id {token.id}, and in the vocabulary "
                f"{vocab[token.content]}",
                path=vocabulary.path,
            )
    for name in (special.pad, special.unk, special.cls, special.sep):
        if name not in vocab:
            raise InputError(
                f"the vocabulary has no {name}",
                path=vocabulary.path,
                hint="use the vocab.txt that came with the model",
            )
    words = {f"{_ADDED}{index}": token.id for index, token in enumerate(added)}
    model = models.WordPiece(
        vocab={**vocabulary.ids, special.unk: vocab[special.unk], **words},
        unk_token=special.unk,
        max_input_chars_per_word=max_chars_per_word,
    )
    wordpiece = tokenizers.Tokenizer(model)
    wordpiece.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(
        vocab,
        normalization,
        max([vocabulary.size, *(token.id + 1 for token in added)]),
        special,
        tuple(added),
        max_chars_per_word,
        (_make_finder(added, None), _make_finder(added, normalization)),
        wordpiece,
    )


def _make_finder(added: Sequence[AddedToken], normalization: Normalization | None) -> _Finder:
    """Make the finder of tokens in normalized text, or, with None, in text as it is."""
    indices = {
        _normalized(token.content, normalization) if normalization else token.content: index
        for index, token in enumerate(added)
        if token.normalized == (normalization is not None)
    }
    indices.pop("", None)  # Nothing is left of an accent alone.
    if not indices:
        return _Finder({}, None)
    # A word that stands for a token already found is left as it is.
    patterns = [rf"{_ADDED}\d+"]
    for content, index in sorted(indices.items(), key=lambda item: -len(item[0])):
        pattern = re.escape(content)
        patterns.append(rf"(?<!\w){pattern}(?!\w)" if added[index].single_word else pattern)
    return _Finder(indices, re.compile("|".join(patterns)))


def basic_tokenize(text: str, normalization: Normalization) -> list[str]:
    """Split text into words and punctuation marks, before WordPiece.

    Like the original's `BasicTokenizer` it drops control characters, makes each Chinese character
    and punctuation mark a word, and, for uncased models, lowers letters and strips accents.

    Example:
        >>> basic_tokenize("Don't, René!", UNCASED)
        ['don', "'", 't', ',', 'rene', '!']
    """
    return _normalized(text, normalization).translate(_SPLIT_PUNCTUATION).split()


def _normalized(text: str, normalization: Normalization) -> str:
    """Return `text` cleaned and changed, with white space around Chinese characters.

    The original lowers and decomposes word by word. To do it for the whole text at once gives the
    same result, because a space is neither a cased nor a combining character.
    """
    text = text.translate(_CLEAN if normalization.tokenize_chinese_chars else _CLEAN_ONLY)
    if normalization.do_lower_case:
        text = text.lower()
    if normalization.strips_accents:
        text = unicodedata.normalize("NFD", text).translate(_STRIP_MARKS)
    return text


class _CharTable(dict[int, "int | str | None"]):
    """A table for `str.translate` that asks `unicodedata` about each character only once."""

    def __init__(self, rule: Callable[[int], int | str | None]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> int | str | None:
        value = self[code] = self._rule(code)
        return value


def _clean(code: int) -> int | str | None:
    if any(first <= code <= last for first, last in _CJK_BLOCKS):
        return f" {chr(code)} "
    return _clean_only(code)


def _clean_only(code: int) -> int | str | None:
    char = chr(code)
    # Tab and line ends are control characters to Unicode, but white space here.
    if char in " \t\n\r":
        return " "
    category = unicodedata.category(char)
    if code == 0xFFFD or category in ("Cc", "Cf"):
        return None
    if category == "Zs":
        return " "
    return code


def _strip_mark(code: int) -> int | None:
    return None if unicodedata.category(chr(code)) == "Mn" else code


def _split_punctuation(code: int) -> int | str:
    char = chr(code)
    # All ASCII signs count, also those that are symbols to Unicode, like "$" and "^".
    ascii_sign = 33 <= code <= 126 and not char.isalnum()
    return f" {char} " if ascii_sign or unicodedata.category(char)[0] == "P" else code


_CLEAN = _CharTable(_clean)
_CLEAN_ONLY = _CharTable(_clean_only)
_STRIP_MARKS = _CharTable(_strip_mark)
_SPLIT_PUNCTUATION = _CharTable(_split_punctuation)
