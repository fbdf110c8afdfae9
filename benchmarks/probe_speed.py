"""What a certified limit costs: trials and time of the probe, beside plain doubling and bisection.

    python benchmarks/probe_speed.py [--quick] [--models ...] [--seq-lens ...] [--memory ...]
                                     [--checkpointing ...] [--json FILE]

Both look for the same limit, cell after cell in one run. Plain doubling and bisection tries 1, 2,
4, ... until a batch does not fit and halves what is left; each of its trials has a fresh process
from the same fork server, for after an out-of-memory error the memory of a process stays in
pieces, so its last two trials are a certificate too.

The probe of a model and a policy keeps one ledger. A cell is `unknown` as long as that ledger
tells nothing about it: the first cap at the first two lengths. All later ones have neighbours.

The whole grid of 72 cells takes about six hours on two cores; `--quick`, two policies of BERT-Tiny
at one length under two caps, five minutes. With `--json FILE` it may be interrupted: models and
policies whose cells are all in the file, from the same device, are taken from there.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.hardware.device import Budget, Device, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import find_allocations
from bertbench.probing.cell import probe_cell
from bertbench.trials.measure import measure_step
from bertbench.trials.trial import Trial
from finetune.spec.checkpointing import POLICIES, parse_checkpointing
from finetune.storage.json_files import json_text

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four cells of BERT-Tiny")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--seq-lens", nargs="+", type=int)
    parser.add_argument("--memory", nargs="+", type=int, metavar="MIB", help="caps in MiB")
    parser.add_argument("--checkpointing", nargs="+")
    parser.add_argument("--json", type=Path, help="keep the measurements in this file")
    arguments = parser.parse_args()
    quick = arguments.quick
    models = arguments.models or (["bert-tiny"] if quick else ["bert-mini", "bert-small"])
    lengths = arguments.seq_lens or ([128] if quick else [64, 128, 256])
    caps = arguments.memory or ([256, 192] if quick else [512, 1024, 2048])
    policies = arguments.checkpointing or (["none", "full"] if quick else list(POLICIES))

    device = resolve_device("cpu")
    print(f"{'':36s} {'largest batch':>13s} {'trials':>13s} {'seconds':>13s} {'ratio':>6s}")
    print(f"{'cell':36s} {'probe plain':>13s} {'probe plain':>13s} {'probe plain':>13s}")
    kept: list[Row] = []
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text(encoding="utf-8"))["cells"]
    rows: list[Row] = []
    wanted = list(itertools.product(caps, lengths))
    for policy, model in itertools.product(policies, models):
        group = {"device": device.name, "model": model, "checkpointing": policy}
        found = {(row["cap_mib"], row["seq_len"]): row for row in kept if _is_in(row, group)}
        if found.keys() >= set(wanted):
            rows += [found[cell] for cell in wanted]
            continue
        # A cell without those before it in the ledger is another cell.
        kept = [row for row in kept if not _is_in(row, group)]
        for row in _measure_group(device, model, policy, wanted):
            rows.append({**group, **row})
            _show(rows[-1])
            if arguments.json:
                _write(arguments.json, [*rows, *(row for row in kept if row not in rows)])
    for known, word in ((False, "unknown"), (True, "with neighbours in the ledger")):
        chosen = [row for row in rows if row["known"] is known]
        if chosen:
            trials = statistics.median(row["probe"]["trials"] for row in chosen)
            most = max(row["probe"]["trials"] for row in chosen)
            print(
                f"{word}: {len(chosen)} cells, median {trials:g} trials, at most {most}; "
                f"time {_ratio(chosen):.2f} of plain"
            )
    print(f"all: time {_ratio(rows):.2f} of plain")


def _is_in(row: Row, group: Row) -> bool:
    return group.items() <= row.items()


def _measure_group(
    device: Device, model: str, policy: str, wanted: Sequence[tuple[int, int]]
) -> Iterator[Row]:
    """Cells of a cap in MiB and a length, of which each may learn from those before it."""
    levers = Levers(parse_checkpointing(policy))
    with tempfile.TemporaryDirectory() as folder:
        for cap, length in wanted:
            budget = make_budget(device, cap * MIB_BYTES)
            workload = published_workload(model, length)
            cell = _cell(Path(folder, "ledger.sqlite"), budget, workload, levers)
            date = datetime.date.today().isoformat()
            yield {"seq_len": length, "cap_mib": cap, "date": date, **cell}


def _cell(path: Path, budget: Budget, workload: Workload, levers: Levers) -> Row:
    with open_ledger(path) as ledger:
        question = Question(budget, Setup(workload, levers))
        recorded = find_allocations(ledger, question)
        lengths = {one.seq_len for one in recorded}
        cell = probe_cell(ledger, question)
    began = time.monotonic()
    limit, trials = _double_and_halve(budget, workload, levers)
    return {
        "known": workload.seq_len in lengths or len(lengths) >= 2,
        "probe": {
            "max_batch": cell.result.max_batch,
            "certified": cell.result.certificate is not None,
            "trials": cell.result.measured,
            "oom_trials": sum(trial.outcome == "oom" for trial in cell.result.trials),
            "batches": [trial.batch for trial in cell.result.trials],
            "seconds": cell.seconds,
        },
        "plain": {
            "max_batch": limit,
            "trials": len(trials),
            "oom_trials": sum(trial.outcome == "oom" for trial in trials),
            "seconds": time.monotonic() - began,
        },
    }


def _double_and_halve(
    budget: Budget, workload: Workload, levers: Levers
) -> tuple[int, list[Trial]]:
    trials: list[Trial] = []
    low, high = 0, 0
    batch = 1
    while high - low != 1:
        trials.append(measure_step(Setup(workload, levers).step(batch), budget))
        if trials[-1].outcome == "failed":
            raise SystemExit(f"batch {batch} failed: {trials[-1].message}")
        if trials[-1].outcome == "fits":
            low = batch
        else:
            high = batch
        batch = (low + high) // 2 if high else 2 * batch
    return low, trials


def _show(row: Row) -> None:
    name = f"{row['model']} {row['seq_len']} {row['checkpointing']} {row['cap_mib']} MiB"
    probe, plain = row["probe"], row["plain"]
    print(
        f"{name:36s} {probe['max_batch']:6d} {plain['max_batch']:6d} {probe['trials']:6d} "
        f"{plain['trials']:6d} {probe['seconds']:6.0f} {plain['seconds']:6.0f} "
        f"{_ratio([row]):6.2f}{'' if row['known'] else '  unknown'}",
        flush=True,
    )


def _ratio(rows: list[Row]) -> float:
    """Time of the probe as a part of that of plain doubling and bisection."""
    probe = sum(row["probe"]["seconds"] for row in rows)
    return float(probe / sum(row["plain"]["seconds"] for row in rows))


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text(json_text({"cells": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
