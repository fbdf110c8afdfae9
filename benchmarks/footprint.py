"""Predicted against measured peak memory of one optimizer step, on the memory-capped CPU.

    python benchmarks/footprint.py [--quick] [--models ...] [--precision NAME] [--optimizer NAME]
        [--activation NAME] [--json FILE]

Every setting runs in a process of its own, one after the other: about 40 minutes on two cores for
160 settings, `--quick` about three. An error above 0 % means that more memory was predicted than
used. `exact` is the replay of a step trace, `parts` what its footprint adds up to without one, and
`formula` what is predicted where there is no trace.

None of these models was used to make the step traces: those come from models of width 96 with 5 to
11 layers (`benchmarks/record_step_traces.py`). The formula's few free numbers were chosen by eye on
some of these settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.hardware.device import Budget, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.footprint import predict_footprint
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import room_of
from bertbench.trials.measure import TrialSettings, measure_step
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import ACTIVATIONS
from finetune.spec.optimizers import OPTIMIZERS
from finetune.spec.precisions import PRECISIONS
from finetune.storage.json_files import json_text

_POLICIES = {
    "bert-tiny": ("none", "selective", "full", "nested"),
    "bert-mini": ("none", "selective", "full", "nested", "full:2", "nested:2+selective"),
    "bert-small": ("none", "selective", "full", "nested", "selective:2", "nested:3"),
    "bert-medium": (
        "none", "selective", "full", "nested",
        "selective:5", "full:4", "nested:6", "nested:3+selective",
    ),
    "bert-base": ("none", "selective", "full", "nested", "selective:4", "nested:7+selective"),
    "bert-large": ("none", "nested:20"),
}  # fmt: skip

# Sequence length, micro-batch and number of micro-batches; the head alternates.
_SHAPES = {
    "bert-tiny": ((64, 16, 1), (64, 100, 1), (128, 24, 3), (256, 7, 1), (384, 12, 2), (512, 16, 1)),
    "bert-mini": ((64, 8, 1), (96, 32, 1), (128, 13, 2), (128, 64, 1), (256, 16, 1), (384, 6, 4)),
    "bert-small": ((64, 4, 4), (64, 48, 1), (128, 16, 1), (192, 9, 2), (256, 8, 1), (512, 5, 1)),
    "bert-medium": ((64, 11, 2), (128, 4, 1), (128, 24, 1), (256, 10, 2), (384, 6, 1)),
    "bert-base": ((64, 8, 1), (128, 4, 2), (384, 3, 1)),
    "bert-large": ((128, 2, 2),),
}
_QUICK = ("bert-tiny", "bert-mini")


def settings(models: Sequence[str]) -> Iterator[tuple[Workload, Levers, int]]:
    """All settings, in an order in which heads and policies alternate."""
    number = 0
    for model in models:
        for seq_len, micro_batch, steps in _SHAPES[model]:
            for policy in _POLICIES[model]:
                number += 1
                head = "classifier" if number % 3 == 0 else "squad"
                levers = Levers(parse_checkpointing(policy), accumulation_steps=steps)
                yield published_workload(model, seq_len, head), levers, micro_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every sixth of the small ones")
    parser.add_argument("--models", nargs="+", choices=list(_SHAPES), default=list(_SHAPES))
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=OPTIMIZERS[0])
    parser.add_argument("--activation", choices=ACTIVATIONS, default=ACTIVATIONS[0])
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    budget = make_budget(resolve_device("cpu"))
    chosen = [
        (_with_activation(workload, arguments.activation), _with(levers, arguments), micro_batch)
        for workload, levers, micro_batch in settings(
            _QUICK if arguments.quick else arguments.models
        )
    ]
    rows: list[dict[str, Any]] = []
    print(f"{'setting':50s} {'measured':>10s} {'exact':>8s} {'parts':>8s} {'formula':>8s}")
    for workload, levers, micro_batch in chosen[:: 7 if arguments.quick else 1]:
        row = _measure(budget, workload, levers, micro_batch)
        rows.append(row)
        _show(row)
        if arguments.json:
            text = json_text({"trials": rows}, indent=2)
            arguments.json.write_text(text + "\n", encoding="utf-8")
    measured = [row for row in rows if row["measured_bytes"] is not None]
    for kind in ("exact", "parts", "formula"):
        errors = [row[kind] for row in measured if row[kind] is not None]
        if errors:
            print(
                f"{kind}: {len(errors)} settings, median absolute error "
                f"{100 * statistics.median(map(abs, errors)):.2f}%, from "
                f"{100 * min(errors):+.2f}% to {100 * max(errors):+.2f}%"
            )


def _with(levers: Levers, arguments: argparse.Namespace) -> Levers:
    return dataclasses.replace(levers, precision=arguments.precision, optimizer=arguments.optimizer)


def _with_activation(workload: Workload, activation: str) -> Workload:
    config = dataclasses.replace(workload.config, hidden_act=activation)
    return dataclasses.replace(workload, config=config)


def _measure(
    budget: Budget, workload: Workload, levers: Levers, micro_batch: int
) -> dict[str, Any]:
    step = Setup(workload, levers).step(micro_batch)
    trial = measure_step(step, budget, TrialSettings(steps=2))
    predicted: dict[str, int] = {"formula": predict_footprint(step).peak_bytes}
    prediction = predict_memory(step.setup, room_of(budget))
    traced = prediction.source == "trace"
    if traced:
        for kind, replayed in (("exact", True), ("parts", False)):
            footprint = prediction.footprint(micro_batch, replayed=replayed)
            predicted[kind] = footprint.peak_bytes
    measured = trial.peak_bytes
    return {
        "model": workload.model,
        "head": workload.head,
        "seq_len": workload.seq_len,
        "levers": levers.to_json(),
        "micro_batch": micro_batch,
        "outcome": trial.outcome,
        "message": trial.message,
        "measured_bytes": measured,
        "predicted_bytes": predicted,
        "step_seconds": trial.step_seconds,
        **{
            kind: predicted[kind] / measured - 1 if measured and kind in predicted else None
            for kind in ("exact", "parts", "formula")
        },
    }


def _show(row: dict[str, Any]) -> None:
    levers = row["levers"]
    name = (
        f"{row['model']} {row['head']} {row['seq_len']} {levers['checkpointing']} "
        f"{levers['accumulation_steps']} x {row['micro_batch']}"
    )
    if row["measured_bytes"] is None:
        print(f"{name:50s} {row['outcome']}: {row['message']}", flush=True)
        return
    errors = "".join(
        f" {'-' if row[kind] is None else f'{100 * row[kind]:+.2f}%':>8s}"
        for kind in ("exact", "parts", "formula")
    )
    print(f"{name:50s} {row['measured_bytes'] / 1e6:7,.0f} MB{errors}", flush=True)


if __name__ == "__main__":
    main()
