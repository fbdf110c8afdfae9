"""BERT's tokenization: the original's clean-up and word splitting, then WordPiece.

Reproduces `tokenization.py` of google-research/bert. Clean-up and splitting (its `BasicTokenizer`)
run here over whole texts with character tables taken from Python's own `unicodedata`, which is what
the original asks character by character. WordPiece runs in the `tokenizers` library. Its
`BertNormalizer` is not used: it drops private-use characters, which the original keeps, lowers a
word-final sigma to another letter, and follows an older edition of Unicode.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import tokenizers
from tokenizers import models, pre_tokenizers

from finetune.errors import InputError

MAX_CHARS_PER_WORD = 200
_BLOCK_TEXTS = 4096
CLS, SEP, PAD, UNK = "[CLS]", "[SEP]", "[PAD]", "[UNK]"

# The blocks that the original calls Chinese: unified and compatibility ideographs, not kana, not
# hangul, and none of the extensions added to Unicode after it was written.
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
class Tokenizer:
    """Turns text into WordPiece tokens and ids; never adds special tokens by itself.

    A text that spells `[CLS]` gives the pieces of the brackets and the letters, as in the original.

    Attributes:
        vocab: token to id; the id is the token's line in the vocabulary file, counted from 0.
        do_lower_case: whether text is lowered and its accents are stripped.
        vocab_size: number of lines of the vocabulary file.
    """

    vocab: Mapping[str, int] = field(repr=False)
    do_lower_case: bool
    vocab_size: int
    _wordpiece: tokenizers.Tokenizer = field(repr=False, compare=False)

    @property
    def cls_id(self) -> int:
        """Id of `[CLS]`, which starts every input."""
        return self.vocab[CLS]

    @property
    def sep_id(self) -> int:
        """Id of `[SEP]`, which ends every segment."""
        return self.vocab[SEP]

    @property
    def pad_id(self) -> int:
        """Id of `[PAD]`, for positions that the input mask hides."""
        return self.vocab[PAD]

    @property
    def unk_id(self) -> int:
        """Id of `[UNK]`, for a word that no pieces spell."""
        return self.vocab[UNK]

    def tokenize(self, text: str) -> list[str]:
        """Returns the WordPiece tokens of `text` (`FullTokenizer.tokenize`)."""
        return self._wordpiece.encode(self._prepare(text), add_special_tokens=False).tokens

    def ids(self, tokens: Iterable[str]) -> list[int]:
        """Returns the ids of tokens.

        Raises:
            KeyError: a token is not in the vocabulary; those of `tokenize` always are.
        """
        return [self.vocab[token] for token in tokens]

    def encode_ids(self, text: str) -> list[int]:
        """Returns `ids(tokenize(text))`."""
        return self._wordpiece.encode(self._prepare(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode_ids` of every text; much faster than one call a text."""
        ids: list[list[int]] = []
        # In blocks, because the library's encodings take many times the memory of their ids.
        for first in range(0, len(texts), _BLOCK_TEXTS):
            block = [self._prepare(text) for text in texts[first : first + _BLOCK_TEXTS]]
            encodings = self._wordpiece.encode_batch_fast(block, add_special_tokens=False)
            ids += [encoding.ids for encoding in encodings]
        return ids

    def _prepare(self, text: str) -> str:
        text = _spaced(text, self.do_lower_case)
        # JSON may hold lone surrogates, which the library refuses; like the character put in their
        # place, they are in no vocabulary.
        return text if text.isascii() else re.sub("[\ud800-\udfff]", "\uffff", text)


def load_tokenizer(vocab_file: str | os.PathLike[str], *, do_lower_case: bool) -> Tokenizer:
    """Reads a BERT vocabulary file: one token a line, whose number from 0 is its id.

    Args:
        vocab_file: UTF-8 text, `vocab.txt` of a released model.
        do_lower_case: True for the uncased models.

    Raises:
        InputError: the file is missing, is not UTF-8, holds a token twice, or lacks one of
            `[PAD]`, `[UNK]`, `[CLS]` and `[SEP]`.
    """
    vocab, size = _read_vocab(vocab_file)
    for token in (PAD, UNK, CLS, SEP):
        if token not in vocab:
            raise InputError(
                f"the vocabulary has no {token}",
                path=vocab_file,
                hint="use the vocab.txt that came with the model",
            )
    model = models.WordPiece(
        vocab=vocab, unk_token=UNK, max_input_chars_per_word=MAX_CHARS_PER_WORD
    )
    wordpiece = tokenizers.Tokenizer(model)
    wordpiece.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(vocab, do_lower_case, size, wordpiece)


def basic_tokenize(text: str, *, do_lower_case: bool) -> list[str]:
    """Splits text into words and punctuation marks, before WordPiece.

    The original's `BasicTokenizer`: drops control characters, sets Chinese characters and
    punctuation apart, and, for uncased models, lowers letters and strips accents.

    Example: `basic_tokenize("Don't, René!", do_lower_case=True)` gives
    `["don", "'", "t", ",", "rene", "!"]`.
    """
    return _spaced(text, do_lower_case).split()


def infer_do_lower_case(name_or_path: str | os.PathLike[str]) -> bool | None:
    """Guesses from a model's name whether it is an uncased one; None if the name does not tell.

    Knows names that say `cased` or `uncased`, and Google's two lower-cased releases that do not:
    `multilingual_L-12_H-768_A-12` and `chinese_L-12_H-768_A-12`. The part of a path nearest to the
    file counts most.
    """
    for part in reversed(PurePath(name_or_path).parts):
        if re.search(r"(?<![a-z])uncased(?![a-z])", part, re.IGNORECASE):
            return True
        if re.search(r"(?<![a-z])cased(?![a-z])", part, re.IGNORECASE):
            return False
        if re.match(r"(multilingual|chinese)_L-\d", part):
            return True
    return None


def check_case(do_lower_case: bool, init_checkpoint: str | os.PathLike[str] | None) -> str | None:
    """Compares `do_lower_case` with what the checkpoint's name suggests.

    The original's `validate_case_matches_checkpoint` stops the program; a name is not proof, so
    this returns one line of warning instead, or None if nothing is suspicious.
    """
    expected = None if init_checkpoint is None else infer_do_lower_case(init_checkpoint)
    if init_checkpoint is None or expected is None or expected == do_lower_case:
        return None
    kind = "an uncased" if expected else "a cased"
    return (
        f"do_lower_case={do_lower_case} but {os.fspath(init_checkpoint)} looks like {kind} model; "
        f"use do_lower_case={expected} unless the name misleads"
    )


def _read_vocab(vocab_file: str | os.PathLike[str]) -> tuple[dict[str, int], int]:
    vocab: dict[str, int] = {}
    size = 0
    try:
        # Some vocabularies hold line separators as tokens: only "\n" ends a line.
        with open(vocab_file, encoding="utf-8", newline="\n") as lines:
            for index, line in enumerate(lines):
                size = index + 1
                token = line.strip()
                # A blank line takes up an id, but no text can ever produce it.
                if not token:
                    continue
                if token in vocab:
                    raise InputError(
                        f"the token {token!r} is already on line {vocab[token] + 1}",
                        path=vocab_file,
                        line=size,
                        hint="a vocabulary lists each token once",
                    )
                vocab[token] = index
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8 text ({error.reason})",
            path=vocab_file,
            line=size + 1,
            hint="use the vocab.txt that came with the model",
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read the vocabulary ({error.strerror})",
            path=vocab_file,
            hint="give the vocab.txt that came with the model",
        ) from error
    return vocab, size


def _spaced(text: str, do_lower_case: bool) -> str:
    """Returns `text` cleaned, with white space around everything that is a word of its own.

    The original lowers and decomposes word by word. Neither looks across white space (a space is
    neither cased nor combining), so doing the whole text at once gives the same.
    """
    text = text.translate(_CLEAN)
    if do_lower_case:
        text = unicodedata.normalize("NFD", text.lower()).translate(_STRIP_MARKS)
    return text.translate(_SPLIT_PUNCTUATION)


class _CharTable(dict[int, "int | str | None"]):
    """A table for `str.translate` that asks `unicodedata` about each character only once."""

    def __init__(self, rule: Callable[[int], int | str | None]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> int | str | None:
        value = self[code] = self._rule(code)
        return value


def _clean(code: int) -> int | str | None:
    char = chr(code)
    # Tab and line ends are control characters to Unicode, but white space here.
    if char in " \t\n\r":
        return " "
    category = unicodedata.category(char)
    if code == 0xFFFD or category in ("Cc", "Cf"):
        return None
    if category == "Zs":
        return " "
    if any(first <= code <= last for first, last in _CJK_BLOCKS):
        return f" {char} "
    return code


def _strip_mark(code: int) -> int | None:
    return None if unicodedata.category(chr(code)) == "Mn" else code


def _split_punctuation(code: int) -> int | str:
    char = chr(code)
    # All ASCII signs count, also those that are symbols to Unicode, like "$" and "^".
    ascii_sign = 33 <= code <= 126 and not char.isalnum()
    return f" {char} " if ascii_sign or unicodedata.category(char)[0] == "P" else code


_CLEAN = _CharTable(_clean)
_STRIP_MARKS = _CharTable(_strip_mark)
_SPLIT_PUNCTUATION = _CharTable(_split_punctuation)
