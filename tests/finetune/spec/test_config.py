"""Tests of finetune.spec.config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import InputError
from finetune.spec.config import (
    HEADS,
    PRESETS,
    BertConfig,
    from_json_file,
    from_mapping,
    is_trained,
    parameter_count,
    preset,
    to_original_json,
    variable_shapes,
)

# As published with BERT-Base, uncased.
ORIGINAL = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
HUGGING_FACE = {
    **ORIGINAL,
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "use_cache": True,
}


def write(path: Path, raw: object) -> Path:
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def test_both_families(tmp_path: Path) -> None:
    original = from_json_file(write(tmp_path / "bert_config.json", ORIGINAL))
    assert original == preset("bert-base") == BertConfig()
    theirs = from_json_file(str(write(tmp_path / "config.json", HUGGING_FACE)))
    assert theirs == dataclasses.replace(original, hidden_act="gelu_erf")


@pytest.mark.parametrize(
    ("marks", "hidden_act", "expected"),
    [
        ({}, "gelu", "gelu_tanh"),
        ({"model_type": "bert"}, "gelu", "gelu_erf"),
        ({"architectures": ["BertModel"]}, "gelu", "gelu_erf"),
        ({"model_type": "bert"}, "gelu_new", "gelu_tanh"),
        ({"model_type": "bert"}, "gelu_pytorch_tanh", "gelu_tanh"),
        ({"model_type": "bert"}, "gelu_fast", "gelu_tanh"),
        ({"model_type": "bert"}, "gelu_python", "gelu_erf"),
        ({"model_type": "bert"}, "relu", "relu"),
        ({}, "relu", "relu"),
        ({}, None, "gelu_tanh"),  # not in the file
        ({"model_type": "bert"}, None, "gelu_erf"),
    ],
)
def test_meaning_of_gelu(marks: dict[str, Any], hidden_act: str | None, expected: str) -> None:
    raw = {**ORIGINAL, **marks, "hidden_act": hidden_act}
    if hidden_act is None:
        del raw["hidden_act"]
    assert from_mapping(raw).hidden_act == expected


@pytest.mark.parametrize("hidden_act", ["gelu_tanh", "gelu_erf", "relu"])
def test_round_trip(tmp_path: Path, hidden_act: str) -> None:
    config = BertConfig(99, 8, 3, 2, 16, hidden_act, 0.0, 0.3, 40, 1, 0.1, 1e-5)
    path = tmp_path / "bert_config.json"
    path.write_text(to_original_json(config))
    assert from_json_file(path) == config
    expected = "gelu" if hidden_act == "gelu_tanh" else hidden_act
    assert json.loads(path.read_text())["hidden_act"] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"vocab_size": 3,\n  oops}', r"bert_config\.json:2: not JSON"),
        (b"", r"bert_config\.json:1: not JSON"),
        (b"\xff\xfe", r"bert_config\.json:1: not UTF-8 text"),
        (b"[3]", r"bert_config\.json: a list, .*not a JSON object"),
        (b"{}", r"bert_config\.json: vocab_size is missing"),
        (b'{"a":' * 100_000, r"bert_config\.json: not JSON \(nested"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bert_config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        from_json_file(path)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(InputError, match="cannot read the model configuration"):
            from_json_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "768"}, "hidden_size must be a positive integer, not '768'"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000, and at most 1,000"),
        ({"vocab_size": 2**31}, "vocab_size is 2,147,483,648, and at most"),
        ({"hidden_size": 12 * 10**6}, "a model of .* parameters, and at most 400,000,000,000"),
        ({"hidden_size": 768.0}, "hidden_size must be a positive integer"),
        ({"hidden_size": 770}, "hidden_size 770 is not a multiple of num_attention_heads 12"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"num_attention_heads": None}, "num_attention_heads must be"),
        ({"vocab_size": -1}, "vocab_size must be"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not supported; use gelu or relu"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\)"),
        ({"attention_probs_dropout_prob": "0.1"}, "attention_probs_dropout_prob must be"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob must be"),
        ({"initializer_range": "0.02"}, "initializer_range must be"),
        ({"initializer_range": -0.02}, "initializer_range must be"),
        ({"layer_norm_eps": None}, "layer_norm_eps must be"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be"),
        ({"model_type": "roberta"}, "model_type is 'roberta', not 'bert'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key', and only absolute position"),
        ({"is_decoder": True}, "is_decoder is True, which BERT's encoder does not have"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"feed_forward_type": "geglu"}, "feed_forward_type is 'geglu'"),
        ({"embedding_size": 128}, "embedding_size is not hidden_size"),
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map names code of its own for AutoM"),
        ({"auto_map": 5}, "auto_map is 5, not an object"),
        ({"auto_map": [1]}, r"auto_map is \[1\], not an object"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ({"classifier_dropout": 1.5}, r"classifier_dropout must be in \[0, 1\)"),
    ],
)
def test_values_that_make_no_model(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "config.json", {**ORIGINAL, **change})
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        from_json_file(path)


def test_keys_that_change_nothing_are_silent_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harmless = {
        "is_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 64,
        "pruned_heads": {}, "torch_dtype": "float16", "dtype": "bfloat16", "use_cache": True,
        "tie_word_embeddings": True, "gradient_checkpointing": False, "bos_token_id": None,
        "id2label": {"0": "LABEL_0"}, "_name_or_path": "x", "_commit_hash": "x",
        "pooler_type": "first_token_transform", "directionality": "bidi", "initializer_range": 0.1,
        "auto_map": None, "classifier_dropout": None, "problem_type": None, "embedding_size": None,
        "model_type": None,
    }  # fmt: skip
    path = write(tmp_path / "config.json", {**HUGGING_FACE, **harmless})
    expected = BertConfig(hidden_act="gelu_erf", initializer_range=0.1)
    assert from_json_file(path) == expected
    assert caplog.text == ""
    write(path, {**HUGGING_FACE, "attention_window": 5, "alpha": 1})
    from_json_file(path)
    assert f"{path}: keys that are not used: alpha, attention_window" in caplog.text


def test_a_classifiers_own_dropout_rate(tmp_path: Path) -> None:
    config = from_json_file(write(tmp_path / "config.json", {**ORIGINAL, "classifier_dropout": 0}))
    assert config.classifier_dropout == 0
    path = tmp_path / "again.json"
    path.write_text(to_original_json(config))
    assert from_json_file(path) == config
    assert config.without_dropout() == BertConfig().without_dropout()
    # Where none is set, nothing is written: names in ledgers and records stay as they were.
    assert "classifier_dropout" not in BertConfig().values()


# Counted by hand for hidden size h, l layers, v words, feed-forward 4h:
# (v + 514) h + 2h for the embeddings, l (12 h^2 + 13 h) for the layers, h^2 + h for the pooler.
@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("bert-tiny", 4_385_920),
        ("bert-mini", 11_170_560),
        ("bert-small", 28_763_648),
        ("bert-medium", 41_373_184),
        ("bert-base", 109_482_240),
        ("bert-base-cased", 108_310_272),
        ("bert-large", 335_141_888),
        ("bert-large-cased", 333_579_264),
    ],
)
def test_parameters_of_published_models(name: str, encoder: int) -> None:
    config = preset(name)
    h, layers, v = config.hidden_size, config.num_hidden_layers, config.vocab_size
    by_hand = (v + 514) * h + 2 * h + layers * (12 * h * h + 13 * h) + h * h + h
    assert by_hand == encoder
    assert parameter_count(config, "squad") == encoder + 2 * h + 2
    assert parameter_count(config, "classifier", 3) == encoder + 3 * h + 3


def test_published_sizes() -> None:
    large = preset("BERT_Large_uncased")
    assert large is PRESETS["bert-large"] is preset("bert-large-uncased")
    assert (large.num_hidden_layers, large.hidden_size, large.num_attention_heads) == (24, 1024, 16)
    assert large.head_size == 64
    with pytest.raises(InputError, match="unknown model 'bert-huge'; known models: bert-tiny, "):
        preset("bert-huge")


def test_variables_of_the_heads() -> None:
    squad, classifier, regressor = (variable_shapes(BertConfig(), head, 5) for head in HEADS)
    assert len(squad) == len(classifier) == len(regressor) == 5 + 16 * 12 + 2 + 2
    assert squad["cls/squad/output_weights"] == [2, 768]
    assert classifier["output_weights"] == [5, 768]
    assert regressor["output_weights"] == [1, 768]
    assert squad["bert/encoder/layer_11/intermediate/dense/kernel"] == [768, 3072]
    assert squad["bert/encoder/layer_11/output/dense/kernel"] == [3072, 768]
    assert squad["bert/embeddings/position_embeddings"] == [512, 768]
    untrained = [name for name in squad if not is_trained(name, "squad")]
    assert untrained == ["bert/pooler/dense/kernel", "bert/pooler/dense/bias"]
    assert all(is_trained(name, "classifier") for name in classifier)
    with pytest.raises(InputError, match="unknown task head 'tagger'; use one of squad, classi"):
        variable_shapes(BertConfig(), "tagger")


def test_without_dropout() -> None:
    config = BertConfig().without_dropout()
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0, 0)
    assert (
        dataclasses.replace(config, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        == BertConfig()
    )
