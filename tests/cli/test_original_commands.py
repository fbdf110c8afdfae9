"""The command lines of the original's README, typed as they stand there.

Only `python run_classifier.py` and `python run_squad.py` are replaced by `bertbench run …`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.model.modeling import create_variables
from finetune.spec.config import from_json_file, to_original_json
from finetune.tasks.demo_data import demo_files
from finetune.train.checkpoints import save_weights
from helpers.command_line import with_unanswerable_questions
from helpers.paths import REPOSITORY


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the README's variables name, with the demo's data and a tiny model."""
    root = tmp_path_factory.mktemp("world")
    demo = demo_files()
    model = root / "uncased_L-2_H-64_A-2"
    config = dataclasses.replace(from_json_file(demo.bert_config_file), max_position_embeddings=512)
    prefix = save_weights(model, create_variables(config, "classifier", seed=1), 0)
    for suffix in (".index", ".data-00000-of-00001"):
        os.replace(f"{prefix}{suffix}", model / f"bert_model.ckpt{suffix}")
    (model / "checkpoint").unlink()
    (model / "bert_config.json").write_text(to_original_json(config))
    shutil.copy(demo.vocab_file, model / "vocab.txt")
    shutil.copytree(demo.mrpc_dir, root / "glue" / "MRPC")
    squad = root / "squad"
    squad.mkdir()
    shutil.copy(demo.squad_train, squad / "train-v1.1.json")
    shutil.copy(demo.squad_dev, squad / "dev-v1.1.json")
    with_unanswerable_questions(demo.squad_train, squad / "train-v2.0.json")
    with_unanswerable_questions(demo.squad_dev, squad / "dev-v2.0.json")
    return root


def shell(world: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user's shell does; `bertbench` is the one under test."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "BERT_BASE_DIR": str(world / "uncased_L-2_H-64_A-2"),
        "BERT_LARGE_DIR": str(world / "uncased_L-2_H-64_A-2"),
        "GLUE_DIR": str(world / "glue"),
        "SQUAD_DIR": str(world / "squad"),
        "TRAINED_CLASSIFIER": str(world / "mrpc_output"),
    }
    function = f'bertbench() {{ "{sys.executable}" -m bertbench "$@"; }}\n'
    result = subprocess.run(
        ["bash", "-c", function + command], cwd=world, env=environment, check=False,
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def test_sentence_pair_classification(world: Path) -> None:
    shell(
        world,
        r"""
bertbench run classifier \
  --task_name=MRPC \
  --do_train=true \
  --do_eval=true \
  --data_dir=$GLUE_DIR/MRPC \
  --vocab_file=$BERT_BASE_DIR/vocab.txt \
  --bert_config_file=$BERT_BASE_DIR/bert_config.json \
  --init_checkpoint=$BERT_BASE_DIR/bert_model.ckpt \
  --max_seq_length=128 \
  --train_batch_size=32 \
  --learning_rate=2e-5 \
  --num_train_epochs=3.0 \
  --output_dir=mrpc_output/
""",
    )
    lines = (world / "mrpc_output" / "eval_results.txt").read_text().splitlines()
    assert {"eval_accuracy", "eval_loss", "global_step", "loss"} <= {
        line.partition(" = ")[0] for line in lines
    }
    # 40 examples: int(40 / 32 * 3) steps.
    assert "global_step = 3" in lines
    values = dict(line.split(" = ") for line in lines)
    assert values["loss"] == values["eval_loss"]


def test_prediction_from_classifier(world: Path) -> None:
    """Needs the folder that the test above leaves."""
    if not (world / "mrpc_output").is_dir():
        test_sentence_pair_classification(world)
    result = shell(
        world,
        r"""
bertbench run classifier \
  --task_name=MRPC \
  --do_predict=true \
  --data_dir=$GLUE_DIR/MRPC \
  --vocab_file=$BERT_BASE_DIR/vocab.txt \
  --bert_config_file=$BERT_BASE_DIR/bert_config.json \
  --init_checkpoint=$TRAINED_CLASSIFIER \
  --max_seq_length=128 \
  --output_dir=mrpc_predictions/
""",
    )
    assert "weights: 41 of 41 from model.ckpt-3" in result.stderr
    assert "random" not in result.stderr
    rows = (world / "mrpc_predictions" / "test_results.tsv").read_text().splitlines()
    assert [len(row.split("\t")) for row in rows] == [2] * 6


@pytest.mark.slow
def test_squad_1(world: Path) -> None:
    shell(
        world,
        r"""
bertbench run squad \
  --vocab_file=$BERT_BASE_DIR/vocab.txt \
  --bert_config_file=$BERT_BASE_DIR/bert_config.json \
  --init_checkpoint=$BERT_BASE_DIR/bert_model.ckpt \
  --do_train=True \
  --train_file=$SQUAD_DIR/train-v1.1.json \
  --do_predict=True \
  --predict_file=$SQUAD_DIR/dev-v1.1.json \
  --train_batch_size=12 \
  --learning_rate=3e-5 \
  --num_train_epochs=2.0 \
  --max_seq_length=384 \
  --doc_stride=128 \
  --output_dir=squad_base/
""",
    )
    predictions = "squad_base/predictions.json"
    scored = shell(world, f"bertbench eval squad $SQUAD_DIR/dev-v1.1.json {predictions}")
    results = (world / "squad_base" / "eval_results.txt").read_text()
    assert sorted(scored.stdout.splitlines()) == sorted(results.splitlines())


def test_squad_2_and_its_threshold(world: Path) -> None:
    shared = r"""
bertbench run squad \
  --vocab_file=$BERT_LARGE_DIR/vocab.txt \
  --bert_config_file=$BERT_LARGE_DIR/bert_config.json \
  --init_checkpoint=$BERT_LARGE_DIR/bert_model.ckpt \
  --train_file=$SQUAD_DIR/train-v2.0.json \
  --do_predict=True \
  --predict_file=$SQUAD_DIR/dev-v2.0.json \
  --train_batch_size=24 \
  --learning_rate=3e-5 \
  --num_train_epochs=2.0 \
  --max_seq_length=384 \
  --doc_stride=128 \
  --output_dir=squad_large/ \
  --version_2_with_negative=True \
  --use_tpu=False --nouse_tpu --iterations_per_loop=1000 --noverbose_logging """
    shell(world, shared + "--do_train=True")
    shell(
        world,
        "bertbench eval squad $SQUAD_DIR/dev-v2.0.json squad_large/predictions.json "
        "--na-prob-file squad_large/null_odds.json --out-file squad_large/scores.json",
    )
    threshold = json.loads((world / "squad_large/scores.json").read_text())["best_f1_thresh"]
    predictions = world / "squad_large" / "predictions.json"
    trained = (world / "squad_large" / "null_odds.json").read_bytes()
    predictions.unlink()
    result = shell(
        world,
        f"THRESH={threshold!r}\n{shared} --do_train=False --null_score_diff_threshold=$THRESH",
    )
    # The weights are those that training left, although --init_checkpoint names others.
    assert "model.ckpt-3" in result.stderr
    assert (world / "squad_large" / "null_odds.json").read_bytes() == trained
    assert predictions.is_file()
