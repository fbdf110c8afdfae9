"""Tests of what bertbench.running.model_files says and refuses of the files of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bertbench.running.model_files import check_segments, load_config_and_tokenizer
from finetune.errors import InputError
from finetune.model_files.model_folder import find_model_files
from finetune.spec.config import from_mapping
from finetune.text.tokenization import CASED
from helpers.model_folders import CONFIG, write_json, write_vocab


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_vocab(tmp_path)
    write_json(tmp_path / "config.json", CONFIG)
    write_json(tmp_path / "tokenizer_config.json", {"do_lower_case": False})
    return tmp_path


def load(folder: Path, max_seq_length: int = 8, **options: Any) -> Any:
    files = find_model_files(folder, None, None, None)
    return load_config_and_tokenizer(files, {}, max_seq_length, **options)


def test_nothing_is_said_of_a_folder_that_tells(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load(folder, insist=True)
    assert tokenizer.normalization == CASED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("tokenizer_config.json", {}, "do_lower_case is True, as nothing tells; --do_lower_case=f"),
        ("tokenizer_config.json", {"do_lower_case": False, "model_max_length": 6},
         "--max_seq_length 8 is more than the model_max_length 6"),
        ("run.json", {"do_lower_case": True}, "warning: do_lower_case is True by "),
        # Unused rows of the embedding are suspicious only where they are many.
        ("config.json", {**CONFIG, "vocab_size": 600}, "has 14 entries for the model's 600 word"),
        ("config.json", {**CONFIG, "vocab_size": 500}, ""),
    ],
)  # fmt: skip
def test_what_is_said(
    folder: Path, file: str, values: dict[str, Any], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_json(folder / file, values)
    load(folder)
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == bool(words)


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="--max_seq_length 17 is more than the model's 16 posit"):
        load(folder, 17)
    # Also an added token must have its row.
    write_json(folder / "added_tokens.json", {"<x>": 40})
    with pytest.raises(InputError, match="vocabulary has 41 entries but the model only 40 word"):
        load(folder)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="cannot tell whether this is an uncased model"):
        load(folder, insist=True)


def test_a_model_of_one_segment_is_refused_for_two_texts() -> None:
    path = Path("config.json")
    check_segments(from_mapping(CONFIG), path)
    with pytest.raises(InputError, match="type_vocab_size is 1: the model has no embedding for"):
        check_segments(from_mapping({**CONFIG, "type_vocab_size": 1}), path)
