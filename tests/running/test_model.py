"""Tests of the weights that bertbench.running.model begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertbench.core.workload import Workload
from bertbench.running.model import Model, load_initial_weights
from finetune.errors import InputError
from helpers.model_folders import CONFIG as VALUES
from helpers.model_folders import write_json
from helpers.tiny_models import CONFIG, NUM_LABELS, Arrays
from helpers.weight_files import (
    POOLER,
    hugging_face_arrays,
    model,
    random_values,
    save_safetensors,
    save_tf,
)

HEAD = ("output_weights", "output_bias")
LABELS = ("contradiction", "entailment", "neutral")


def save_head(folder: Path, values: Arrays | None = None, **config: Any) -> Arrays:
    """A classifier of Hugging Face's; returns its weights."""
    values = random_values("classifier") if values is None else values
    save_safetensors(folder, hugging_face_arrays(values))
    write_json(folder / "config.json", {**VALUES, **config})
    return values


def run_model(variables: dict[str, Any], head: str) -> Model:
    return Model(Workload("tiny", CONFIG, head, 8), variables)


def loaded(folder: Path, *, trains: bool, labels: tuple[str, ...] = LABELS) -> dict[str, Any]:
    variables = model("classifier", num_labels=len(labels))
    load_initial_weights(run_model(variables, "classifier"), folder, labels, trains=trains)
    return variables


@pytest.mark.parametrize("trains", [True, False])
def test_rows_are_brought_into_the_tasks_order(
    tmp_path: Path, trains: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = {"0": "ENTAILMENT", "1": "NEUTRAL", "2": "CONTRADICTION"}
    values = save_head(tmp_path, id2label=theirs)
    variables = loaded(tmp_path, trains=trains)
    for name in HEAD:
        np.testing.assert_array_equal(variables[name], values[name][[2, 0, 1]])
    said = capfd.readouterr().err
    assert "the classifier's rows are put in the order contradiction, entailment, neutral" in said


def test_rows_of_a_run_follow_its_record(tmp_path: Path) -> None:
    values = random_values("classifier")
    save_tf(tmp_path, values)
    write_json(tmp_path / "run.json", {"labels": ["neutral", "entailment", "contradiction"]})
    # By its folder, and by the checkpoint in it.
    for source in (tmp_path, tmp_path / "model.ckpt-0"):
        variables = loaded(source, trains=False)
        for name in HEAD:
            np.testing.assert_array_equal(variables[name], values[name][::-1])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, ""),
        ({"0": "contradiction", "1": "entailment", "2": "neutral"}, ""),
        ({"0": "a", "1": "b", "2": "c"}, "a, b, c are taken for contradiction, entailment, neut"),
    ],
)
def test_rows_stay_where_nothing_tells_their_order(
    tmp_path: Path, labels: dict[str, str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    values = save_head(tmp_path, id2label=labels)
    variables = loaded(tmp_path, trains=False)
    for name in HEAD:
        np.testing.assert_array_equal(variables[name], values[name])
    said = capfd.readouterr().err
    assert words in said
    assert ("warning" in said) == bool(words)


def without_pooler() -> Arrays:
    return {name: v for name, v in random_values("classifier").items() if name not in POOLER}


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        (None, {"id2label": {"0": "neutral", "1": "entailment", "2": "other"}}, "has the labels"),
        (random_values("classifier", num_labels=2), {"id2label": {"0": "a", "1": "b"}},
         r"the weights' classifier \(a, b\) has another number of outputs than 3"),
        (None, {"id2label": {"0": "a", "1": "b", "5": "c"}}, "ids of id2label are not 0 to 2"),
        (without_pooler(), {}, "the weights have no pooler, which a classifier needs"),
        (None, {"architectures": ["BertForTokenClassification"]}, "it is of a BertForTokenClassif"),
        (None, {"problem_type": "multi_label_classification"}, "multi_label_classification"),
    ],
)  # fmt: skip
def test_a_head_of_something_else_is_refused_unless_it_is_trained(
    tmp_path: Path, values: Arrays | None, config: dict[str, Any], message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_head(tmp_path, values, **config)
    with pytest.raises(InputError, match=message) as caught:
        loaded(tmp_path, trains=False)
    assert str(tmp_path) in str(caught.value)
    capfd.readouterr()
    assert len(LABELS) == NUM_LABELS
    variables = loaded(tmp_path, trains=True)
    said = capfd.readouterr().err
    assert message.replace("\\", "") in said
    if "architectures" in config or "problem_type" in config:
        fresh = model("classifier")
        np.testing.assert_array_equal(variables["output_weights"], fresh["output_weights"])


def test_an_encoder_alone_may_lack_its_pooler(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_head(tmp_path, {n: v for n, v in without_pooler().items() if n not in HEAD})
    loaded(tmp_path, trains=False)
    assert "pooler" not in capfd.readouterr().err
    loaded(tmp_path, trains=True)
    assert "have no pooler, which a classifier needs: training starts" in capfd.readouterr().err


def test_a_squad_model_needs_neither_pooler_nor_labels(tmp_path: Path) -> None:
    values = {n: v for n, v in random_values("squad").items() if n not in POOLER}
    save_safetensors(tmp_path, hugging_face_arrays(values))
    write_json(tmp_path / "config.json", {**VALUES, "id2label": {"0": "a", "5": "a"}})
    report = load_initial_weights(run_model(model(), "squad"), tmp_path, (), trains=False)
    assert report.initialised == POOLER
