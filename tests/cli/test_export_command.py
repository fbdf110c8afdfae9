"""Tests of `bertbench export`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from bertbench.cli import main
from finetune.export import export_weights
from finetune.model.weights import open_tf_checkpoint
from finetune.spec.config import from_json_file, to_original_json
from finetune.tasks.demo_data import demo_files
from helpers.command_line import bertbench
from helpers.exports import VOCAB, assert_same, save_tf
from helpers.weight_files import hugging_face_arrays, random_values


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a run of a classifier leaves: two checkpoints, and a record that names its labels."""
    folder = tmp_path / "run"
    config = from_json_file(demo_files().bert_config_file)
    for step in (5, 10):
        values = random_values("classifier", config, seed=step)
        save_tf(folder / f"model.ckpt-{step}", values)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-10"\n')
    (folder / "bert_config.json").write_text(to_original_json(config))
    shutil.copy(VOCAB, folder)
    record = {"do_lower_case": False, "labels": ["a", "b", "c"], "init_checkpoint": "uncased_L-2"}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def export_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> object:
    """Runs the command in this process: exit code, standard output, standard error."""
    for name in ("CUDA_VISIBLE_DEVICES", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["export", *map(str, arguments)])
        output, errors = capfd.readouterr()
        return ended.value.code, output, errors

    return run


def test_command_on_a_runs_folder(tmp_path: Path, run_folder: Path) -> None:
    """In a process of its own: nothing of TensorFlow's chatter may be seen, and JSON is alone."""
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-m", "bertbench", "export", run_folder, "--to", out, "--format",
         "huggingface", "--json", "-"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stderr == ""
    told = json.loads(result.stdout)
    config = from_json_file(run_folder / "bert_config.json")
    values = random_values("classifier", config, seed=10)
    assert_same(load_file(out / "model.safetensors"), hugging_face_arrays(values))
    assert told["checkpoint"] == str(run_folder / "model.ckpt-10")
    assert (told["head"], told["num_labels"], told["pooler"]) == ("classifier", 3, True)
    assert told["parameters"] == sum(value.size for value in values.values())
    assert told["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert told["left_out"] == []
    # The record counts for more than the name of the model that the run began with.
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["do_lower_case"] is False
    assert json.loads((out / "config.json").read_text())["id2label"] == {
        "0": "a", "1": "b", "2": "c",
    }  # fmt: skip


def test_saved_model_by_command_opens_without_this_package(
    tmp_path: Path, run_folder: Path
) -> None:
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-m", "bertbench", "export", run_folder, "--to", out, "--format",
         "savedmodel"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stderr == ""
    assert result.stdout.startswith(f"{out}: classifier model of ")
    program = (
        "import sys, tensorflow as tf\n"
        "serve = tf.saved_model.load(sys.argv[1]).signatures['serving_default']\n"
        "x = tf.constant([[2, 7, 9, 3], [2, 8, 3, 0]])\n"
        "ones, zeros = tf.ones_like(x), tf.zeros_like(x)\n"
        "print(serve(input_ids=x, input_mask=ones, segment_ids=zeros)['probabilities'].shape)\n"
        "assert not {'finetune', 'bertbench'} & set(sys.modules)\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program, out], capture_output=True, text=True, check=True
    )
    assert loaded.stdout == "(2, 3)\n"
    assert "gradient" not in loaded.stderr


def test_command_takes_the_checkpoint_that_it_is_told(
    tmp_path: Path, run_folder: Path, export_here: object
) -> None:
    config = from_json_file(run_folder / "bert_config.json")
    for number, name in enumerate(["5", "model.ckpt-5", str(run_folder / "model.ckpt-5")]):
        out = tmp_path / f"out-{number}"
        code, output, _ = export_here(
            run_folder, "--to", out, "--format", "checkpoint", "--checkpoint", name
        )
        assert code == 0
        assert output.startswith(f"{out}: classifier model")
        shapes, read = open_tf_checkpoint(out / "bert_model.ckpt")
        assert_same(
            {name: read(name) for name in shapes}, random_values("classifier", config, seed=5)
        )
    code, _, errors = export_here(
        run_folder, "--to", tmp_path / "x", "--format", "checkpoint", "--checkpoint", "7"
    )
    assert code == 2
    assert "no checkpoint of step 7; there are checkpoints of steps 5, 10" in errors


def test_command_reads_case_and_labels_where_they_are(
    tmp_path: Path, run_folder: Path, export_here: object
) -> None:
    def tried(*more: str) -> tuple[int, object, str]:
        out = tmp_path / "out"
        code, _, errors = export_here(
            model, "--to", out, "--format", "huggingface", "--force", *more
        )
        path = out / "tokenizer_config.json"
        case = json.loads(path.read_text())["do_lower_case"] if code == 0 else None
        shutil.rmtree(out, ignore_errors=True)
        return code, case, errors

    model = run_folder
    code, case, errors = tried("--do_lower_case")
    assert (code, case) == (0, True)
    assert f"do_lower_case is True by the flag, and False by {model / 'run.json'}" in errors
    # An older record: the name of what the run began with.
    (model / "run.json").write_text(json.dumps({"init_checkpoint": "models/uncased_L-2"}))
    code, case, errors = tried()
    assert (code, case) == (0, True)
    assert "do_lower_case is True, guessed from the name models/uncased_L-2" in errors
    (model / "run.json").write_text(json.dumps({"init_checkpoint": None}))
    code, _, errors = tried()
    assert code == 2
    assert "--do_lower_case=true or --do_lower_case=false" in errors
    assert len(errors.splitlines()) == 1
    (model / "run.json").write_text("{")
    assert tried()[0] == 2
    (model / "run.json").write_text(json.dumps({"do_lower_case": True, "labels": ["a", "b"]}))
    code, _, errors = tried()
    assert code == 2
    assert "2 labels are named for a classifier of 3" in errors
    # A name, where there is no record at all.
    (model / "run.json").unlink()
    model = run_folder.rename(tmp_path / "cased_L-2")
    assert tried()[:2] == (0, False)


def test_command_on_the_best_weights_of_a_run(
    tmp_path: Path, run_folder: Path, export_here: object
) -> None:
    best = run_folder / "best"
    best.mkdir()
    for name in ("bert_config.json", "vocab.txt"):
        shutil.copy(run_folder / name, best)
    for path in run_folder.glob("model.ckpt-5*"):
        path.rename(best / path.name)
    (best / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-5"\n')
    out = tmp_path / "out"
    assert export_here(best, "--to", out, "--format", "huggingface")[0] == 0
    assert list(json.loads((out / "config.json").read_text())["label2id"]) == ["a", "b", "c"]


def test_command_on_its_own_hugging_face_export(
    tmp_path: Path, run_folder: Path, export_here: object
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert export_here(run_folder, "--to", first, "--format", "huggingface")[0] == 0
    assert export_here(first, "--to", second, "--format", "huggingface")[0] == 0
    for path in first.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name
    assert export_here(second, "--to", third, "--format", "checkpoint")[0] == 0
    config = json.loads((third / "bert_config.json").read_text())
    assert config.pop("id2label") == {"0": "a", "1": "b", "2": "c"}
    assert config.pop("label2id") == {"a": 0, "b": 1, "c": 2}
    assert config == json.loads((run_folder / "bert_config.json").read_text())
    assert json.loads((third / "tokenizer_config.json").read_text())["do_lower_case"] is False
    # The same tensors may be a head that scores each token.
    config = json.loads((first / "config.json").read_text())
    config["architectures"] = ["BertForTokenClassification"]
    (first / "config.json").write_text(json.dumps(config))
    code, _, errors = export_here(first, "--to", tmp_path / "x", "--format", "savedmodel")
    assert code == 2
    assert "its head does not put each text into one class (it is of a BertForTokenClass" in errors


def test_command_refuses_in_one_line(
    tmp_path: Path, run_folder: Path, export_here: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "vocab.txt").write_text("old")
    to_out = ("--to", out, "--format", "checkpoint")

    def refuses(words: str, *arguments: str | Path, code: int = 2) -> None:
        got, output, errors = export_here(*arguments)
        assert (got, output) == (code, "")
        assert words in errors
        assert len(errors.splitlines()) == 1
        assert (out / "vocab.txt").read_text() == "old"

    refuses("not empty", run_folder, *to_out)
    refuses("no such model folder", tmp_path / "nowhere", *to_out)
    refuses("holds what is read", run_folder, "--to", run_folder, "--format", "checkpoint",
            "--force")  # fmt: skip
    refuses("pickle", run_folder, "--to", out, "--format", "pickle")
    (run_folder / "other.txt").write_text(
        "[PAD]\n[UNK]\n[CLS]\n[SEP]\n" + "".join(f"{n}\n" for n in range(2000))
    )
    refuses("the vocabulary has 2004 entries but the model only", run_folder, *to_out,
            "--vocab_file", run_folder / "other.txt")  # fmt: skip

    def disk_full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_weights, "export_checkpoint", disk_full)
    refuses("No space left on device", run_folder, *to_out, "--force", code=1)
    # A vocabulary or configuration that lies elsewhere can be named.
    (run_folder / "vocab.txt").unlink()
    refuses("--vocab_file", run_folder, *to_out)


def test_help_has_an_example() -> None:
    result = bertbench("export", "--help")
    assert "Usage: bertbench" in result.stdout
    assert "bertbench export squad_out --to squad_hf --format huggingface" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
