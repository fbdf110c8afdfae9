"""A model for which case decides: trained, evaluated from its own folder, exported, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_line import bertbench
from helpers.model_folders import CONFIG, write_json, write_vocab

WORDS = [f"{word}{number}" for number in range(10) for word in ("Rot", "rot")]


def results_of(*arguments: str | Path, cwd: Path) -> tuple[dict[str, float], str]:
    result = bertbench(*arguments, "--json", "-", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Random weights; nothing but `tokenizer_config.json` tells that case is to be kept."""
    folder = tmp_path / "model"
    write_vocab(folder, [w for word in WORDS for w in (word, word.replace("o", "ö"))])
    shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64}
    write_json(folder / "config.json", {**CONFIG, **shape})
    write_json(folder / "tokenizer_config.json", {"do_lower_case": False})
    return folder


def test_a_cased_model_keeps_case_from_training_to_export(tmp_path: Path, model: Path) -> None:
    table = tmp_path / "all.csv"
    rows = [f"{word},{'name' if word[0] == 'R' else 'word'}" for word in WORDS * 4]
    table.write_text("\n".join(["text,label", *rows, ""]))
    out, exported = tmp_path / "out", tmp_path / "exported"
    shared = ["run", "classifier", "--dev_file", table, "--max_seq_length", "8", "--memory",
              "400MiB"]  # fmt: skip
    trained, said = results_of(
        *shared, "--bert_config_file", model / "config.json", "--vocab_file", model / "vocab.txt",
        "--train_file", table, "--train_batch_size", "8", "--num_train_epochs", "12",
        "--learning_rate", "1e-3", "--output_dir", out, cwd=tmp_path,
    )  # fmt: skip
    # Lower-cased, both kinds of words are the same, and half of the answers are right at most.
    assert trained["eval_accuracy"] == 1.0
    assert "do_lower_case" not in said
    record = json.loads((out / "run.json").read_text())
    assert (record["do_lower_case"], record["strip_accents"]) == (False, None)
    # From within the folder, and in another order of the labels.
    again, said = results_of(
        *shared, "--model", ".", "--output_dir", "../again", "--labels", "word,name", cwd=out
    )
    assert again["eval_accuracy"] == 1.0
    assert "do_lower_case" not in said
    assert "put in the order word, name" in said
    results_of("export", out, "--to", exported, "--format", "huggingface", cwd=tmp_path)
    # Without --labels: the exported configuration names them.
    last, _ = results_of(
        *shared, "--model", exported, "--output_dir", tmp_path / "last", cwd=tmp_path
    )
    assert last["eval_accuracy"] == 1.0
    assert last["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-4)
