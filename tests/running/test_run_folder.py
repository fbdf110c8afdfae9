"""Tests of bertbench.running.output.run_folder: which runs an output folder lets go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bertbench.core.workload import Levers
from bertbench.running.output.run_folder import begin_run
from bertbench.running.output.run_record import RunDescription
from bertbench.running.settings import RunSettings
from finetune.errors import InputError
from finetune.model_files.model_folder import RUN_FILE

IDENTITY = {"seed": 1}


def begin(folder: Path, xla: bool = False, kind: str = "cpu", **identity: Any) -> dict[str, Any]:
    """Begin a run, or go on with it; returns its record."""
    settings = RunSettings(
        output_dir=folder, max_seq_length=128, do_lower_case=True, train_batch_size=16,
        predict_batch_size=8, learning_rate=1e-4, num_train_epochs=1.0, warmup_proportion=0.1,
        save_checkpoints_steps=100, seed=1,
    )  # fmt: skip
    plan = {"levers": Levers(xla=xla).to_json(), "budget": {"device": {"kind": kind}}}
    begin_run(settings, RunDescription({**IDENTITY, **identity}, plan, {}))
    record: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
    return record


def as_before(folder: Path) -> None:
    """Leave what earlier versions did not record out of a run's record."""
    path = folder / RUN_FILE
    record = json.loads(path.read_text())
    for invocation in record["invocations"]:
        del invocation["dropout_masks"]
    path.write_text(json.dumps(record))


def test_a_run_goes_on_with_xla_and_without(tmp_path: Path) -> None:
    for number, xla in enumerate([False, True, True, False], 1):
        assert len(begin(tmp_path, xla)["invocations"]) == number


def test_masks_that_tensorflow_drew_before_are_those_of_today(tmp_path: Path) -> None:
    begin(tmp_path)
    as_before(tmp_path)
    begin(tmp_path, xla=True)
    assert len(begin(tmp_path)["invocations"]) == 3


@pytest.mark.parametrize(("xla", "kind"), [(True, "cpu"), (False, "tpu")])
def test_masks_that_xla_drew_before_are_not(tmp_path: Path, xla: bool, kind: str) -> None:
    begin(tmp_path, xla, kind)
    as_before(tmp_path)
    before = (tmp_path / RUN_FILE).read_bytes()
    with pytest.raises(InputError, match=r"XLA drew other dropout masks; choose another --output"):
        begin(tmp_path)
    assert (tmp_path / RUN_FILE).read_bytes() == before


def test_what_an_earlier_version_did_not_record_is_another_run(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(InputError, match="a run that differs in adam_epsilon"):
        begin(tmp_path, adam_epsilon="corrected too")
