"""Tests of finetune.export.export_weights and finetune.export.saved_model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from finetune.errors import InputError
from finetune.export.export_folder import new_folder
from finetune.export.export_weights import (
    export_checkpoint,
    export_hugging_face,
    hugging_face_name,
    open_model,
)
from finetune.export.saved_model import export_saved_model
from finetune.model.modeling import create_variables, encode
from finetune.model.weights import find_checkpoint, load_weights, open_tf_checkpoint
from finetune.model_files.safetensors_files import original_name
from finetune.spec.config import INPUT_NAMES, BertConfig, from_json_file
from finetune.spec.step_settings import ModelSpec
from finetune.text.tokenization import CASED, load_tokenizer, make_tokenizer
from finetune.text.vocabulary import read_vocabulary
from finetune.train.inference import make_predictor
from helpers.exports import VOCAB, assert_same, save_tf
from helpers.tiny_models import CONFIG, NUM_LABELS, Arrays, random_batch
from helpers.weight_files import hugging_face_arrays, random_values

TOKENIZER = load_tokenizer(VOCAB, do_lower_case=True)
HEADS = ("squad", "classifier", None)
# A classifier needs its pooler.
POOLED = [("squad", True), ("classifier", True), (None, True), ("squad", False), (None, False)]
POOLER = ("bert/pooler/dense/kernel", "bert/pooler/dense/bias")
INPUTS = {name: random_batch(3, 8)[name] for name in INPUT_NAMES}


def values_for(head: str | None, *, pooler: bool = True) -> Arrays:
    """Weights of every kind; of a size that keeps activations away from saturation."""
    values = {name: value * 0.3 for name, value in random_values(head or "squad").items()}
    return {
        name: value.astype(np.float32)
        for name, value in values.items()
        if (head or name.startswith("bert/")) and (pooler or name not in POOLER)
    }


def variables_of(folder: Path, head: str | None, config: BertConfig = CONFIG) -> dict:
    variables = create_variables(config, head or "squad", num_labels=NUM_LABELS, seed=9)
    if head is None:
        variables = {n: v for n, v in variables.items() if n.startswith("bert/")}
    load_weights(variables, folder)
    return variables


# What a checkpoint holds


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["tf", "safetensors"])
def test_the_head_is_found_by_names_and_shapes(tmp_path: Path, head: str | None, kind: str) -> None:
    values = values_for(head)
    extra = {"cls/predictions/output_bias": np.zeros(31, np.float32)}
    if kind == "tf":
        save_tf(tmp_path / "bert_model.ckpt", {**values, **extra})
    else:
        arrays = hugging_face_arrays(values)
        arrays["cls.predictions.output_bias"] = extra["cls/predictions/output_bias"]
        arrays["bert.embeddings.position_ids"] = np.arange(16)[None]
        save_file(arrays, tmp_path / "model.safetensors")
    model = open_model(tmp_path, CONFIG)
    assert (model.head, model.num_labels) == (head, NUM_LABELS if head == "classifier" else 0)
    assert model.has_pooler
    assert model.parameters == sum(value.size for value in values.values())
    assert_same({name: model.read(name) for name in model.shapes}, values)
    # What is not exported is named, but for the optimizer's state, which nobody misses.
    assert [name.removeprefix("bert/") for name in model.left_out] == [*extra]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.pop(POOLER[0]), "no bert/pooler/dense/kernel"),
        (lambda values: values.pop("output_bias"), "no output_bias"),
        (
            lambda values: values.pop("bert/encoder/layer_1/output/LayerNorm/beta"),
            "no bert/encoder",
        ),
        (
            lambda values: values.update({"output_bias": np.zeros(4, np.float32)}),
            "output_bias has shape [4] in the checkpoint but [3]",
        ),
        (
            lambda values: values.update({"output_weights": np.float32(0)}),
            "output_weights has shape [] in the checkpoint",
        ),
        (
            lambda values: values.update({"cls/squad/output_weights": np.zeros((2, 8))}),
            "the head of SQuAD and that of a classifier",
        ),
    ],
)
def test_an_incomplete_classifier_is_refused(tmp_path: Path, change: object, words: str) -> None:
    values = values_for("classifier")
    change(values)
    prefix = save_tf(tmp_path / "bert_model.ckpt", values)
    with pytest.raises(InputError) as caught:
        open_model(tmp_path, CONFIG)
    assert str(prefix) in str(caught.value)
    assert words in str(caught.value)


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    save_tf(tmp_path / "bert_model.ckpt", values_for("squad"))
    with pytest.raises(InputError, match=r"\[31, 8\] in the checkpoint but \[32, 8\]"):
        open_model(tmp_path, dataclasses.replace(CONFIG, vocab_size=32))


# Hugging Face


@pytest.mark.parametrize(("head", "pooler"), POOLED)
def test_hugging_face_round_trip_is_bit_identical(
    tmp_path: Path, head: str | None, pooler: bool
) -> None:
    values = values_for(head, pooler=pooler)
    save_tf(tmp_path / "run" / "model.ckpt-7", values)
    model = open_model(tmp_path / "run" / "model.ckpt-7", CONFIG)
    with new_folder(tmp_path / "out") as folder:
        export_hugging_face(model, TOKENIZER, folder)
    weights = tmp_path / "out" / "model.safetensors"
    # In a BertModel the names have no prefix.
    assert_same(load_file(weights), hugging_face_arrays(values, "bert." if head else ""))
    with safe_open(weights, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    again = variables_of(tmp_path / "out", head)
    assert_same({name: again[name].numpy() for name in values}, values)
    # Others may read what they may read of the rest.
    assert weights.stat().st_mode == (tmp_path / "out" / "vocab.txt").stat().st_mode


def test_translated_names_are_the_inverse_of_the_reader() -> None:
    for head in ("squad", "classifier"):
        for name in values_for(head):
            for prefix in ("bert.", ""):
                assert original_name(hugging_face_name(name, prefix)) == name


@pytest.mark.parametrize(
    ("activation", "theirs"), [("gelu_tanh", "gelu_new"), ("gelu_erf", "gelu"), ("relu", "relu")]
)
def test_hugging_face_configuration(tmp_path: Path, activation: str, theirs: str) -> None:
    config = dataclasses.replace(CONFIG, hidden_act=activation)
    save_tf(tmp_path / "bert_model.ckpt", values_for("classifier"))
    model = open_model(tmp_path, config)
    labels = ["contradiction", "entailment", "neutral"]
    with new_folder(tmp_path / "out") as folder:
        export_hugging_face(
            model, make_tokenizer(read_vocabulary(VOCAB), CASED), folder, labels=labels
        )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["hidden_act"] == theirs
    assert written["architectures"] == ["BertForSequenceClassification"]
    assert written["model_type"] == "bert"
    assert written["layer_norm_eps"] == 1e-12
    assert written["hidden_dropout_prob"] == config.hidden_dropout_prob
    assert written["id2label"] == {"0": "contradiction", "1": "entailment", "2": "neutral"}
    assert written["label2id"] == {"contradiction": 0, "entailment": 1, "neutral": 2}
    assert from_json_file(tmp_path / "out" / "config.json") == config
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["do_lower_case"] is False
    assert tokenizer["tokenizer_class"] == "BertTokenizer"
    assert tokenizer["model_max_length"] == 16
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == VOCAB.read_bytes()


@pytest.mark.parametrize(
    ("head", "architecture"),
    [
        ("squad", "BertForQuestionAnswering"),
        ("classifier", "BertForSequenceClassification"),
        (None, "BertModel"),
    ],
)
def test_hugging_face_class_and_default_labels(
    tmp_path: Path, head: str | None, architecture: str
) -> None:
    save_tf(tmp_path / "bert_model.ckpt", values_for(head))
    model = open_model(tmp_path, CONFIG)
    (tmp_path / "out").mkdir()
    export_hugging_face(model, TOKENIZER, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == [architecture]
    labels = {str(index): f"LABEL_{index}" for index in range(NUM_LABELS)}
    assert written.get("id2label") == (labels if head == "classifier" else None)
    if head == "classifier":
        with pytest.raises(InputError, match="2 labels are named for a classifier of 3"):
            export_hugging_face(model, TOKENIZER, tmp_path / "out", labels=["no", "yes"])


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("head", ["squad", "classifier"])
def test_transformers_computes_the_same_logits(tmp_path: Path, head: str, activation: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, hidden_act=activation)
    save_tf(tmp_path / "bert_model.ckpt", values_for(head))
    with new_folder(tmp_path / "out") as folder:
        export_hugging_face(open_model(tmp_path, config), TOKENIZER, folder)
    theirs = {
        "squad": transformers.BertForQuestionAnswering,
        "classifier": transformers.BertForSequenceClassification,
    }[head].from_pretrained(tmp_path / "out")
    with torch.no_grad():
        outputs = theirs.eval()(
            input_ids=torch.tensor(INPUTS["input_ids"]).long(),
            attention_mask=torch.tensor(INPUTS["input_mask"]).long(),
            token_type_ids=torch.tensor(INPUTS["segment_ids"]).long(),
        )
    predict = make_predictor(variables_of(tmp_path, head, config), ModelSpec(config, head, 8))
    expected = predict(INPUTS).numpy()
    if head == "classifier":
        np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)
    else:
        got = np.stack([outputs.start_logits, outputs.end_logits])
        real = INPUTS["input_mask"].astype(bool)
        np.testing.assert_allclose(got[:, real], expected[:, real], atol=1e-4)


# The original's format


@pytest.mark.parametrize(("head", "pooler"), POOLED)
def test_checkpoint_round_trip_is_bit_identical(
    tmp_path: Path, head: str | None, pooler: bool
) -> None:
    values = values_for(head, pooler=pooler)
    # From the other format, so that names and kernels are translated on the way.
    (tmp_path / "theirs").mkdir()
    save_file(hugging_face_arrays(values), tmp_path / "theirs" / "model.safetensors")
    config = dataclasses.replace(CONFIG, hidden_act="gelu_erf")
    with new_folder(tmp_path / "out") as folder:
        export_checkpoint(open_model(tmp_path / "theirs", config), TOKENIZER, folder)
    found = find_checkpoint(tmp_path / "out")
    assert found == tmp_path / "out" / "bert_model.ckpt"
    shapes, read = open_tf_checkpoint(found)
    assert_same({name: read(name) for name in shapes}, values)
    assert from_json_file(tmp_path / "out" / "bert_config.json") == config
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == VOCAB.read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "bert_config.json",
        "bert_model.ckpt.data-00000-of-00001",
        "bert_model.ckpt.index",
        "tokenizer_config.json",
        "vocab.txt",
    }


def test_training_state_is_left_behind(tmp_path: Path) -> None:
    values = values_for("squad")
    save_tf(tmp_path / "model.ckpt-7", values)
    (tmp_path / "out").mkdir()
    export_checkpoint(open_model(tmp_path / "model.ckpt-7", CONFIG), TOKENIZER, tmp_path / "out")
    shapes, _ = open_tf_checkpoint(tmp_path / "out" / "bert_model.ckpt")
    assert set(shapes) == set(values)


@pytest.mark.parametrize("write", [export_checkpoint, export_saved_model])
def test_an_error_of_the_file_system_is_one_for_the_caller(tmp_path: Path, write: object) -> None:
    save_tf(tmp_path / "bert_model.ckpt", values_for("squad"))
    folder = tmp_path / "out"
    # Where files must go there are folders that cannot be replaced.
    (folder / "bert_model.ckpt.index" / "full").mkdir(parents=True)
    (folder / "saved_model.pb" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="cannot write to"):
        write(open_model(tmp_path, CONFIG), TOKENIZER, folder)


# SavedModel


@pytest.mark.parametrize(
    ("head", "activation"),
    [("squad", "gelu_tanh"), ("classifier", "gelu_erf"), (None, "relu"), ("squad", "gelu_erf")],
)
def test_saved_model_gives_the_predictors_logits(
    tmp_path: Path, head: str | None, activation: str
) -> None:
    config = dataclasses.replace(CONFIG, hidden_act=activation)
    save_tf(tmp_path / "bert_model.ckpt", values_for(head))
    with new_folder(tmp_path / "out") as folder:
        export_saved_model(open_model(tmp_path, config), TOKENIZER, folder)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    serve = loaded.signatures["serving_default"]
    _, inputs = serve.structured_input_signature
    assert {name: (spec.shape.as_list(), spec.dtype) for name, spec in inputs.items()} == {
        name: ([None, None], tf.int32) for name in INPUT_NAMES
    }
    variables = variables_of(tmp_path, head, config)
    for rows, seq_len in [(3, 8), (1, 16)]:
        batch = {name: random_batch(rows, seq_len, seed=rows)[name] for name in INPUT_NAMES}
        got = {name: v.numpy() for name, v in serve(**tensors(batch)).items()}
        if head is None:
            sequence = encode(variables, config, batch).numpy()
            kernel, bias = (variables[name].numpy() for name in POOLER)
            expected = {
                "sequence_output": sequence,
                "pooled_output": np.tanh(sequence[:, 0] @ kernel + bias),
            }
        else:
            logits = make_predictor(variables, ModelSpec(config, head, seq_len))(batch).numpy()
            expected = {"logits": logits}
            if head == "squad":
                expected = {"start_logits": logits[0], "end_logits": logits[1]}
            else:
                probabilities = got.pop("probabilities")
                np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
                exponentials = np.exp(logits)
                np.testing.assert_allclose(
                    probabilities, exponentials / exponentials.sum(1, keepdims=True), rtol=1e-5
                )
        assert set(got) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=2e-6, err_msg=name)
    named = {variable.name.removesuffix(":0"): variable.numpy() for variable in loaded.weights}
    assert_same(named, values_for(head))
    assert from_json_file(tmp_path / "out" / "assets.extra" / "bert_config.json") == config
    assert (tmp_path / "out" / "assets.extra" / "vocab.txt").read_bytes() == VOCAB.read_bytes()


def tensors(batch: Arrays) -> dict[str, tf.Tensor]:
    return {name: tf.constant(value) for name, value in batch.items()}


def test_a_regression_has_one_output_and_no_probabilities(tmp_path: Path) -> None:
    variables = create_variables(CONFIG, "regressor", seed=4)
    values = {name: variable.numpy() for name, variable in variables.items()}
    save_tf(tmp_path / "model" / "bert_model.ckpt", values)
    model = open_model(tmp_path / "model", CONFIG)
    assert model.is_regression
    (tmp_path / "hf").mkdir()
    export_hugging_face(model, TOKENIZER, tmp_path / "hf")
    theirs = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert theirs["problem_type"] == "regression"
    assert len(theirs["id2label"]) == 1
    (tmp_path / "served").mkdir()
    export_saved_model(model, TOKENIZER, tmp_path / "served")
    serve = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    outputs = serve(**{name: tf.constant(value) for name, value in INPUTS.items()})
    assert list(outputs) == ["logits"]
    expected = make_predictor(variables, ModelSpec(CONFIG, "regressor", 8))(INPUTS)
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-6, atol=2e-6)


def test_saved_model_without_pooler(tmp_path: Path) -> None:
    save_tf(tmp_path / "bert_model.ckpt", values_for(None, pooler=False))
    (tmp_path / "out").mkdir()
    export_saved_model(open_model(tmp_path, CONFIG), TOKENIZER, tmp_path / "out")
    serve = tf.saved_model.load(str(tmp_path / "out")).signatures["serving_default"]
    assert set(serve.structured_outputs) == {"sequence_output"}


# Folders


def fill(target: Path, **options: object) -> None:
    with new_folder(target, **options) as folder:
        (folder / "vocab.txt").write_text("new")


def refused(target: Path, words: str, **options: object) -> None:
    before = sorted(target.rglob("*")) if target.is_dir() else target.read_text()
    with pytest.raises(InputError, match=words) as caught:
        fill(target, **options)
    assert str(target) in str(caught.value)
    assert before == (sorted(target.rglob("*")) if target.is_dir() else target.read_text())
    assert not list(target.parent.glob(".*"))


def test_folders_are_made_and_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    fill(target)
    assert (target / "vocab.txt").read_text() == "new"
    (target / "vocab.txt").write_text("old")
    (target / "model.safetensors").write_text("old")
    refused(target, "not empty.*--force")
    fill(target, force=True)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"vocab.txt": "new"}
    (target / "vocab.txt").unlink()
    fill(target)
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_force_never_deletes_what_no_export_wrote(tmp_path: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    (target / "vocab.txt").write_text("old")
    refused(target, "thesis.tex", force=True)
    shutil.rmtree(target)
    target.write_text("a file")
    refused(target, "not a folder", force=True)
    refused(tmp_path / "home", "not a folder")


def test_force_never_deletes_what_is_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tf(model / "bert_model.ckpt", values_for("squad"))
    refused(model, "holds what is read", force=True, sources=[model / "bert_model.ckpt"])
    # Nor through another name for it.
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(InputError, match="holds what is read"):
        fill(tmp_path / "link", force=True, sources=[model / "bert_model.ckpt"])
    refused(model, "holds what is read", force=True, sources=[tmp_path / "link" / "vocab.txt"])
    (model / "vocab.txt").symlink_to(VOCAB)
    refused(model, "holds what is read", force=True, sources=[model / "vocab.txt"])
    (tmp_path / "vocab.txt").symlink_to(model / "bert_config.json")
    refused(model, "holds what is read", force=True, sources=[tmp_path / "vocab.txt"])


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "vocab.txt").read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_export_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out"
    fill(target)
    (target / "vocab.txt").write_text("old")

    def interrupted() -> None:
        with new_folder(target, force=True) as folder:
            (folder / "vocab.txt").write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert (target / "vocab.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    fill(target)
    (target / "vocab.txt").write_text("old")
    rename = Path.rename

    def fail_for_the_new(path: Path, to: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError("busy")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="busy"):
        fill(target, force=True)
    assert (target / "vocab.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        fill(tmp_path / "file" / "out")


@pytest.mark.parametrize("between", [False, True])
def test_what_a_killed_export_left_goes_and_the_old_one_comes_back(
    tmp_path: Path, between: bool
) -> None:
    target = tmp_path / "out"
    fill(target)
    (tmp_path / ".out.4711.tmp").mkdir()
    (tmp_path / ".out.4711.tmp" / "model.safetensors").write_text("half")
    (tmp_path / ".out.notes.tmp.txt").write_text("of the user")
    (tmp_path / ".out.before_march.old").mkdir()
    if between:
        (target / "vocab.txt").write_text("old")
        target.rename(tmp_path / ".out.abc_12x9.old")
        with pytest.raises(InputError, match="not empty"):
            fill(target)
        assert (target / "vocab.txt").read_text() == "old"
    fill(target, force=True)
    assert (target / "vocab.txt").read_text() == "new"
    of_the_user = {".out.notes.tmp.txt", ".out.before_march.old"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", *of_the_user}


def test_an_export_at_work_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as first:
        fill(target)
        assert first.is_dir()
        shutil.rmtree(target)
        (first / "vocab.txt").write_text("first")
    assert (target / "vocab.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interruption_between_two_renames_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    fill(target)
    (target / "vocab.txt").write_text("old")
    rename = Path.rename

    def interrupt(path: Path, to: Path) -> Path:
        if path.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fill(target, force=True)
    assert (target / "vocab.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
