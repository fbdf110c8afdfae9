"""Training on several replicas, and the flags of TPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from bertbench.core.errors import WorkError
from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.device import TPU_CORE_BYTES, TpuSettings, device_from_json, make_budget
from bertbench.hardware.discover import tpu_device
from bertbench.hardware.tpu import connect
from finetune.errors import InputError
from finetune.tasks.demo_data import demo_files
from finetune.train.training_loop import read_log
from helpers.command_line import bertbench
from helpers.paths import HELPERS, LIBRARY, REPOSITORY
from helpers.tiny_models import eagerly, norm_of, random_batch, tiny_trainer, values_of

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(LIBRARY)])}


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=240, env=ENVIRONMENT,
    )  # fmt: skip


def test_exact_update_on_two_replicas() -> None:
    """Dropout on, one row of padding, with and without accumulation on each replica."""
    result = python(HELPERS / "replica_training.py")
    assert result.returncode == 0, result.stderr
    for name, differences in json.loads(result.stdout).items():
        assert differences["step"] == 4
        assert differences["weights"] <= 1e-5, name
        assert differences["loss"] <= 1e-5, name
        assert differences["logits"] <= 1e-4, name
        assert differences["between_replicas"] == 0, name


def test_exact_update_with_the_state_on_another_device(tmp_path: Path) -> None:
    process = python(HELPERS / "host_training.py", tmp_path / "weights.npz")
    assert process.returncode == 0, process.stderr
    with eagerly():
        reference = tiny_trainer("squad", 6)
        for seed in range(3):
            reference.step(random_batch(6, 6, seed=seed))
    expected = values_of(reference)
    with np.load(tmp_path / "weights.npz") as trained:
        difference = {name: trained[name] - value for name, value in expected.items()}
    assert norm_of(difference) <= 1e-5 * norm_of(expected)
    ran = {
        operation: set(re.findall(rf"\({operation}\): \S*(CPU:\d)", process.stdout))
        for operation in ("ResourceApplyAdam", "Softmax", "BiasAddGrad", "AssignSubVariableOp")
    }
    assert ran.pop("ResourceApplyAdam") == {"CPU:0"}
    assert all(devices == {"CPU:1"} for devices in ran.values())


def demo_run(folder: Path) -> list[str]:
    """A short run of an effective batch of 7."""
    demo = demo_files()
    return [
        "run", "squad", f"--bert_config_file={demo.bert_config_file}",
        f"--vocab_file={demo.vocab_file}", "--max_seq_length=64", "--doc_stride=32",
        "--max_query_length=24", f"--train_file={demo.squad_train}",
        f"--predict_file={demo.squad_dev}", "--train_batch_size=7", "--num_train_epochs=1",
        "--learning_rate=5e-4", f"--output_dir={folder}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    result = bertbench(*demo_run(folder), "--device=cpu", "--memory=400MiB")
    assert result.returncode == 0, result.stderr
    return folder


def same_run(one: Path, two: Path) -> None:
    losses = [[r.loss for r in read_log(f / "train_log.jsonl")] for f in (one, two)]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    answers = [json.loads((f / "nbest_predictions.json").read_text()) for f in (one, two)]
    for question, candidates in answers[0].items():
        logits = [candidate["start_logit"] for candidate in candidates]
        others = [candidate["start_logit"] for candidate in answers[1][question]]
        assert others == pytest.approx(logits, abs=1e-3)
    assert json.loads((two / "run.json").read_text())["invocations"][0]["replicas"] == 2


def test_a_run_on_a_tpu_is_the_run_on_one_device(on_one_device: Path, tmp_path: Path) -> None:
    result = python(
        HELPERS / "replica_run.py", *demo_run(tmp_path), "--memory=400MiB", "--use_tpu=True",
        "--tpu_name=stand-in", "--tpu_zone=us-central1-b", "--gcp_project=a-project",
        "--num_tpu_cores=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 replicas, each 1 micro-batch of 4" in result.stderr
    same_run(on_one_device, tmp_path)


def test_a_run_on_two_gpus_is_the_run_on_one_device(on_one_device: Path, tmp_path: Path) -> None:
    """With the plan that `plan` made for them; it is continued there too."""
    plan, folder = tmp_path / "plan.json", tmp_path / "run"
    both = ["--device=gpu:0,gpu:1", "--memory=400MiB"]
    result = python(
        HELPERS / "two_gpu_run.py", "plan", "--target-batch=7", "--model=bert-tiny", "--seq-len=64",
        f"--json={plan}", *both,
    )  # fmt: skip
    assert "400 MiB on each of 2 replicas on Tesla V100" in result.stdout, result.stderr
    run = [*demo_run(folder), f"--plan={plan}", *both]
    result = python(HELPERS / "two_gpu_run.py", *run)
    assert result.returncode == 0, result.stderr
    same_run(on_one_device, folder)
    recorded = json.loads((folder / "run.json").read_text())["invocations"][0]
    assert device_from_json(recorded["budget"]["device"]).label == "gpu:0,gpu:1"
    result = python(HELPERS / "two_gpu_run.py", *run)
    assert "continuing at step 5 of 5" in result.stderr
    result = python(HELPERS / "two_gpu_run.py", *demo_run(folder), *both, "--placement=host")
    assert (result.returncode, result.stdout) == (2, "")
    assert "on the host with several replicas" in result.stderr


class Resolver:
    """Stands for TensorFlow's resolver and remembers what it was asked."""

    asked: dict[str, object] | None = None
    error: Exception | None = None

    def __init__(self, **asked: object) -> None:
        Resolver.asked = asked
        if Resolver.error is not None:
            raise Resolver.error


class Strategy:
    num_replicas_in_sync = 8

    def __init__(self, resolver: Resolver) -> None:
        pass


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> type[Resolver]:
    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", Resolver)
    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", lambda resolver: None)
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", lambda resolver: None)
    monkeypatch.setattr(tf.distribute, "TPUStrategy", Strategy)
    monkeypatch.setattr(Resolver, "error", None)
    return Resolver


def test_connecting(google: type[Resolver]) -> None:
    strategy = connect(TpuSettings("name", "zone", "project"))
    assert strategy.num_replicas_in_sync == 8
    assert google.asked == {"tpu": "name", "zone": "zone", "project": "project"}
    with pytest.raises(InputError, match="TPU name has 8 cores; give --num_tpu_cores 8"):
        connect(TpuSettings("name", cores=32))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Could not look up TPU\nmore lines"),
        OSError("Name or service not known"),
        tf.errors.NotFoundError(None, None, "no TPU system"),
    ],
)
def test_a_tpu_that_cannot_be_reached(google: type[Resolver], error: Exception) -> None:
    google.error = error
    with pytest.raises(WorkError, match=r"cannot reach the TPU x \([^\n]*--tpu_name"):
        connect(TpuSettings("x"))


def test_budget_of_a_core() -> None:
    assert make_budget(tpu_device(TpuSettings("x"))).budget_bytes == TPU_CORE_BYTES
    usable_bytes = find_accelerator("tpu-v2-8").usable_bytes
    assert 0.9 * TPU_CORE_BYTES < usable_bytes < 7.48 * (1 << 30)
    device = tpu_device(TpuSettings("x", "zone", "project", cores=32), 16 << 30)
    assert make_budget(device).budget_bytes == 16 << 30
    assert (device.kind, device.label, device.replicas) == ("tpu", "tpu:x", 32)
    assert "32 cores" in device.name
    assert device_from_json(json.loads(json.dumps(device.to_json()))) == device


def test_what_one_of_several_replicas_says_of_an_update_is_not_enough() -> None:
    from types import SimpleNamespace

    from finetune.train.training_loop import _update_began

    alone = SimpleNamespace(state=SimpleNamespace(step=tf.Variable(3, dtype=tf.int64)))
    assert [_update_began(alone, step) for step in (2, 3)] == [True, False]  # type: ignore[arg-type]
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        together = SimpleNamespace(state=SimpleNamespace(step=tf.Variable(3, dtype=tf.int64)))
    assert [_update_began(together, step) for step in (2, 3)] == [True, True]  # type: ignore[arg-type]
