"""Tests of finetune.storage.array_cache and of SQuAD's features in it."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.storage.array_cache import Arrays, CacheEntry, hash_key, load_or_make
from finetune.tasks.demo_data import demo_files
from finetune.tasks.squad_cache import SquadSource, load_squad_features
from finetune.tasks.squad_examples import read_squad
from finetune.tasks.squad_features import SquadFeatures, feature_parts, featurize
from finetune.text.tokenization import (
    CASED,
    UNCASED,
    AddedToken,
    Normalization,
    SpecialTokens,
    load_tokenizer,
    make_tokenizer,
)
from finetune.text.vocabulary import read_vocabulary

PIECES: list[Arrays] = [
    {"a": np.arange(6, dtype=np.int32).reshape(3, 2), "b": np.array([True, False, True])},
    {"a": np.arange(6, 8, dtype=np.int32).reshape(1, 2), "b": np.array([False])},
]


class Maker:
    """Gives some pieces and counts how often."""

    def __init__(self, pieces: list[Arrays]) -> None:
        self.pieces, self.calls = pieces, 0

    def __call__(self) -> tuple[Iterator[Arrays], dict[str, int]]:
        self.calls += 1
        return iter(self.pieces), {"questions": 7}


def check(entry: CacheEntry, was_there: bool) -> None:
    np.testing.assert_array_equal(entry.arrays["a"], [[0, 1], [2, 3], [4, 5], [6, 7]])
    np.testing.assert_array_equal(entry.arrays["b"], [True, False, True, False])
    assert entry.arrays["a"].dtype == np.int32
    assert entry.extra == {"questions": 7}
    assert entry.was_there is was_there


def test_made_once_and_read_back(tmp_path: Path) -> None:
    make = Maker(PIECES)
    check(load_or_make(tmp_path / "cache", "k", make), False)
    entry = load_or_make(tmp_path / "cache", "k", make)
    check(entry, True)
    assert make.calls == 1
    assert isinstance(entry.arrays["a"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        entry.arrays["a"][0, 0] = 9
    check(load_or_make(tmp_path / "cache", "other", make), False)
    assert sorted(os.listdir(tmp_path / "cache")) == ["k", "other"]


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    check(load_or_make(None, "k", Maker(PIECES)), False)
    assert not list(tmp_path.iterdir())


def test_empty_arrays(tmp_path: Path) -> None:
    make = Maker([{"a": np.empty((0, 4), np.int32)}])
    for was_there in (False, True):
        entry = load_or_make(tmp_path, "k", make)
        assert entry.arrays["a"].shape == (0, 4)
        assert entry.was_there is was_there


def cut_short(entry: Path) -> None:
    (entry / "a").write_bytes((entry / "a").read_bytes()[:-1])


def lose_array(entry: Path) -> None:
    (entry / "b").unlink()


def spoil_description(entry: Path) -> None:
    (entry / "entry.json").write_text('{"arrays": {"a"')


def change_description(entry: Path) -> None:
    text = (entry / "entry.json").read_text()
    (entry / "entry.json").write_text(text.replace('"questions": 7', '"questions": 8'))


def nest_description(entry: Path) -> None:
    (entry / "entry.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    "damage", [cut_short, lose_array, spoil_description, change_description, nest_description]
)
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make = Maker(PIECES)
    load_or_make(tmp_path, "k", make)
    damage(tmp_path / "k")
    check(load_or_make(tmp_path, "k", make), False)
    check(load_or_make(tmp_path, "k", make), True)
    assert make.calls == 2
    (record,) = caplog.records
    assert record.getMessage().endswith("/k are damaged: making them again")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_bit_is_believed(tmp_path: Path, data: st.DataObject) -> None:
    make = Maker(PIECES)
    load_or_make(tmp_path, "k", make)
    path = tmp_path / "k" / data.draw(st.sampled_from(["a", "b", "entry.json"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    check(load_or_make(tmp_path, "k", make), False)
    check(load_or_make(tmp_path, "k", make), True)


def test_an_entry_under_another_key_is_not_taken(tmp_path: Path) -> None:
    make = Maker(PIECES)
    load_or_make(tmp_path, "k", make)
    (tmp_path / "k").rename(tmp_path / "other")
    check(load_or_make(tmp_path, "other", make), False)


def test_an_entry_of_an_earlier_version_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = Maker(PIECES)
    load_or_make(tmp_path, "k", make)
    description = {"arrays": {"a": ["<i4", [4, 2]], "b": ["|b1", [4]]}, "extra": {"questions": 7}}
    (tmp_path / "k" / "entry.json").write_text(json.dumps(description))
    check(load_or_make(tmp_path, "k", make), False)
    check(load_or_make(tmp_path, "k", make), True)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    check(load_or_make(tmp_path / "file", "k", Maker(PIECES)), False)
    assert "not caching" in caplog.text


def test_a_failure_while_making_leaves_nothing(tmp_path: Path) -> None:
    def make() -> tuple[Iterator[Arrays], dict[str, int]]:
        def pieces() -> Iterator[Arrays]:
            yield PIECES[0]
            raise InputError("wrong line")

        return pieces(), {}

    with pytest.raises(InputError, match="wrong line"):
        load_or_make(tmp_path, "k", make)
    assert not list(tmp_path.iterdir())


def test_entries_not_used_for_longest_go_first(tmp_path: Path) -> None:
    make = Maker([{"a": np.zeros(1000, np.uint8)}])
    now = time.time()
    new, middle, old, newest, big = (hash_key(name=n) for n in range(5))
    for age, key in enumerate((new, middle, old)):
        load_or_make(tmp_path, key, make)
        os.utime(tmp_path / key, (now - 100 * age, now - 100 * age))
    # The user may have named a folder with other things in it.
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "final.docx").write_bytes(b"x" * 5000)
    (thesis / "entry.json").write_text("{}")
    os.utime(thesis, (now - 1e6, now - 1e6))
    abandoned = tmp_path / ".making-x"
    abandoned.mkdir()
    os.utime(abandoned, (now - 1e6, now - 1e6))
    (tmp_path / ".making-y").mkdir()
    load_or_make(tmp_path, old, make)  # used again
    load_or_make(tmp_path, newest, make, limit_bytes=2500)
    assert set(os.listdir(tmp_path)) == {".making-y", "thesis", newest, old}
    # The newest stays even if it alone is too large.
    load_or_make(tmp_path, big, make, limit_bytes=10)
    assert set(os.listdir(tmp_path)) == {".making-y", "thesis", big}
    assert (thesis / "final.docx").is_file()


def test_two_processes_that_make_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second finds the first one's entry in its way, and takes it."""
    make = Maker(PIECES)
    replace = os.replace

    def slower(source: Path, target: Path) -> None:
        replace(source, target)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(os, "replace", slower)
    check(load_or_make(tmp_path, "k", make), False)
    assert make.calls == 1
    assert not caplog.text


def test_keys_differ_by_any_part() -> None:
    keys = {hash_key(a=1, b="x"), hash_key(a=1, b="y"), hash_key(a=2, b="x"), hash_key(a=1)}
    assert len(keys) == 4
    assert hash_key(a=1, b=2) == hash_key(b=2, a=1)


VOCABULARY = read_vocabulary(demo_files().vocab_file)
TOKENIZER = make_tokenizer(VOCABULARY, UNCASED)
THE = AddedToken("the", VOCABULARY.ids["the"])
SOURCE = SquadSource(
    demo_files().squad_train,
    TOKENIZER,
    max_seq_length=48,
    doc_stride=8,
    max_query_length=16,
    is_training=True,
    version_2_with_negative=False,
)


@given(st.integers(1, 60))
def test_parts_are_the_whole(rows: int) -> None:
    examples = read_squad(SOURCE.path, is_training=True, version_2_with_negative=False)
    options = {"max_seq_length": 48, "doc_stride": 8, "max_query_length": 16, "is_training": True}
    whole = featurize(examples, TOKENIZER, **options).arrays()  # type: ignore[arg-type]
    parts = [
        part.arrays()
        for part in feature_parts(examples, TOKENIZER, rows=rows, **options)  # type: ignore[arg-type]
    ]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    sizes = [len(part["input_ids"]) for part in parts]
    most = np.bincount(whole["example_index"]).max()
    assert max(sizes) <= max(rows, most)


def test_cached_squad_features_are_the_features(tmp_path: Path) -> None:
    fresh = featurize(
        SOURCE.read(), TOKENIZER, max_seq_length=48, doc_stride=8, max_query_length=16,
        is_training=True,
    )  # fmt: skip
    for was_there in (False, True):
        entry = load_squad_features(SOURCE, tmp_path)
        assert entry.was_there is was_there
        assert entry.extra == {"num_examples": 40, "skipped": {}}
        features = SquadFeatures.from_arrays(entry.arrays, TOKENIZER)
        assert features.tokens(3) == fresh.tokens(3)
        for name, array in fresh.arrays().items():
            np.testing.assert_array_equal(entry.arrays[name], array)
            assert entry.arrays[name].dtype == array.dtype


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": make_tokenizer(VOCABULARY, CASED)},
        {"tokenizer": make_tokenizer(VOCABULARY, Normalization(True, strip_accents=False))},
        {"tokenizer": make_tokenizer(VOCABULARY, Normalization(True, None, False))},
        {"tokenizer": make_tokenizer(VOCABULARY, UNCASED, SpecialTokens(sep="the"))},
        {"tokenizer": make_tokenizer(VOCABULARY, UNCASED, added=[THE])},
        {"tokenizer": make_tokenizer(VOCABULARY, UNCASED, max_chars_per_word=5)},
        {"max_seq_length": 47},
        {"doc_stride": 9},
        {"max_query_length": 15},
        {"is_training": False},
        {"max_examples": 3},
        {"version_2_with_negative": True, "is_training": False},
    ],
)
def test_another_setting_is_another_entry(tmp_path: Path, change: dict[str, object]) -> None:
    load_squad_features(SOURCE, tmp_path)
    other = dataclasses.replace(SOURCE, **change)  # type: ignore[arg-type]
    assert not load_squad_features(other, tmp_path).was_there


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_squad_features(SOURCE, cache)
    copy = tmp_path / "copy.json"
    copy.write_bytes(SOURCE.path.read_bytes())
    assert load_squad_features(dataclasses.replace(SOURCE, path=copy), cache).was_there
    copy.write_text(copy.read_text().replace("?", "!", 1))
    assert not load_squad_features(dataclasses.replace(SOURCE, path=copy), cache).was_there
    vocab = tmp_path / "vocab.txt"
    vocab.write_bytes(demo_files().vocab_file.read_bytes())
    again = load_tokenizer(vocab, do_lower_case=True)
    assert load_squad_features(dataclasses.replace(SOURCE, tokenizer=again), cache).was_there
    vocab.write_text(vocab.read_text() + "onemoreword\n")
    longer = load_tokenizer(vocab, do_lower_case=True)
    assert not load_squad_features(dataclasses.replace(SOURCE, tokenizer=longer), cache).was_there
    with pytest.raises(InputError, match=r"gone\.json: cannot read"):
        load_squad_features(dataclasses.replace(SOURCE, path=tmp_path / "gone.json"), cache)
