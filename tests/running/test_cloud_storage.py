"""Runs from and to cloud storage, with `file://` addresses in its place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from bertbench.cli.options.original_flags import local_files
from bertbench.core.errors import WorkError
from bertbench.running.output.cloud_storage import (
    fetch_file,
    fetch_folder,
    fetch_weights,
    is_url,
    open_remote_folder,
)
from finetune.errors import InputError
from finetune.tasks.demo_data import demo_files
from finetune.train.training_loop import read_log
from helpers.command_line import bertbench


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    url = f"file://{tmp_path}/bucket"
    tf.io.gfile.makedirs(f"{url}/folder/inner")
    for name in ("a.txt", "folder/b.txt", "folder/inner/c.txt"):
        put(f"{url}/{name}", name)
    return url


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return tmp_path / "staging"


def put(url: str, text: str) -> None:
    with tf.io.gfile.GFile(url, "w") as file:
        file.write(text)


def get(url: str) -> str:
    with tf.io.gfile.GFile(url) as file:
        return str(file.read())


def test_addresses() -> None:
    assert is_url("gs://some_bucket/squad_large/")
    for path in ("/tmp/squad", "squad", "C:\\data", "a:b", "./gs:/x", ""):
        assert not is_url(path)


def test_files_and_folders_keep_their_names(staging: Path, bucket: str) -> None:
    path = fetch_file(f"{bucket}/a.txt", staging)
    assert path.relative_to(staging).parts[-2:] == ("bucket", "a.txt")
    assert path.read_text() == "a.txt"
    folder = fetch_folder(f"{bucket}/folder", staging)
    assert folder.relative_to(staging).parts[-2:] == ("bucket", "folder")
    assert (folder / "b.txt").read_text() == "folder/b.txt"
    assert (folder / "inner" / "c.txt").read_text() == "folder/inner/c.txt"
    with pytest.raises(InputError, match="no such file"):
        fetch_file(f"{bucket}/missing", staging)
    with pytest.raises(InputError, match="no such folder"):
        fetch_folder(f"{bucket}/missing", staging)
    with pytest.raises(InputError, match="not a plain address"):
        fetch_file(f"{bucket}/folder/../a.txt", staging)


def test_weights_may_be_a_prefix(staging: Path, bucket: str) -> None:
    for suffix in ("index", "data-00000-of-00001", "meta"):
        put(f"{bucket}/folder/bert_model.ckpt.{suffix}", suffix)
    prefix = fetch_weights(f"{bucket}/folder/bert_model.ckpt", staging)
    assert Path(f"{prefix}.index").read_text() == "index"
    assert Path(f"{prefix}.data-00000-of-00001").is_file()
    assert fetch_weights(f"{bucket}/folder", staging / "x").is_dir()
    with pytest.raises(InputError, match="no such checkpoint"):
        fetch_weights(f"{bucket}/folder/other.ckpt", staging)


@pytest.mark.parametrize("flag", ["vocab_file", "init_checkpoint"])
def test_what_tells_of_the_training_comes_along(bucket: str, flag: str) -> None:
    """Without it a cased model would be taken for an uncased one."""
    for name in ("vocab.txt", "tokenizer_config.json", "run.json", "other.json"):
        put(f"{bucket}/folder/{name}", name)
    flags = {flag: f"{bucket}/folder/vocab.txt"}
    with local_files(flags):
        there = {path.name for path in Path(flags[flag]).parent.iterdir()}
    assert there == {"vocab.txt", "tokenizer_config.json", "run.json"}


def test_only_what_changed_is_copied_back(
    staging: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = open_remote_folder(f"{bucket}/folder/", staging)
    copied: list[str] = []
    copy = sys.modules["bertbench.running.output.cloud_storage"]._copy  # type: ignore[attr-defined]

    def noting(source: str, target: str) -> None:
        copied.append(target.removeprefix(f"{bucket}/folder/"))
        copy(source, target)

    monkeypatch.setattr("bertbench.running.output.cloud_storage._copy", noting)
    for name in ("checkpoint", "model.ckpt-2.index", "model.ckpt-2.data", ".hidden"):
        (remote.path / name).write_text(name)
    remote.push()
    # The file that names the checkpoint after the checkpoint.
    assert copied == ["model.ckpt-2.data", "model.ckpt-2.index", "checkpoint"]
    (remote.path / "model.ckpt-2.data").unlink()
    (remote.path / "b.txt").write_text("new")
    remote.push()
    assert copied[3:] == ["b.txt"]
    assert get(f"{bucket}/folder/b.txt") == "new"
    assert not tf.io.gfile.exists(f"{bucket}/folder/model.ckpt-2.data")
    assert tf.io.gfile.exists(f"{bucket}/folder/inner/c.txt")
    assert open_remote_folder(f"{bucket}/new/", staging / "y").path.is_dir()


def test_hidden_files_are_left_alone(staging: Path, bucket: str) -> None:
    put(f"{bucket}/folder/.keepme", "mine")
    remote = open_remote_folder(f"{bucket}/folder", staging)
    tf.io.gfile.remove(f"{bucket}/folder/b.txt")
    (remote.path / "b.txt").unlink()
    remote.push()
    assert get(f"{bucket}/folder/.keepme") == "mine"


def test_results_that_cannot_be_copied_back_are_kept(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"output_dir": f"{bucket}/out", "tpu_name": "grpc://10.0.0.1:8470"}

    def fail(source: str, target: str) -> None:
        raise WorkError("no network")

    def run() -> None:
        with local_files(flags):
            (flags["output_dir"] / "model.ckpt-1.index").write_text("weights")  # type: ignore[operator]
            monkeypatch.setattr("bertbench.running.output.cloud_storage._copy", fail)

    with pytest.raises(WorkError, match=r"no network; the results are kept in /"):
        run()
    folder = flags["output_dir"]
    assert isinstance(folder, Path)
    assert (folder / "model.ckpt-1.index").read_text() == "weights"
    assert flags["tpu_name"] == "grpc://10.0.0.1:8470"
    shutil.rmtree(folder)


def test_the_local_copy_goes_away(bucket: str) -> None:
    flags = {"output_dir": f"{bucket}/out"}

    def run() -> None:
        with local_files(flags):
            (flags["output_dir"] / "a").write_text("a")  # type: ignore[operator]
            raise InputError("wrong")

    with pytest.raises(InputError):
        run()
    folder = flags["output_dir"]
    assert get(f"{bucket}/out/a") == "a"
    assert not folder.exists()  # type: ignore[attr-defined]


def test_a_storage_that_fails(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"nosuch://bucket/file: cloud storage fails"):
        fetch_file("nosuch://bucket/file", tmp_path)


def test_training_and_prediction_in_cloud_storage(tmp_path: Path) -> None:
    """The second command finds in the bucket what the first has left there."""
    local = tmp_path / "bucket"
    demo = demo_files()
    (local / "uncased_model").mkdir(parents=True)
    for file in (demo.bert_config_file, demo.vocab_file):
        shutil.copy(file, local / "uncased_model")
    for file in (demo.squad_train, demo.squad_dev):
        shutil.copy(file, local)
    url = f"file://{local}"
    model = f"{url}/uncased_model"
    arguments = [
        "run", "squad", f"--vocab_file={model}/vocab.txt",
        f"--bert_config_file={model}/bert_config.json", f"--output_dir={url}/out/",
        "--max_seq_length=64", "--doc_stride=32", "--max_query_length=24", "--memory=400MiB",
        f"--predict_file={url}/{demo.squad_dev.name}", "--train_batch_size=8",
    ]  # fmt: skip

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return bertbench(*arguments, *more)

    first = run(
        f"--train_file={url}/{demo.squad_train.name}", "--do_train=True", "--do_predict=True",
        "--num_train_epochs=1", "--save_checkpoints_steps=2",
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert f"output: {url}/out" in first.stdout
    out = local / "out"
    assert [r.step for r in read_log(out / "train_log.jsonl")] == [1, 2, 3, 4, 5]
    # The oldest checkpoint went away there too.
    assert sorted(path.name for path in out.glob("model.ckpt-*.index")) == [
        "model.ckpt-4.index", "model.ckpt-5.index",
    ]  # fmt: skip
    predictions = json.loads((out / "predictions.json").read_text())
    (out / "predictions.json").unlink()
    second = run("--do_train=False")
    assert second.returncode == 0, second.stderr
    assert "model.ckpt-5" in second.stderr
    assert json.loads((out / "predictions.json").read_text()) == predictions
    missing = run(f"--train_file={url}/gone.json")
    assert missing.returncode == 2
    assert missing.stderr.strip().splitlines()[-1].startswith(f"bertbench: {url}/gone.json:")
