"""A model that gives no numbers: never a score, never a file of NaN, always one line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from bertbench.core.errors import NotFiniteError, WorkError
from bertbench.core.workload import Workload
from bertbench.running.classifier import score_logits
from bertbench.running.model import Model
from bertbench.running.predict import check_finite, make_predict
from finetune.model.modeling import create_variables
from finetune.spec.config import INPUT_NAMES, from_json_file
from finetune.tasks.classification import ClassificationData, ClassificationFeatures
from finetune.tasks.demo_data import demo_files
from finetune.train.checkpoints import list_checkpoints, save_weights
from finetune.train.evaluation import EVAL_LOG_NAME, Evaluation
from finetune.train.training_loop import Schedule, train
from helpers.command_line import bertbench, classifier_arguments, squad_arguments
from helpers.tiny_models import CONFIG, random_batch, tiny_trainer

SEQ_LEN = 16


def test_weights_that_are_no_numbers_are_named() -> None:
    variables = create_variables(CONFIG, "regressor")
    workload = Workload("tiny", CONFIG, "regressor", SEQ_LEN, 1)
    predict = make_predict(Model(workload, variables), 2)
    batch = {name: value for name, value in random_batch(5, SEQ_LEN).items() if name in INPUT_NAMES}
    assert np.isfinite(predict(batch, lambda done, of: None)).all()
    # A word that the third example alone has.
    batch["input_ids"] = np.where(batch["input_ids"] == 30, 29, batch["input_ids"])
    batch["input_ids"][2, 0] = 30
    words = variables["bert/embeddings/word_embeddings"].numpy()
    words[30] = math.nan
    variables["bert/embeddings/word_embeddings"].assign(words)
    with pytest.raises(NotFiniteError, match="for 1 of 5 inputs, first for number 3: its weights"):
        predict(batch, lambda done, of: None)


def test_one_infinite_number_is_enough() -> None:
    logits = np.zeros((3, 2), np.float32)
    check_finite(logits)
    check_finite(logits[:0])
    for value in (math.inf, -math.inf, math.nan):
        logits[1, 1] = value
        with pytest.raises(WorkError, match="1 of 3 inputs, first for number 2"):
            check_finite(logits)


@pytest.mark.parametrize("task", ["classifier", "squad"])
def test_a_run_ends_with_one_line_and_no_scores(tmp_path: Path, task: str) -> None:
    demo = demo_files()
    variables = create_variables(from_json_file(demo.bert_config_file), task)
    for variable in variables.values():
        variable.assign(np.full(variable.shape, math.nan, np.float32))
    weights = save_weights(tmp_path / "weights", variables, 1)
    table = tmp_path / "dev.tsv"
    table.write_text("text\tlabel\na\tno\nb\tyes\n")
    given = ["--init_checkpoint", weights]
    output = tmp_path / "out"
    result = bertbench(
        *(
            squad_arguments(output, *given, "--predict_file", demo.squad_dev)
            if task == "squad"
            else classifier_arguments(
                output, *given, "--labels", "no,yes", "--dev_file", table, "--test_file", table
            )
        )
    )
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    assert "output is not finite for" in result.stderr.splitlines()[-1]
    assert "accuracy" not in result.stdout
    assert not [path for path in output.glob("*") if path.name not in ("run.json",)]


def test_losses_of_large_logits_stay_finite() -> None:
    logits = np.array([[3e38, -3e38], [-3e38, 3e38]], np.float32)
    ids = np.zeros((2, 4), np.int32)
    features = ClassificationFeatures(ids, ids, ids, np.array([0, 0], np.int32))
    data = ClassificationData("t", ("a", "b"), ("accuracy",), {})
    assert score_logits(data, features, logits)["loss"] == pytest.approx(3e38, rel=1e-6)
    values = dataclasses.replace(features, label_values=np.array([0.0, 1.0], np.float32))
    data = ClassificationData("t", (), ("pearson",), {})
    assert score_logits(data, values, logits[:, :1])["loss"] == pytest.approx(9e76, rel=1e-6)


def test_an_evaluation_without_numbers_saves_neither_weights_nor_score(tmp_path: Path) -> None:
    trainer = tiny_trainer("squad", SEQ_LEN)
    schedule = Schedule(4, 4, 4, seed=0, save_checkpoints_steps=1)
    broken = Evaluation(lambda: {"f1": 1.0, "loss": math.nan}, 2, "f1", keep_best=True)
    with pytest.raises(FloatingPointError, match=r"evaluation's loss is nan after step 2"):
        train(trainer, random_batch(6, SEQ_LEN), schedule, tmp_path, evaluation=broken)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model.ckpt-1"]
    assert not (tmp_path / EVAL_LOG_NAME).exists()
    assert not (tmp_path / "best").exists()
