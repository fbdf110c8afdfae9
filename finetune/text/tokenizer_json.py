"""The parts of a `tokenizer.json` beside its vocabulary, each compared with BERT's.

Hugging Face's library `tokenizers` writes this file, with the type of every part of a tokenizer.
Since version 5, `transformers` saves it without a `vocab.txt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.storage.json_files import load_object
from finetune.text.tokenization import AddedToken
from finetune.text.vocabulary import check_id

TOKENIZER_FILE = "tokenizer.json"

_HINT = "only BERT's way to split text is supported"


@dataclasses.dataclass(frozen=True)
class TokenizerJson:
    """The parts that may differ between the tokenizers of BERT models.

    Attributes:
        path: the file.
        values: all values of the file.
        normalization: `do_lower_case`, `strip_accents` and `tokenize_chinese_chars`.
        special: `unk_token`, and `cls_token` and `sep_token` if the tokenizer puts them around the
            text.
        added: tokens that are found in the text before it is split.
        max_chars_per_word: longer words are unknown.
    """

    path: Path
    values: Mapping[str, Any] = dataclasses.field(repr=False)
    normalization: Mapping[str, bool | None]
    special: Mapping[str, str]
    added: tuple[AddedToken, ...]
    max_chars_per_word: int


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Read a `tokenizer.json`.

    Raises:
        InputError: the file cannot be read, or a part of it, which the message names, splits text
            in another way than BERT.
    """
    values = load_object(path, what="the tokenizer", finite=False, large_integers="float")
    model = _part(values, "model", path)
    if model.get("continuing_subword_prefix", "##") != "##":
        raise InputError(
            f"continuing_subword_prefix is {model['continuing_subword_prefix']!r}, not '##'",
            path=path,
            hint=_HINT,
        )
    most = model.get("max_input_chars_per_word", 100)
    if not isinstance(most, int) or isinstance(most, bool) or not 0 < most < 2**31:
        raise InputError(f"max_input_chars_per_word is {most!r}, not a length", path=path)
    unknown = model.get("unk_token", "[UNK]")
    if not isinstance(unknown, str):
        raise InputError(f"unk_token is {unknown!r}, not a text", path=path)
    _check_type(_part(values, "pre_tokenizer", path), "BertPreTokenizer", "pre_tokenizer", path)
    return TokenizerJson(
        path,
        values,
        _normalization(_part(values, "normalizer", path), path),
        {"unk_token": unknown, **_around(values.get("post_processor"), path)},
        _added_tokens(values.get("added_tokens") or [], path),
        most,
    )


def _part(values: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    part = values.get(name)
    inner = "normalizers" if name == "normalizer" else "pretokenizers"
    # A sequence with a single part is this part.
    while isinstance(part, dict) and part.get("type") == "Sequence":
        parts = part.get(inner)
        if not isinstance(parts, list) or len(parts) != 1:
            raise InputError(f"its {name} is a sequence, not BERT's", path=path, hint=_HINT)
        part = parts[0]
    if not isinstance(part, dict):
        raise InputError(f"its {name} is {part!r:.60}, not BERT's", path=path, hint=_HINT)
    return part


def _check_type(part: Mapping[str, Any], wanted: str, name: str, path: Path) -> None:
    if part.get("type") != wanted:
        raise InputError(
            f"its {name} is {part.get('type')!r:.60}, not {wanted!r}", path=path, hint=_HINT
        )


def _normalization(part: Mapping[str, Any], path: Path) -> dict[str, bool | None]:
    _check_type(part, "BertNormalizer", "normalizer", path)
    if part.get("clean_text", True) is not True:
        raise InputError("its normalizer has clean_text false", path=path, hint=_HINT)
    values = {
        "do_lower_case": part.get("lowercase", True),
        "strip_accents": part.get("strip_accents"),
        "tokenize_chinese_chars": part.get("handle_chinese_chars", True),
    }
    for name, value in values.items():
        if not isinstance(value, bool) and not (value is None and name == "strip_accents"):
            raise InputError(f"its normalizer has {name} {value!r:.60}", path=path)
    return values


def _around(part: Any, path: Path) -> dict[str, str]:
    """Return the names of the tokens before and after a text; none if the part does not say."""
    if part is None:
        return {}
    kind = part.get("type") if isinstance(part, dict) else None
    try:
        if kind == "BertProcessing":
            return {"cls_token": str(part["cls"][0]), "sep_token": str(part["sep"][0])}
        if kind == "TemplateProcessing":
            pieces = _pieces(part["pair"])
            cls, sep = pieces[0][0], pieces[2][0]
            single = [(cls, 0), ("A", 0), (sep, 0)]
            if pieces == [*single, ("B", 1), (sep, 1)] and _pieces(part["single"]) == single:
                return {"cls_token": cls, "sep_token": sep}
    except (KeyError, IndexError, TypeError, AttributeError):
        pass
    raise InputError(
        f"its post_processor ({kind!r:.60}) does not make [CLS] A [SEP] B [SEP]",
        path=path,
        hint=_HINT,
    )


def _pieces(template: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Return names and segments: `{"Sequence": {"id": "A", "type_id": 0}}` gives `("A", 0)`."""
    found = [piece for entry in template for piece in entry.values()]
    return [(str(piece["id"]), int(piece["type_id"])) for piece in found]


def _added_tokens(entries: Any, path: Path) -> tuple[AddedToken, ...]:
    if not isinstance(entries, list):
        raise InputError("its added_tokens are not a list", path=path)
    return tuple(
        added_token(entry, entry.get("id") if isinstance(entry, dict) else None, path)
        for entry in entries
    )


def added_token(entry: Any, number: object, path: Path) -> AddedToken:
    """Make an added token from its description in a file.

    Args:
        entry: the spelling, or an object with the spelling as `content`. Its keys `lstrip` and
            `rstrip` make no difference: white space beside a token never reaches BERT.
        number: the id.
        path: the file, for messages.

    Raises:
        InputError: the description is not valid.
    """
    values = {"content": entry} if isinstance(entry, str) else entry
    if not isinstance(values, dict) or not isinstance(values.get("content"), str):
        raise InputError(f"{str(entry)[:60]!r} is no added token", path=path)
    if not values["content"]:
        raise InputError("an added token is empty", path=path)
    return AddedToken(
        values["content"],
        check_id(values["content"], number, path),
        # As in the library, tokens that are not special are looked for in the normalized text.
        bool(values.get("normalized", not values.get("special", False))),
        bool(values.get("single_word", False)),
    )
