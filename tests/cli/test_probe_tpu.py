"""Probing a TPU, on a stand-in: trials train on all of its cores, and a batch is that of one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bertbench.cli import probe as probe_cli
from bertbench.cli.options import common
from bertbench.core.workload import Setup
from bertbench.hardware.device import TPU_CORE_BYTES, Budget
from bertbench.trials.measure import TrialSettings, measure_batches
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from helpers import tpu_stand_in


def measure(
    setup: Setup, budget: Budget, batches: Sequence[int], settings: TrialSettings, *more: Any
) -> list[Trial]:
    settings = dataclasses.replace(settings, target="helpers.tpu_stand_in:run_trial")
    return measure_batches(setup, budget, batches, settings, *more)


def test_the_limit_of_a_core_is_certified_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERTBENCH_LEDGER", str(tmp_path / "ledger.sqlite"))
    path = tmp_path / "p.json"
    result = CliRunner().invoke(
        probe_cli.command,
        ["--models", "bert-tiny", "--seq-lens", "8", "--device", "tpu:stand-in",
         "--tpu_zone", "us-central1-b", "--gcp-project", "a-project", "--num_tpu_cores", "2",
         "--json", str(path)],
        obj=measure,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "all memory of a core on TPU stand-in, 2 cores" in result.output
    values = json.loads(path.read_text())
    assert values["device"]["kind"] == "tpu"
    assert values["device"]["budget_bytes"] == TPU_CORE_BYTES
    (cell,) = values["cells"]
    assert cell["max_batch"] == tpu_stand_in.LIMIT
    fits, oom = cell["certificate"]["fits"], cell["certificate"]["oom"]
    assert (fits["batch"], oom["batch"]) == (tpu_stand_in.LIMIT, tpu_stand_in.LIMIT + 1)
    assert fits["peak_bytes"] is None  # nothing tells it
    assert "Exceeded hbm capacity" in oom["message"]
    # All cores work at the same time.
    point = cell["curve"][-1]
    assert point["examples_per_second"] == pytest.approx(
        2 * fits["batch"] / fits["step_seconds"], rel=1e-3
    )
    result = CliRunner().invoke(probe_cli.command, ["--check", str(path)], obj=measure)
    assert result.exit_code == 0, result.output
    assert "holds" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu:x", "--memory", "4GiB"], "leave --memory"),
        (["--device", "tpu:x,tpu:y"], "probed alone"),
        (["--device", "cpu", "--tpu-zone", "z"], "do not go with --device cpu"),
    ],
)
def test_what_does_not_go_with_a_tpu(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(probe_cli.command, arguments)
    assert words in str(result.exception)


def test_other_verbs_say_how_they_name_a_tpu() -> None:
    with pytest.raises(InputError, match="--use_tpu"):
        common.resolve_budget("tpu:x", None)
