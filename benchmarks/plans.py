"""Do plans fit? Random requests, each plan tried under its budget in a process of its own.

    python benchmarks/plans.py [--quick] [--requests N] [--models ...] [--kinds ...] [--json FILE]

A request is a model, a head, a sequence length, a target batch, a kind and a budget between the
smallest that any setting fits in and what the whole batch needs without any lever. A kind is the
published step, or that with one thing changed: exact GELU (`gelu`), another precision, another
optimizer. Two optimizer steps of each plan are run. `full` is the measured peak as a part of the
budget; where a budget does not bind, because the plan uses no lever, it counts as fitting only.

About 40 minutes for 200 requests on two cores; `--quick` makes ten.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
from pathlib import Path
from typing import Any

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.planning.min_memory import find_min_memory
from bertbench.planning.planner import make_plan
from bertbench.planning.requests import PlanRequest, attached_device
from bertbench.trials.measure import TrialSettings, measure_step
from finetune.spec.config import HEADS
from finetune.spec.optimizers import OPTIMIZERS
from finetune.spec.precisions import PRECISIONS
from finetune.storage.json_files import json_text

_MODELS = ("bert-tiny", "bert-mini", "bert-small", "bert-medium")
_SEQ_LENS = (64, 96, 128, 192, 256, 320, 384, 512)
_TARGETS = (4, 8, 12, 16, 20, 24, 32, 48, 64)
_KINDS = ("tanh", "gelu", *PRECISIONS[2:], *OPTIMIZERS[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ten requests")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--models", nargs="+", default=list(_MODELS))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["squad", "classifier"])
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=["tanh"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    device = resolve_device("cpu")
    generator = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    for _ in range(10 if arguments.quick else arguments.requests):
        workload = published_workload(
            generator.choice(arguments.models),
            generator.choice(_SEQ_LENS),
            generator.choice(arguments.heads),
        )
        target = generator.choice(_TARGETS)
        kind = generator.choice(arguments.kinds)
        workload, levers = _of_kind(workload, kind)
        least, most = _range_mib(workload, levers, target)
        budget = make_budget(device, round(generator.uniform(least, most)) * MIB_BYTES)
        request = PlanRequest(target, allowed=[levers])
        plan = make_plan(request, workload, attached_device(budget))
        chosen = plan.chosen
        step = chosen.step
        trial = measure_step(step, budget, TrialSettings(steps=2))
        row = {
            "model": workload.model,
            "head": workload.head,
            "kind": kind,
            "seq_len": workload.seq_len,
            "target_batch": target,
            "budget_bytes": budget.budget_bytes,
            "chosen": chosen.to_json(),
            "binds": (chosen.step.micro_batch, str(chosen.step.levers.checkpointing))
            != (target, "none"),
            "outcome": trial.outcome,
            "peak_bytes": trial.peak_bytes,
            "message": trial.message,
        }
        rows.append(row)
        _show(row)
        if arguments.json:
            text = json_text({"requests": rows}, indent=2)
            arguments.json.write_text(text + "\n", encoding="utf-8")
    outcomes = [row["outcome"] for row in rows]
    full = [
        row["peak_bytes"] / row["budget_bytes"]
        for row in rows
        if row["binds"] and row["outcome"] == "fits"
    ]
    print(
        f"{len(rows)} plans: {outcomes.count('fits')} fit, {outcomes.count('oom')} run out of "
        f"memory, {outcomes.count('failed')} fail"
    )
    if full:
        print(
            f"{len(full)} where memory binds: measured peak / budget median "
            f"{statistics.median(full):.3f}, least {min(full):.3f}"
        )


def _of_kind(workload: Workload, kind: str) -> tuple[Workload, Levers]:
    if kind == "gelu":
        config = dataclasses.replace(workload.config, hidden_act="gelu_erf")
        return dataclasses.replace(workload, config=config), Levers()
    if kind in OPTIMIZERS:
        return workload, Levers(optimizer=kind)
    return workload, Levers(precision=kind) if kind in PRECISIONS else Levers()


def _range_mib(workload: Workload, levers: Levers, target: int) -> tuple[float, float]:
    """The smallest budget for a target, and one in which no lever is needed."""
    smallest = find_min_memory(
        PlanRequest(target, allowed=[levers]), workload, "cpu", max_replayed=4
    )
    predicted = predict_memory(Setup(workload, levers), Room("cpu", 1 << 40))
    plenty_bytes = round(predicted.peak_bytes(target) * (1.02 + predicted.margin))
    min_bytes = smallest.budget_bytes
    return min_bytes / MIB_BYTES, max(plenty_bytes, min_bytes) / MIB_BYTES


def _show(row: dict[str, Any]) -> None:
    chosen = row["chosen"]
    name = (
        f"{row['model']} {row['head']} {row['seq_len']} {row['kind']} batch {row['target_batch']}"
    )
    setting = f"{chosen['accumulation_steps']} x {chosen['micro_batch']} {chosen['checkpointing']}"
    peak = row["peak_bytes"]
    full = "" if peak is None else f"{peak / row['budget_bytes']:.3f}"
    error = "" if peak is None else f"{100 * (chosen['predicted_peak_bytes'] / peak - 1):+.2f}%"
    print(
        f"{name:46s} {row['budget_bytes'] // MIB_BYTES:6,d} MiB  {setting:30s} "
        f"{row['outcome']:6s} {full:>6s} {error:>8s}{'' if row['binds'] else '  no lever'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
