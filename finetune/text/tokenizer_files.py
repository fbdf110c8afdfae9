"""Reading and writing the files that say how a model's text is split into tokens.

Hugging Face has them beside the vocabulary: `tokenizer_config.json`, `tokenizer.json`,
`special_tokens_map.json` and `added_tokens.json`. A setting that would give other tokens, and is
not supported here, is refused by its name. There is a warning about other unknown keys.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.storage.files import write_atomically
from finetune.storage.json_files import json_text, load_object
from finetune.text.tokenization import (
    MAX_CHARS_PER_WORD,
    AddedToken,
    Normalization,
    SpecialTokens,
    Tokenizer,
    make_tokenizer,
)
from finetune.text.tokenizer_json import (
    TOKENIZER_FILE,
    TokenizerJson,
    added_token,
    read_tokenizer_json,
)
from finetune.text.vocabulary import Vocabulary, read_vocabulary, vocabulary_of, vocabulary_text

_logger = logging.getLogger(__name__)

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)
"""Files that may be beside a vocabulary."""

NORMALIZATION_KEYS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")

_SPECIAL_KEYS = ("cls_token", "sep_token", "pad_token", "unk_token")
# The tokenizers of these models split text as BERT's does, and some BERT models name them.
_CLASSES = tuple(
    f"{model}Tokenizer{kind}"
    for model in ("Bert", "DistilBert", "Electra", "MobileBert")
    for kind in ("", "Fast", "Legacy")
)
# These classes have no rules of their own: `tokenizer.json` has all rules.
_GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_HINT = "only BERT's way to split text is supported"
_IGNORED_HINT = (
    "the fast tokenizer of transformers ignores it: where that was used, remove it from the file"
)
# Values with which a key changes no tokens.
_EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "word_tokenizer_type": ("basic", None),
    "subword_tokenizer_type": ("wordpiece", None),
    "wordpieces_prefix": ("##", None),
    "do_split_on_punc": (True, None),
    "split_special_tokens": (False, None),
    "do_basic_tokenize": (True, None),
    "never_split": (None, [], ()),
    "auto_map": (None, {}),
}
# These keys change no tokens either. How texts are padded and cut is decided by the task.
_HARMLESS_NAMES = """
added_tokens_decoder additional_special_tokens backend bos_token chat_template
clean_up_tokenization_spaces clean_text eos_token extra_special_tokens full_tokenizer_file
init_inputs is_local legacy local_files_only mask_token max_chars_per_word max_len max_length
model_input_names model_max_length name_or_path pad_to_multiple_of pad_token_type_id padding
processor_class return_tensors return_token_type_ids special_tokens_map_file stride
tokenizer_class tokenizer_file transformers_version truncation truncation_strategy use_fast
_name_or_path
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a vocabulary say.

    Attributes:
        normalization: values of `NORMALIZATION_KEYS` by file, in the order in which they count.
        special: names of the special tokens.
        added: tokens that are found in the text before it is split.
        markers: further tokens of the vocabulary that are found in the text.
        max_chars_per_word: longer words are unknown.
        model_max_length: most tokens of a text for this model, if a file says so.
        described: the `tokenizer.json`, if there is one.
    """

    normalization: Mapping[Path, Mapping[str, bool | None]]
    special: SpecialTokens
    added: tuple[AddedToken, ...]
    markers: tuple[str, ...]
    max_chars_per_word: int
    model_max_length: int | None
    described: TokenizerJson | None


def read_tokenizer_settings(vocab_file: Path, folders: Sequence[Path] = ()) -> TokenizerSettings:
    """Read the files beside a vocabulary.

    Args:
        vocab_file: `vocab.txt`, or a `tokenizer.json`.
        folders: where to look for the files after the vocabulary's folder.

    Raises:
        InputError: a file cannot be read, or asks for a way to split text that is not supported.
    """
    places = list(dict.fromkeys([vocab_file.parent, vocab_file.resolve().parent, *folders]))
    config_file, config = _read_first(places, TOKENIZER_CONFIG_FILE)
    described = _tokenizer_json(vocab_file, places)
    if config_file is not None:
        check_tokenizer_class(config.get("tokenizer_class"), config_file, described)
        _check_config(config_file, config)
    normalization: dict[Path, Mapping[str, bool | None]] = {}
    if config_file is not None:
        normalization[config_file] = _normalization_values(config_file, config)
    if described is not None:
        normalization[described.path] = described.normalization
    map_file, mapped = _read_first(places, SPECIAL_TOKENS_FILE)
    special = _special_tokens(
        [(config_file, config), (map_file, mapped)]
        + ([] if described is None else [(described.path, described.special)])
    )
    added = _added_tokens(places, config_file, config, described)
    usual = {*vars(special).values(), "[MASK]", *_listed([config.get("mask_token")])}
    markers = {
        name
        for values in (config, mapped)
        for key in ("additional_special_tokens", "extra_special_tokens")
        for name in _listed(values.get(key))
    }
    return TokenizerSettings(
        normalization,
        special,
        # As in the original, a text that spells [SEP] is text.
        tuple(token for token in added if token.content not in usual),
        tuple(sorted(markers - usual - {token.content for token in added})),
        _max_chars(config_file, config, described),
        _whole(config.get("model_max_length")),
        described,
    )


def make_from_files(
    vocab_file: Path, settings: TokenizerSettings, normalization: Normalization
) -> Tokenizer:
    """Make the tokenizer from a vocabulary and the files beside it.

    Raises:
        InputError: the files do not belong together.
    """
    vocabulary = read_vocabulary(vocab_file)
    described = settings.described
    if described is not None and described.path.parent == vocab_file.parent:
        _check_same(vocabulary, vocabulary_of(described.values, described.path))
    unknown = [name for name in settings.markers if name not in vocabulary.ids]
    if unknown:
        raise InputError(
            f"the special token {unknown[0]!r} has no id",
            path=vocab_file,
            hint=f"add it to the vocabulary or to {ADDED_TOKENS_FILE}",
        )
    markers = [AddedToken(name, vocabulary.ids[name]) for name in settings.markers]
    return make_tokenizer(
        vocabulary,
        normalization,
        settings.special,
        sorted([*settings.added, *markers], key=lambda token: token.id),
        settings.max_chars_per_word,
    )


def check_tokenizer_class(name: object, path: Path, described: TokenizerJson | None) -> None:
    """Refuse a class of tokenizers that does not split text as BERT does.

    Args:
        name: class in `transformers`; None if the file names none.
        path: the file that names the class.
        described: the `tokenizer.json`. With it, classes without rules of their own are accepted.

    Raises:
        InputError: the class is another one.
    """
    if name is None or name in _CLASSES or (described is not None and name in _GENERAL_CLASSES):
        return
    raise InputError(f"tokenizer_class is {name!r:.60}", path=path, hint=_HINT)


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer, model_max_length: int) -> None:
    """Write `vocab.txt` and `tokenizer_config.json`, from which the same tokenizer can be read.

    Args:
        folder: an existing folder; each file appears complete or not at all.
        tokenizer: the tokenizer.
        model_max_length: number of positions of the model.

    Raises:
        OSError: the folder cannot be written to.
    """
    special = tokenizer.special
    write_atomically(folder / "vocab.txt", vocabulary_text(tokenizer.vocab, tokenizer.vocab_size))
    values: dict[str, Any] = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": tokenizer.normalization.do_lower_case,
        "do_basic_tokenize": True,
        "tokenize_chinese_chars": tokenizer.normalization.tokenize_chinese_chars,
        "strip_accents": tokenizer.normalization.strip_accents,
        "unk_token": special.unk,
        "sep_token": special.sep,
        "pad_token": special.pad,
        "cls_token": special.cls,
        "mask_token": "[MASK]",
        "model_max_length": model_max_length,
        # A key of this package, which other programs ignore.
        "max_chars_per_word": tokenizer.max_chars_per_word,
    }
    if tokenizer.added:
        values["added_tokens_decoder"] = {
            str(token.id): {
                "content": token.content,
                "lstrip": False,
                "normalized": token.normalized,
                "rstrip": False,
                "single_word": token.single_word,
                "special": not token.normalized,
            }
            for token in tokenizer.added
        }
    write_atomically(folder / TOKENIZER_CONFIG_FILE, json_text(values, indent=2) + "\n")


def _read_first(places: Iterable[Path], name: str) -> tuple[Path | None, Mapping[str, Any]]:
    """Return the first file of a name in several folders, and its values; nothing without one."""
    for place in places:
        path = place / name
        if path.is_file():
            return path, load_object(
                path, what="the tokenizer", finite=False, large_integers="float"
            )
    return None, {}


def _tokenizer_json(vocab_file: Path, places: Iterable[Path]) -> TokenizerJson | None:
    if vocab_file.suffix == ".json":
        return read_tokenizer_json(vocab_file)
    for place in places:
        if (place / TOKENIZER_FILE).is_file():
            return read_tokenizer_json(place / TOKENIZER_FILE)
    return None


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    for key, expected in _EXPECTED.items():
        if key in config and config[key] not in expected:
            ignored = key in ("do_basic_tokenize", "never_split")
            raise InputError(
                f"{key} is {config[key]!r:.60}", path=path, hint=_IGNORED_HINT if ignored else _HINT
            )
    known = {*_HARMLESS, *_EXPECTED, *NORMALIZATION_KEYS, *_SPECIAL_KEYS}
    odd = [key for key in sorted(config) if key not in known and not key.endswith("_token")]
    odd = [key for key in odd if key not in ("padding_side", "truncation_side")]
    odd += [key for key in ("padding_side", "truncation_side") if config.get(key) == "left"]
    if odd:
        _logger.warning("%s: keys that are not used: %s", path, ", ".join(odd)[:200])


def _normalization_values(path: Path, config: Mapping[str, Any]) -> dict[str, bool | None]:
    values = {key: config[key] for key in NORMALIZATION_KEYS if key in config}
    for key, value in values.items():
        if not isinstance(value, bool) and not (value is None and key == "strip_accents"):
            raise InputError(f"{key} is {value!r:.60}, not true or false", path=path)
    return values


def _special_tokens(
    sources: Iterable[tuple[Path | None, Mapping[str, Any]]],
) -> SpecialTokens:
    """Return the names of the special tokens, each from the first file that has it.

    Raises:
        InputError: two files have different names for the same token.
    """
    found: dict[str, tuple[str, Path | None]] = {}
    for path, values in sources:
        for key in _SPECIAL_KEYS:
            value = values.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str) or not value:
                raise InputError(f"{key} is {value!r:.60}, not a token", path=path)
            name, where = found.setdefault(key, (value, path))
            if name != value:
                raise InputError(f"{key} is {value!r}, and {name!r} in {where}", path=path)
    return SpecialTokens(**{key.removesuffix("_token"): name for key, (name, _) in found.items()})


def _added_tokens(
    places: Sequence[Path],
    config_file: Path | None,
    config: Mapping[str, Any],
    described: TokenizerJson | None,
) -> list[AddedToken]:
    """Return the added tokens, with their ids, of all files.

    Raises:
        InputError: two files have different ids for the same token.
    """
    found: dict[str, tuple[AddedToken, Path]] = {}

    def add(token: AddedToken, path: Path) -> None:
        known, where = found.setdefault(token.content, (token, path))
        if known.id != token.id:
            raise InputError(
                f"the added token {token.content!r} has the id {token.id}, and {known.id} in "
                f"{where}",
                path=path,
            )

    decoder = config.get("added_tokens_decoder") or {}
    if config_file is not None:
        if not isinstance(decoder, dict):
            raise InputError("added_tokens_decoder is not an object", path=config_file)
        for number, entry in decoder.items():
            add(added_token(entry, _whole(number), config_file), config_file)
    if described is not None:
        for token in described.added:
            add(token, described.path)
    old_file, old = _read_first(places, ADDED_TOKENS_FILE)
    if old_file is not None:
        markers = _listed(config.get("additional_special_tokens"))
        for content, number in old.items():
            entry = {"content": content, "special": content in markers}
            add(added_token(entry, number, old_file), old_file)
    return [token for token, _ in found.values()]


def _listed(tokens: Any) -> set[str]:
    """Return the spellings of tokens, each a text or an object, in a list or an object."""
    entries = list(tokens.values()) if isinstance(tokens, dict) else tokens
    contents = [
        entry.get("content") if isinstance(entry, dict) else entry
        for entry in (entries if isinstance(entries, list) else [])
    ]
    return {content for content in contents if isinstance(content, str) and content}


def _max_chars(
    path: Path | None, config: Mapping[str, Any], described: TokenizerJson | None
) -> int:
    most = config.get("max_chars_per_word")
    if most is not None:
        if not isinstance(most, int) or isinstance(most, bool) or not 0 < most < 2**31:
            raise InputError(f"max_chars_per_word is {most!r:.60}, not a length", path=path)
        return most
    return MAX_CHARS_PER_WORD if described is None else described.max_chars_per_word


def _whole(value: object) -> int | None:
    """Return a number from a key or a value of JSON; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _check_same(vocabulary: Vocabulary, other: Vocabulary) -> None:
    """See that two vocabularies of one folder agree wherever they name the same token.

    Raises:
        InputError: they do not.
    """
    for token, number in other.ids.items():
        if vocabulary.ids.get(token, number) != number:
            raise InputError(
                f"{token!r} has the id {vocabulary.ids[token]}, and {number} in {other.path.name}",
                path=vocabulary.path,
                hint="remove the file that is not the model's",
            )
