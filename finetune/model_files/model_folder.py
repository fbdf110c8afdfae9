"""The files of a model's folder beside its weights, and its tokenizer.

A folder is one of the original release, one of Hugging Face, or the output of a run, which leaves a
record of itself there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from finetune.errors import InputError
from finetune.spec.config import BertConfig, from_mapping
from finetune.storage.json_files import load_object
from finetune.text.tokenization import Normalization, Tokenizer
from finetune.text.tokenizer_files import (
    NORMALIZATION_KEYS,
    TOKENIZER_FILES,
    TokenizerSettings,
    check_tokenizer_class,
    make_from_files,
    read_tokenizer_settings,
)
from finetune.text.vocabulary import read_vocabulary

_logger = logging.getLogger(__name__)

CONFIG_NAMES = ("bert_config.json", "config.json")
VOCABULARY_NAMES = ("vocab.txt", "tokenizer.json")
RUN_FILE = "run.json"
SETTINGS_FILES = (*TOKENIZER_FILES, *CONFIG_NAMES, RUN_FILE)
"""Files beside weights and vocabulary that say how the model was trained."""

# The letters of a smaller vocabulary say nothing about lower-casing.
_TELLING_TOKENS = 1000
_CAPITALS_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The files that a model is made from.

    Attributes:
        config_file: the configuration.
        vocab_file: the vocabulary, `vocab.txt` or a `tokenizer.json`.
        init_checkpoint: the weights; None starts from random ones.
        folder: the model's folder, if one was given.
    """

    config_file: Path
    vocab_file: Path
    init_checkpoint: Path | None
    folder: Path | None = None

    @property
    def weights_folder(self) -> Path | None:
        """The folder with the weights."""
        if self.init_checkpoint is None or self.init_checkpoint.is_dir():
            return self.init_checkpoint
        return self.init_checkpoint.parent


def find_model_files(
    model_dir: Path | None,
    config_file: Path | None,
    vocab_file: Path | None,
    init_checkpoint: Path | None,
) -> ModelFiles:
    """Combine a model's folder with files that are given one by one, which take precedence.

    Raises:
        InputError: a file is neither given nor in the folder.
    """

    def locate(given: Path | None, names: tuple[str, ...], flag: str) -> Path:
        if given is not None:
            if not given.is_file():
                raise InputError(f"no such file, given as {flag}", path=given)
            return given
        if model_dir is None:
            raise InputError(f"{flag} is missing", hint=f"give --model FOLDER or {flag} FILE")
        for name in names:
            if (model_dir / name).is_file():
                return model_dir / name
        raise InputError(
            f"no {' or '.join(names)} in the model's folder",
            path=model_dir,
            hint=f"give it with {flag}",
        )

    if model_dir is not None and not model_dir.is_dir():
        raise InputError("no such model folder", path=model_dir)
    if model_dir is not None and config_file is None:
        _warn_of_two_configurations(model_dir)
    return ModelFiles(
        locate(config_file, CONFIG_NAMES, "--bert_config_file"),
        locate(vocab_file, VOCABULARY_NAMES, "--vocab_file"),
        init_checkpoint or model_dir,
        model_dir,
    )


def _warn_of_two_configurations(folder: Path) -> None:
    """Log a warning if a folder has both kinds of configuration file, and they disagree."""

    def shape_of(path: Path) -> BertConfig | None:
        try:
            return from_mapping(_read_object(path, "the model configuration"))
        except InputError:
            return None

    ours, theirs = (folder / name for name in CONFIG_NAMES)
    if not (ours.is_file() and theirs.is_file()):
        return
    first, second = shape_of(ours), shape_of(theirs)
    if first == second:
        return
    if first is None or second is None:
        _logger.warning("%s and %s are of different models: using the first", ours, theirs.name)
        return
    values, others = first.values(), second.values()
    differ = ", ".join(name for name in values | others if values.get(name) != others.get(name))
    # The word "gelu" means a different function in each.
    _logger.warning("%s and %s differ in %s: using the first", ours, theirs.name, differ)


def run_record(folder: Path) -> Mapping[str, Any]:
    """Return the record that a run has left in its output folder; empty for any other folder.

    Raises:
        InputError: there is a record, but it cannot be read.
    """
    path = folder / RUN_FILE
    if not path.is_file() and folder.resolve().name == "best":
        # A run keeps its best weights in a folder inside of its own.
        path = folder.resolve().parent / RUN_FILE
    return _read_object(path, "the record of a run") if path.is_file() else {}


def read_config_values(folder: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """Return a folder's configuration file and its values, unchecked; nothing without such a file.

    Raises:
        InputError: the file cannot be read.
    """
    for name in CONFIG_NAMES:
        if (folder / name).is_file():
            return folder / name, _read_object(folder / name, "the model configuration")
    return None, {}


def _read_object(path: Path, what: str) -> Mapping[str, Any]:
    return load_object(path, what=what, finite=False, large_integers="float")


@dataclasses.dataclass(frozen=True)
class FoundTokenizer:
    """A model's tokenizer, and what a user should know about it.

    Attributes:
        tokenizer: the tokenizer.
        guess: from what it was guessed whether letters are lowered, such as `the name …`; "" if
            nothing tells; None if there was no guess, because a flag or a file says it.
        remarks: contradictions between flags, files, names and the vocabulary.
        model_max_length: most tokens of a text for this model, if a file says so.
    """

    tokenizer: Tokenizer
    guess: str | None
    remarks: tuple[str, ...]
    model_max_length: int | None


def find_tokenizer(
    files: ModelFiles, asked: Mapping[str, bool | None], trained_in: Sequence[Path] = ()
) -> FoundTokenizer:
    """Make the tokenizer with which a model was trained.

    Several sources may say whether letters are lowered, accents stripped and Chinese characters set
    apart. They are asked in this order: the flags, the record of the run that trained the weights,
    `tokenizer_config.json`, `tokenizer.json`, the names of the files, the vocabulary.

    Args:
        files: the model.
        asked: values of the flags, by `finetune.text.tokenizer_files.NORMALIZATION_KEYS`; None for
            a flag that was not given.
        trained_in: output folders whose records take precedence over that of the weights' folder.

    Raises:
        InputError: a file cannot be read, or asks for a way to split text that is not supported.
    """
    folders = [folder for folder in (files.weights_folder, files.folder) if folder is not None]
    settings = read_tokenizer_settings(files.vocab_file, folders)
    config = _read_object(files.config_file, "the model configuration")
    check_tokenizer_class(config.get("tokenizer_class"), files.config_file, settings.described)
    sources = _sources(files, settings, [*trained_in, *folders], asked)
    values: dict[str, bool | None] = {}
    remarks: list[str] = []
    for key in NORMALIZATION_KEYS:
        told = [(where, said[key]) for where, said in sources if key in said]
        if told:
            where, values[key] = told[0]
            remarks += _contradictions(key, told)
    guess = None
    if "do_lower_case" not in values:
        values["do_lower_case"], guess = _guess(files, [*trained_in, *folders])
    normalization = Normalization(
        bool(values["do_lower_case"]),
        values.get("strip_accents"),
        values.get("tokenize_chinese_chars") is not False,
    )
    tokenizer = make_from_files(files.vocab_file, settings, normalization)
    if guess is None:
        where = next(where for where, said in sources if "do_lower_case" in said)
        if PurePath(where).name != RUN_FILE:
            remarks += _doubts(normalization.do_lower_case, files, tokenizer.vocab)
    return FoundTokenizer(tokenizer, guess, tuple(remarks), settings.model_max_length)


def _sources(
    files: ModelFiles,
    settings: TokenizerSettings,
    folders: Sequence[Path],
    asked: Mapping[str, bool | None],
) -> list[tuple[str, Mapping[str, bool | None]]]:
    """Return what flags and files say about the normalization, in the order in which they count."""
    given = {key: value for key, value in asked.items() if value is not None}
    sources: list[tuple[str, Mapping[str, bool | None]]] = [("the flag", given)]
    vocab_file = files.vocab_file
    for folder in dict.fromkeys([*folders, vocab_file.parent, vocab_file.resolve().parent]):
        record = run_record(folder)
        if isinstance(record.get("do_lower_case"), bool):
            # A record without the other keys is of an earlier version, which had only the defaults.
            accents = record.get("strip_accents")
            trained = {
                "do_lower_case": record["do_lower_case"],
                "strip_accents": accents if isinstance(accents, bool) else None,
                "tokenize_chinese_chars": record.get("tokenize_chinese_chars") is not False,
            }
            sources.append((str(folder / RUN_FILE), trained))
            break
    sources += [(str(path), said) for path, said in settings.normalization.items()]
    return sources


def _contradictions(key: str, told: Sequence[tuple[str, bool | None]]) -> list[str]:
    where, used = told[0]
    others = [other for other, value in told[1:] if value is not None and value != used]
    if used is None or not others:
        return []
    return [f"{key} is {used} by {where}, and {not used} by {others[0]}: using {used}"]


def _guess(files: ModelFiles, folders: Iterable[Path]) -> tuple[bool, str]:
    """Guess from names and vocabulary whether letters are lowered; also return from what."""
    names = [
        str(path)
        for path in (files.init_checkpoint, files.config_file)
        if path is not None
        for path in (path, path.resolve())
    ]
    # Earlier versions recorded only the name of the weights.
    names += [str(run_record(folder).get("init_checkpoint") or "") for folder in folders]
    for name in names:
        inferred = infer_do_lower_case(name)
        if inferred is not None:
            return inferred, f"the name {name}"
    looks = _looks_lowered(read_vocabulary(files.vocab_file).ids)
    if looks is not None:
        return looks, f"the {'lack of ' if looks else ''}capital letters in {files.vocab_file}"
    return True, ""


def _doubts(do_lower_case: bool, files: ModelFiles, vocab: Mapping[str, int]) -> list[str]:
    """Return what contradicts a choice that no run has recorded."""
    name = str(files.init_checkpoint or files.config_file)
    inferred = infer_do_lower_case(name)
    if inferred is not None and inferred != do_lower_case:
        return [f"do_lower_case is {do_lower_case}, but {name} looks like {_kind(inferred)} model"]
    if do_lower_case and _looks_lowered(vocab) is False:
        return [
            f"do_lower_case is True, but the capital letters in {files.vocab_file} look like "
            f"{_kind(False)} model"
        ]
    return []


def _kind(lowered: bool) -> str:
    return "an uncased" if lowered else "a cased"


def _looks_lowered(vocab: Mapping[str, int]) -> bool | None:
    """Return whether a vocabulary is one of lowered text; None if nothing tells."""
    words = [token for token in vocab if not token.startswith("[")]
    if len(words) < _TELLING_TOKENS:
        return None
    capitals = sum(token != token.lower() for token in words)
    if capitals > _CAPITALS_SHARE * len(words):
        return False
    return True if capitals == 0 else None


def infer_do_lower_case(name_or_path: str | os.PathLike[str]) -> bool | None:
    """Guess from a model's name whether it is an uncased one; None if the name does not tell.

    A name may say `cased` or `uncased`. Two releases of Google are lower-cased and do not say so:
    `multilingual_L-12_H-768_A-12` and `chinese_L-12_H-768_A-12`. The last part of a path that tells
    decides.

    Example:
        >>> infer_do_lower_case("models/uncased_L-12_H-768_A-12/bert_model.ckpt")
        True
    """
    for part in reversed(PurePath(name_or_path).parts):
        if re.search(r"(?<![a-z])uncased(?![a-z])", part, re.IGNORECASE):
            return True
        if re.search(r"(?<![a-z])cased(?![a-z])", part, re.IGNORECASE):
            return False
        if re.match(r"(multilingual|chinese)_L-\d", part):
            return True
    return None
