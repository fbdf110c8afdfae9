"""SQuAD features of a file, cached under a hash of everything that they depend on."""

from __future__ import annotations

import dataclasses
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import InputError
from finetune.storage.array_cache import CacheEntry, hash_file, hash_key, load_or_make
from finetune.tasks.squad_examples import SquadExamples, read_squad
from finetune.tasks.squad_features import feature_parts
from finetune.text.tokenization import Tokenizer

# Raise it with every change that gives other features.
_FEATURES_VERSION = 2


@dataclasses.dataclass(frozen=True)
class SquadSource:
    """What features are made from.

    Attributes:
        path: a file of questions in SQuAD's format.
        tokenizer: tokenizer of the model.
        max_seq_length: see `finetune.tasks.squad_features.featurize`.
        doc_stride: see `finetune.tasks.squad_features.featurize`.
        max_query_length: see `finetune.tasks.squad_features.featurize`.
        is_training: see `finetune.tasks.squad_features.featurize`.
        version_2_with_negative: see `finetune.tasks.squad_examples.read_squad`.
        max_examples: number of questions to take from the file's beginning; None takes all.
    """

    path: Path
    tokenizer: Tokenizer
    max_seq_length: int
    doc_stride: int
    max_query_length: int
    is_training: bool
    version_2_with_negative: bool
    max_examples: int | None = None

    def read(self) -> SquadExamples:
        """Read the questions.

        Raises:
            InputError: see `read_squad`; or the file has no questions.
        """
        examples = read_squad(
            self.path,
            is_training=self.is_training,
            version_2_with_negative=self.version_2_with_negative,
        )
        if self.max_examples is not None:
            examples = dataclasses.replace(examples, items=examples.items[: self.max_examples])
        if not len(examples):
            raise InputError("there are no questions in the file", path=self.path)
        return examples

    def key(self) -> str:
        """Hash of contents and settings, not of names.

        Raises:
            InputError: a file cannot be read.
        """
        names = [field.name for field in dataclasses.fields(self)]
        values = {name: getattr(self, name) for name in names if name != "tokenizer"}
        try:
            values["path"] = hash_file(self.path)
        except OSError as error:
            raise InputError(f"cannot read the file ({error.strerror})", path=self.path) from error
        return hash_key(
            tokenizer=self.tokenizer.description(),
            kind="squad",
            version=_FEATURES_VERSION,
            # Both decide how texts are split, as the tokenizer does.
            unicode=unicodedata.unidata_version,
            tokenizers=metadata.version("tokenizers"),
            byte_order=sys.byteorder,
            **values,
        )


def load_squad_features(
    source: SquadSource, cache_dir: Path | None, examples: SquadExamples | None = None
) -> CacheEntry:
    """Take features from the cache, or makes them.

    Args:
        source: what they are made from.
        cache_dir: folder of the cache; None does not cache.
        examples: result of `source.read`, if the caller has it.

    Returns:
        The arrays of `finetune.tasks.squad_features.SquadFeatures`, and as `extra` the values
        `num_examples` and `skipped`, the number of skipped questions by reason.

    Raises:
        InputError: see `SquadSource.read` and `featurize`; or no question has a window.
    """

    def make() -> tuple[Iterator[Mapping[str, np.ndarray]], dict[str, Any]]:
        questions = source.read() if examples is None else examples
        parts = feature_parts(
            questions,
            source.tokenizer,
            max_seq_length=source.max_seq_length,
            doc_stride=source.doc_stride,
            max_query_length=source.max_query_length,
            is_training=source.is_training,
        )
        skipped = Counter(answer.reason for answer in questions.skipped)
        extra = {"num_examples": len(questions), "skipped": dict(sorted(skipped.items()))}
        return (part.arrays() for part in parts), extra

    entry = load_or_make(cache_dir, source.key(), make)
    if not len(entry.arrays["input_ids"]):
        raise InputError("the context of every question is empty", path=source.path)
    return entry


def default_cache_dir() -> Path | None:
    """Return the folder `features` in `$BERTBENCH_CACHE` or in the user's cache of bertbench.

    It is None for a user without a home folder, as in some containers.
    """
    chosen = os.environ.get("BERTBENCH_CACHE")
    if chosen:
        return Path(chosen) / "features"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG specification a relative path is ignored.
    if sys.platform != "darwin" and os.path.isabs(cache):
        return Path(cache) / "bertbench" / "features"
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry for the user
        return None
    base = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return base / "bertbench" / "features"
