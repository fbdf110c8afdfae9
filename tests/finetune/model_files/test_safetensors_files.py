"""Tests of finetune.model_files.safetensors_files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune.errors import InputError
from finetune.model_files.safetensors_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    open_safetensors,
    original_name,
)
from helpers.model_folders import write_json

WORDS = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
ARRAYS = {
    WORDS: np.arange(12, dtype=np.float32).reshape(6, 2),
    QUERY: np.arange(6, dtype=np.float32).reshape(2, 3),
}


def save_sharded(folder: Path, **changes: str) -> Path:
    """One tensor in each of two files, as `save_pretrained` writes models that are too large."""
    files = {
        name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(ARRAYS, 1)
    }
    for name, file in files.items():
        save_file({name: ARRAYS[name]}, folder / file)
    values = {"metadata": {"total_size": 72}, "weight_map": {**files, **changes}}
    return write_json(folder / INDEX_FILE, values)


def test_an_index_is_read_as_one_file(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / WEIGHTS_FILE)
    shapes, read = open_safetensors(tmp_path / WEIGHTS_FILE)
    sharded, read_sharded = open_safetensors(save_sharded(tmp_path))
    assert sharded == shapes
    for name in shapes:
        np.testing.assert_array_equal(read_sharded(name), read(name))
    # Their linear layers are the other way round.
    np.testing.assert_array_equal(read(original_name(QUERY)), ARRAYS[QUERY].T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bert.x": "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors is mis"),
        ({"bert.x": "../other.safetensors"}, "'../other.safetensors' is no file of the folder"),
        ({"bert.x": "/etc/passwd"}, "'/etc/passwd' is no file of the folder"),
        ({"bert.x": "model-00001-of-00002.safetensors"}, "there is no bert.x, which the index has"),
        ({WORDS: "model-00002-of-00002.safetensors"}, "there is no bert.embeddings.word"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    (tmp_path / "inner").mkdir()
    save_file(ARRAYS, tmp_path / "other.safetensors")
    index = save_sharded(tmp_path / "inner", **changes)
    with pytest.raises(InputError, match=message):
        open_safetensors(index)


@pytest.mark.parametrize("values", [{}, {"weight_map": {}}, {"weight_map": {"a": 3}}])
def test_an_index_of_another_form(tmp_path: Path, values: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"weight_map|no file of the folder"):
        open_safetensors(write_json(tmp_path / INDEX_FILE, values))


def test_bfloat16(tmp_path: Path) -> None:
    """Written by hand, because NumPy has no such type of its own."""
    values = np.array([1.0, -2.5, 3.140625], np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = {WORDS: {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]}}
    text = json.dumps(header).encode()
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    shapes, read = open_safetensors(path)
    assert shapes == {"bert/embeddings/word_embeddings": (3, 1)}
    read_back = np.asarray(read("bert/embeddings/word_embeddings"), np.float32)
    np.testing.assert_array_equal(read_back[:, 0], values)


@pytest.mark.parametrize(
    "prefix", ["", "bert.", "module.bert.", "_orig_mod.module.", "model.bert."]
)
def test_names_of_wrapped_models(prefix: str) -> None:
    name = f"{prefix}encoder.layer.1.output.LayerNorm.gamma"
    assert original_name(name) == "bert/encoder/layer_1/output/LayerNorm/gamma"
    wrapper = prefix.replace("bert.", "")
    assert original_name(f"{wrapper}classifier.weight") == "output_weights"


def test_two_tensors_that_are_one_weight(tmp_path: Path) -> None:
    save_file({WORDS: ARRAYS[WORDS], WORDS[5:]: ARRAYS[WORDS]}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(InputError, match="are the same weight"):
        open_safetensors(tmp_path / WEIGHTS_FILE)
