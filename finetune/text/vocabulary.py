"""A model's vocabulary, from `vocab.txt` or from Hugging Face's `tokenizer.json`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.storage.files import decode_utf8, read_bytes
from finetune.storage.json_files import OWN_LIMIT_BYTES, load_object

_logger = logging.getLogger(__name__)

_HINT = "use the vocabulary that came with the model"
_MAX_IDS = 2**31 - 1


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their ids.

    Attributes:
        path: the file with the vocabulary, for messages.
        ids: id of each token.
        size: number of ids, including those without a token.
    """

    path: Path
    ids: Mapping[str, int] = field(repr=False)
    size: int


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Read `vocab.txt`, with a token on each line, or the vocabulary in a `tokenizer.json`.

    If a token occurs twice, there is a warning, and the later id counts, as in the original and in
    `transformers`.

    Raises:
        InputError: the file is missing, or is not a vocabulary.
    """
    path = Path(path)
    if path.suffix == ".json":
        values = load_object(
            path, hint=_HINT, what="the vocabulary", finite=False, large_integers="float"
        )
        return vocabulary_of(values, path)
    return _read_lines(path)


def vocabulary_of(values: Mapping[str, Any], path: Path) -> Vocabulary:
    """Take the vocabulary out of the values of a `tokenizer.json`.

    Args:
        values: the parsed file.
        path: the file, for messages.

    Raises:
        InputError: the vocabulary is not one of WordPiece, or an id is not valid.
    """
    model = values.get("model")
    if not isinstance(model, dict):
        raise InputError("there is no model in it", path=path, hint=_HINT)
    # The first versions of the library wrote no type beside a vocabulary.
    if model.get("type", "WordPiece") != "WordPiece":
        raise InputError(
            f"its model is {model['type']!r}, not BERT's 'WordPiece'", path=path, hint=_HINT
        )
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not ids:
        raise InputError("there is no vocabulary in it", path=path, hint=_HINT)
    for token, number in ids.items():
        check_id(token, number, path)
    return Vocabulary(path, ids, max(ids.values()) + 1)


def check_id(token: str, number: object, path: Path) -> int:
    """Return the id of a token, if it is valid.

    Raises:
        InputError: the id is not valid, or UTF-8 cannot hold the token.
    """
    # To Python, true is also an int.
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _MAX_IDS:
        raise InputError(f"the id of {token!r} is {number!r}, not a row's number", path=path)
    if not token.isascii() and any("\ud800" <= char <= "\udfff" for char in token):
        raise InputError(f"the token {token!r} is not Unicode text", path=path)
    return number


def vocabulary_text(ids: Mapping[str, int], size: int) -> str:
    """Return a vocabulary as the text of `vocab.txt`; ids without a token become blank lines.

    So do tokens that such a file cannot hold, because they begin or end with white space. No text
    has such a token.
    """
    lines = [""] * size
    for token, number in ids.items():
        if "\n" not in token and token == token.strip():
            lines[number] = token
    return "".join(f"{line}\n" for line in lines)


def _read_lines(path: Path) -> Vocabulary:
    ids: dict[str, int] = {}
    twice: list[str] = []
    try:
        data = read_bytes(path, limit_bytes=OWN_LIMIT_BYTES)
    except OSError as error:
        raise InputError(
            f"cannot read the vocabulary ({error.strerror})",
            path=path,
            hint="give the vocab.txt that came with the model",
        ) from error
    text = decode_utf8(data, path, hint=_HINT)
    # Some vocabularies hold line separators as tokens: only "\n" ends a line.
    lines = text.removesuffix("\n").split("\n") if text else []
    for index, token in enumerate(line.strip() for line in lines):
        # A blank line has an id too, but no text can have this token.
        if not token:
            continue
        if token in ids:
            twice.append(f"{token!r} on lines {ids[token] + 1} and {index + 1}")
        ids[token] = index
    if twice:
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        _logger.warning("%s: the last line of a token counts, and %s", path, twice[0] + more)
    return Vocabulary(path, ids, len(lines))
