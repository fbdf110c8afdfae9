"""Whether the probe can be relied on: the same answer every time, nothing left behind.

    python benchmarks/probe_trust.py [--quick] [--json FILE]

| part | what | two cores |
| --- | --- | --- |
| repeat | the same cell ten times with nothing known: the maxima, and the peaks there | 8 min |
| leftovers | processes, shared memory and temporary files after 200 trials | 15 min |
| start | seconds from the request for a process to its first operation's result | 10 s |

`--quick` repeats twice and makes ten trials, in two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question
from bertbench.memory.allocator.budget import child_environment
from bertbench.probing.cell import probe_cell
from bertbench.trials.isolation import run_isolated
from bertbench.trials.measure import TrialSettings, measure_step
from finetune.spec.checkpointing import parse_checkpointing
from finetune.storage.json_files import json_text

_MARK = "BERTBENCH_PROBE_TRUST"
_TEMPORARY = tempfile.gettempdir()
SHARED_MEMORY = Path("/dev/shm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    # Before the fork server starts, whose environment the system shows for its children.
    os.environ[_MARK] = str(os.getpid())
    results = {
        "start": start(3 if arguments.quick else 20),
        "repeat": repeat(2 if arguments.quick else 10),
        "leftovers": leftovers(10 if arguments.quick else 200),
    }
    if arguments.json:
        arguments.json.write_text(json_text(results, indent=2) + "\n", encoding="utf-8")


def repeat(times: int) -> list[dict[str, Any]]:
    """Probe the same cells again and again, each time with an empty ledger."""
    cells = [("bert-tiny", 128, "none", 256), ("bert-tiny", 128, "selective", 256)]
    rows = []
    for model, seq_len, policy, mebibytes in cells:
        budget = make_budget(resolve_device("cpu"), mebibytes * MIB_BYTES)
        setup = Setup(published_workload(model, seq_len), Levers(parse_checkpointing(policy)))
        found = []
        for _ in range(times):
            with (
                tempfile.TemporaryDirectory() as folder,
                open_ledger(Path(folder, "ledger.sqlite")) as ledger,
            ):
                result = probe_cell(ledger, Question(budget, setup)).result
            fits = result.certificate.fits if result.certificate else None
            found.append((result.max_batch, fits.peak_bytes if fits else None, result.measured))
        maxima, peaks, trials = zip(*found, strict=True)
        rows.append(
            {
                "model": model,
                "seq_len": seq_len,
                "checkpointing": policy,
                "budget_bytes": budget.budget_bytes,
                "maxima": maxima,
                "peak_bytes": peaks,
                "trials": trials,
            }
        )
        print(
            f"{model} {seq_len} {policy} {mebibytes} MiB, {times} times: largest batch "
            f"{_counts(maxima)}, peak bytes {_counts(peaks)}, trials {_counts(trials)}",
            flush=True,
        )
    return rows


def leftovers(trials: int) -> dict[str, Any]:
    """Count what trials leave behind: fitting ones, and ones that run out of memory."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        budget = make_budget(resolve_device("cpu"), 96 * MIB_BYTES)
        setup, settings = Setup(published_workload("bert-tiny", 16)), TrialSettings(steps=2)
        # The fork server stays as long as this process does.
        measure_step(setup.step(1), budget, settings)
        before = _there(folder)
        outcomes: dict[str, int] = {}
        for number in range(trials):
            # Out of memory takes the allocator ten seconds and more.
            batch = 5000 if number % 10 == 9 else 1 + number % 8
            trial = measure_step(setup.step(batch), budget, settings)
            outcomes[trial.outcome] = outcomes.get(trial.outcome, 0) + 1
        deadline = time.monotonic() + 10
        while (left := _new(_there(folder), before)) and time.monotonic() < deadline:
            time.sleep(0.5)
        tempfile.tempdir = None
    print(f"{trials} trials ({outcomes}): left behind {left or 'nothing'}", flush=True)
    return {"trials": trials, "outcomes": outcomes, "left": left}


def start(times: int) -> list[float]:
    """Time processes up to their first operation; the first one starts the server too."""
    budget = make_budget(resolve_device("cpu"), 96 * MIB_BYTES)
    seconds: list[float] = []
    for _ in range(times + 1):
        ended: list[float] = []
        began = time.monotonic()
        run_isolated(
            "probe_trust:first_operation",
            {},
            environment=child_environment(budget),
            timeout_seconds=120,
            on_message=lambda message, ended=ended: ended.append(time.monotonic()),  # type: ignore[misc]
        )
        seconds.append(ended[0] - began)
    print(
        f"start to first operation: the first {seconds[0]:.2f} s, then median "
        f"{statistics.median(seconds[1:]):.2f} s, at most {max(seconds[1:]):.2f} s",
        flush=True,
    )
    return seconds


def first_operation(payload: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
    """Run one operation; the target of `start`."""
    import tensorflow as tf

    send({"sum": float(tf.reduce_sum(tf.ones([1000])))})


def _there(folder: str) -> dict[str, set[str]]:
    """List what there is of this program: a process whose parent has ended is a child of nobody."""
    processes = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == str(os.getpid()):
                processes.add(f"{process.pid} {process.name()}")
    temporary = {str(path) for path in Path(folder).iterdir()}
    temporary |= {
        str(path)
        for pattern in ("bertbench-*", "__autograph*", "pymp-*", "tmp*")
        for path in Path(_TEMPORARY).glob(pattern)
        if str(path) != folder
    }
    return {
        "processes": processes,
        "shared memory": set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.exists() else set(),
        "temporary files": temporary,
    }


def _new(now: dict[str, set[str]], before: dict[str, set[str]]) -> dict[str, list[str]]:
    return {kind: sorted(now[kind] - before[kind]) for kind in now if now[kind] - before[kind]}


def _counts(values: tuple[Any, ...]) -> str:
    return ", ".join(f"{value} ({values.count(value)}x)" for value in sorted({*values}, key=str))


if __name__ == "__main__":
    main()
