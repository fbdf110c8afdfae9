"""A real probe of a small cell, from the command line to the ledger and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertbench.ledger.database import open_ledger
from bertbench.ledger.records import read_rows

# Every trial that runs out of memory waits ten seconds or more for memory to be freed.
pytestmark = pytest.mark.timeout(600)


def probe(tmp_path: Path, *more: str) -> tuple[dict[str, object], str]:
    path = tmp_path / "p.json"
    result = subprocess.run(
        [sys.executable, "-m", "bertbench", "probe", "--models", "bert-tiny", "--seq-lens", "64",
         "--memory", "128MiB", "--device", "cpu", "--json", str(path), *more],
        capture_output=True, text=True, check=True, timeout=580,
        env={**os.environ, "BERTBENCH_LEDGER": str(tmp_path / "ledger.sqlite")},
    )  # fmt: skip
    return json.loads(path.read_text()), result.stdout


def test_certified_cell_is_measured_once(tmp_path: Path) -> None:
    first, shown = probe(tmp_path, "--checkpointing", "selective")
    (cell,) = first["cells"]
    assert first["device"]["budget_bytes"] == 128 << 20
    certificate = cell["certificate"]
    assert certificate["fits"]["batch"] == cell["max_batch"] > 4
    assert certificate["fits"]["peak_bytes"] <= 128 << 20
    assert certificate["oom"]["batch"] == cell["max_batch"] + 1
    assert certificate["oom"]["outcome"] == "oom"
    assert certificate["fits"]["fresh"]
    assert certificate["oom"]["fresh"]
    assert cell["measured"] <= 4
    assert "certified" in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        rows = read_rows(ledger)
    assert len(rows) == cell["measured"] == len(cell["trials"])
    again, _ = probe(tmp_path, "--checkpointing", "selective")
    assert again["cells"][0]["measured"] == 0
    assert again["cells"][0]["certificate"] == certificate


@pytest.mark.slow
def test_what_trials_asked_for_tells_the_limit_of_another_budget(tmp_path: Path) -> None:
    first, _ = probe(tmp_path, "--checkpointing", "selective")
    other, _ = probe(tmp_path, "--checkpointing", "selective", "--memory", "112MiB")
    (cell,) = other["cells"]
    assert cell["measured"] == 2
    assert (
        cell["certificate"]["fits"]["batch"] == cell["max_batch"] < first["cells"][0]["max_batch"]
    )


def test_bound_is_reported_as_such(tmp_path: Path) -> None:
    result, shown = probe(tmp_path, "--max-batch", "3")
    (cell,) = result["cells"]
    assert cell["max_batch"] == 3
    assert cell["stopped_by"] == "max_batch"
    assert cell["certificate"] is None
    assert "not the limit" in shown
