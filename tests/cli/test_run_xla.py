"""`bertbench run --xla`: the same training, compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertbench.core.workload import Levers
from bertbench.hardware.accelerators import check_levers
from finetune.errors import InputError
from finetune.train.training_loop import read_log
from helpers.command_line import bertbench, classifier_arguments, fails_with_one_line


def test_a_compiled_run_is_the_same_training(tmp_path: Path) -> None:
    for name, flags in (("plain", []), ("compiled", ["--xla"])):
        more = ["--do_train", "true", "--micro_batch", "2", *flags]
        result = bertbench(*classifier_arguments(tmp_path / name, "--demo", *more))
        assert result.returncode == 0, result.stderr
    plain, compiled = (read_log(tmp_path / n / "train_log.jsonl") for n in ("plain", "compiled"))
    assert len(plain) == len(compiled) > 1
    for one, other in zip(plain, compiled, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
    record = json.loads((tmp_path / "compiled" / "run.json").read_text())
    assert record["invocations"][-1]["levers"]["xla"]


def test_a_plan_for_other_kernels_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    size = ("--model", "bert-tiny", "--seq-len", "32", "--target-batch", "4", "--memory", "400MiB")
    assert bertbench("plan", *size, "--json", plan).returncode == 0
    more = ("--do_train", "true", "--plan", plan, "--xla", "--demo")
    result = bertbench(*classifier_arguments(tmp_path / "out", *more))
    fails_with_one_line(result, "TensorFlow's own kernels", "--xla", "bertbench plan --xla")


def test_xla_is_for_one_gpu() -> None:
    check_levers("gpu", "t4", Levers(xla=True))
    check_levers("tpu", "tpu-v2-8", Levers(xla=True), replicas=8)
    with pytest.raises(InputError, match="several GPUs"):
        check_levers("gpu", "t4", Levers(xla=True), replicas=2)
