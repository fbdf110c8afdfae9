"""Is a plan the fastest setting that fits? Each plan against a measured sweep of all settings.

    python benchmarks/regret.py [--quick] [--cases ...] [--sweep FILE] [--json FILE]

A case is a model, a head, a sequence length and a target batch. All its lever settings are built,
a dozen at a time in one process, and their optimizer steps are run in turn, round after round:
what else the machine does then slows down each of them alike, and the least of the rounds counts.
Then budgets are drawn between the smallest that any setting fits in and what the whole batch needs
without any lever; each is a request. Of a request, the plan and the settings that the sweep found
fastest among those whose predicted peak is within the budget are tried under it, and the first
three that fit are run in turn with the plan once more, because the fastest of a hundred noisy
numbers is too fast. Regret is the plan's seconds over those of the best.

`--sweep` keeps the sweep in a file and takes from it what it already has. The whole takes about two
hours on two cores that nothing else uses; `--quick` sweeps BERT-Tiny for one target, for four
requests, in about five minutes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload, levers_from_json, published_workload
from bertbench.hardware.device import Budget, Device, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.allocator.budget import child_environment
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.planning.candidates import all_policies, cuts
from bertbench.planning.min_memory import find_min_memory
from bertbench.planning.planner import make_plan
from bertbench.planning.requests import PlanRequest, attached_device
from bertbench.trials.measure import TrialSettings, measure_step
from finetune.storage.json_files import json_text

_CASES = (
    "bert-tiny:squad:128:32",
    "bert-tiny:classifier:256:16",
    "bert-mini:squad:64:32",
    "bert-mini:classifier:128:8",
    "bert-mini:squad:96:12",
)
_BUDGETS = 4
_RIVALS = 3
_TRIED = 8
_TOGETHER = 12
_ROUNDS = 8
Row = dict[str, Any]
Setting = tuple[Levers, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four requests of BERT-Tiny")
    parser.add_argument("--cases", nargs="+", default=list(_CASES), metavar="MODEL:HEAD:SEQ:TARGET")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", type=Path, help="keep the sweep in this file")
    parser.add_argument("--sweep-only", action="store_true", help="stop after the sweep")
    parser.add_argument("--json", type=Path, help="write the requests to this file")
    arguments = parser.parse_args()
    device = resolve_device("cpu")
    generator = random.Random(arguments.seed)
    swept: list[Row] = []
    if arguments.sweep and arguments.sweep.exists():
        swept = json.loads(arguments.sweep.read_text(encoding="utf-8"))["settings"]
    requests: list[Row] = []
    for case in arguments.cases[: 1 if arguments.quick else None]:
        workload, target = _read_case(case)
        rows = _sweep(device, case, workload, target, swept, arguments.sweep)
        if arguments.sweep_only:
            continue
        smallest = find_min_memory(PlanRequest(target), workload, "cpu", max_replayed=4)
        min_bytes = smallest.budget_bytes
        plenty = Room("cpu", 1 << 40)
        most_bytes = predict_memory(Setup(workload), plenty).peak_bytes(target)
        for number in range(_BUDGETS):
            # One in each quarter of the range, so that all of it is asked for.
            share = (number + generator.random()) / _BUDGETS
            budget_bytes = min_bytes + share * (most_bytes - min_bytes)
            budget_mib = round(budget_bytes / MIB_BYTES)
            requests.append(_settle(device, case, workload, target, budget_mib, rows))
            if arguments.json:
                _write(arguments.json, {"requests": requests})
    if requests:
        regrets = [request["regret"] for request in requests]
        print(
            f"{len(regrets)} requests: regret median {statistics.median(regrets):.3f}, "
            f"worst {max(regrets):.3f}, {sum(r <= 1.05 for r in regrets)} within 1.05"
        )


def _read_case(case: str) -> tuple[Workload, int]:
    model, head, seq_len, target = case.split(":")
    return published_workload(model, int(seq_len), head), int(target)


def _sweep(
    device: Device, case: str, workload: Workload, target: int, swept: list[Row], path: Path | None
) -> list[Row]:
    """Run all settings of a case that have not been run."""
    settings = [
        (dataclasses.replace(Levers(policy), accumulation_steps=steps), micro_batch)
        for policy in all_policies(workload.config.num_hidden_layers)
        for micro_batch, steps in cuts(target)
    ]
    known = {(row["case"], row["setting"]) for row in swept}
    # In an order that a drift of the machine has nothing to do with.
    random.Random(0).shuffle(settings)
    left = [one for one in settings if (case, _name(*one)) not in known]
    for begin in range(0, len(left), _TOGETHER):
        chunk = left[begin : begin + _TOGETHER]
        for (levers, micro_batch), seconds in zip(
            chunk, _run_in_turn(device, workload, chunk), strict=True
        ):
            row = {
                "case": case,
                "setting": _name(levers, micro_batch),
                "levers": levers.to_json(),
                "micro_batch": micro_batch,
                "peak_bytes": _predicted_peak(device, workload, levers, micro_batch),
                "seconds": seconds,
            }
            swept.append(row)
            print(f"{case} {row['setting']:28s} {min(seconds):.4f} s", flush=True)
        if path is not None:
            _write(path, {"settings": swept})
    return [row for row in swept if row["case"] == case]


def _run_in_turn(
    device: Device, workload: Workload, settings: Sequence[Setting]
) -> list[list[float]]:
    """Seconds of each setting's steps, in a fresh process."""
    budget = make_budget(device)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_steps_in_turn, budget, workload, list(settings)).result()


def _steps_in_turn(
    budget: Budget, workload: Workload, settings: Sequence[Setting]
) -> list[list[float]]:
    os.environ.update(child_environment(budget))
    from bertbench.memory.allocator.tensorflow_setup import start_tensorflow
    from bertbench.trials.worker import build_trainer, random_batch

    start_tensorflow(budget)
    trainers = [build_trainer(Setup(workload, levers)) for levers, _ in settings]
    batches = [
        random_batch(workload, size * levers.accumulation_steps) for levers, size in settings
    ]
    seconds: list[list[float]] = [[] for _ in settings]
    for number in range(_ROUNDS + 1):
        for trainer, batch, found in zip(trainers, batches, seconds, strict=True):
            began = time.perf_counter()
            float(trainer.step(batch).loss)
            if number:  # The first one compiles.
                found.append(time.perf_counter() - began)
    return seconds


def _predicted_peak(device: Device, workload: Workload, levers: Levers, micro_batch: int) -> int:
    room = Room(device.kind, make_budget(device).budget_bytes)
    return predict_memory(Setup(workload, levers), room).footprint(micro_batch).peak_bytes


def _settle(
    device: Device, case: str, workload: Workload, target: int, budget_mib: int, rows: Sequence[Row]
) -> Row:
    """Plan for a budget, and run the plan and its rivals in turn."""
    budget = make_budget(device, budget_mib * MIB_BYTES)
    plan = make_plan(PlanRequest(target), workload, attached_device(budget))
    step = plan.chosen.step
    chosen = (step.levers, step.micro_batch)
    rivals = [row for row in rows if row["peak_bytes"] <= budget.budget_bytes]
    rivals.sort(key=lambda row: min(row["seconds"]))
    outcomes: dict[str, str] = {}
    fitting: list[Setting] = []
    for levers, size in (
        chosen,
        *((levers_from_json(r["levers"]), r["micro_batch"]) for r in rivals),
    ):
        name = _name(levers, size)
        if len(fitting) <= _RIVALS and len(outcomes) <= _TRIED and name not in outcomes:
            trial = measure_step(Setup(workload, levers).step(size), budget, TrialSettings(steps=2))
            outcomes[name] = trial.outcome
            if trial.outcome == "fits":
                fitting.append((levers, size))
    seconds = {
        _name(*one): found
        for one, found in zip(fitting, _run_in_turn(device, workload, fitting), strict=True)
    }
    least = {name: min(found) for name, found in seconds.items()}
    if _name(*chosen) not in least:
        raise SystemExit(f"the plan {_name(*chosen)} for {case} does not fit in {budget_mib} MiB")
    best = min(least, key=lambda name: least[name])
    regret = least[_name(*chosen)] / least[best]
    print(
        f"{case:28s} {budget_mib:5,d} MiB  plan {_name(*chosen):24s} best {best:24s} {regret:.3f}",
        flush=True,
    )
    return {
        "case": case,
        "budget_bytes": budget.budget_bytes,
        "chosen": _name(*chosen),
        "predicted_seconds": plan.chosen.predicted_step_seconds,
        "best": best,
        "outcomes": outcomes,
        "seconds": seconds,
        "regret": regret,
    }


def _name(levers: Levers, micro_batch: int) -> str:
    return f"{levers.accumulation_steps} x {micro_batch} {levers.describe()}"


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json_text(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
