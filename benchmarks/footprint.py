"""Predicted against measured peak memory of one optimizer step, on the memory-capped CPU.

    python benchmarks/footprint.py [--quick] [--json FILE]

Every setting runs in a process of its own, one after the other: about 20 minutes on two cores,
`--quick` about two. An error above 0 % means that more memory was predicted than used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from bertbench.attached import resolve_device
from bertbench.devices import make_budget
from bertbench.footprint import SAFETY_MARGIN, predict_footprint
from bertbench.trial import measure_batches
from bertbench.workload import Levers, published_workload
from finetune.checkpointing import parse_checkpointing

# Model, head, sequence length, policy, accumulation steps, micro-batches.
QUICK = [
    ("bert-tiny", "squad", 64, "none", 1, (8, 64)),
    ("bert-mini", "squad", 128, "none", 1, (2, 16)),
    ("bert-mini", "squad", 128, "full", 1, (4, 64)),
    ("bert-mini", "classifier", 128, "full:2", 2, (32,)),
    ("bert-mini", "squad", 256, "selective", 1, (32,)),
    ("bert-mini", "squad", 256, "nested", 1, (64,)),
]
SETTINGS = [
    ("bert-mini", "squad", 128, "none", 1, (2, 8, 16, 32)),
    ("bert-mini", "squad", 128, "full", 1, (4, 32, 64)),
    ("bert-mini", "classifier", 128, "none", 1, (4, 32)),
    ("bert-mini", "classifier", 128, "full", 1, (32, 64)),
    ("bert-mini", "squad", 128, "none", 2, (2, 16)),
    ("bert-mini", "squad", 128, "full", 2, (4, 32)),
    ("bert-mini", "squad", 256, "none", 1, (8,)),
    ("bert-mini", "squad", 256, "full", 1, (16,)),
    ("bert-mini", "squad", 128, "full:2", 1, (16,)),
    ("bert-small", "squad", 128, "none", 1, (2, 8, 16)),
    ("bert-small", "squad", 128, "full", 1, (4, 16, 32)),
    ("bert-small", "squad", 64, "none", 4, (4, 16)),
    ("bert-small", "squad", 256, "full", 2, (8,)),
    ("bert-medium", "classifier", 128, "none", 1, (2, 8, 16)),
    ("bert-medium", "classifier", 128, "full", 1, (8, 32)),
    ("bert-medium", "squad", 128, "none", 1, (4, 16)),
    ("bert-medium", "squad", 128, "full", 1, (16, 32)),
    ("bert-medium", "squad", 128, "full:4", 1, (4, 8, 16)),
    ("bert-medium", "squad", 128, "full:6", 2, (4, 16)),
    ("bert-medium", "squad", 256, "none", 2, (4,)),
    ("bert-medium", "squad", 256, "full", 4, (8, 16)),
    ("bert-medium", "classifier", 256, "full:4", 2, (8,)),
    ("bert-medium", "squad", 384, "none", 1, (4,)),
    ("bert-medium", "squad", 384, "full", 1, (4, 8)),
    ("bert-mini", "squad", 128, "selective", 1, (8, 32)),
    ("bert-mini", "squad", 128, "nested", 1, (16, 128)),
    ("bert-small", "squad", 256, "selective", 2, (8,)),
    ("bert-small", "squad", 384, "nested", 2, (16,)),
    ("bert-medium", "squad", 128, "selective", 1, (8, 32)),
    ("bert-medium", "squad", 384, "nested", 1, (8, 32)),
    ("bert-medium", "squad", 256, "nested:4+selective", 1, (16,)),
    ("bert-tiny", "squad", 64, "none", 1, (8, 32, 64)),
    ("bert-tiny", "squad", 64, "full", 1, (64, 128)),
    ("bert-tiny", "classifier", 128, "none", 2, (16, 32)),
    ("bert-tiny", "classifier", 256, "full", 4, (16, 64)),
    ("bert-tiny", "squad", 256, "full:1", 1, (16, 32)),
    ("bert-tiny", "squad", 512, "none", 1, (8, 16)),
    ("bert-tiny", "squad", 512, "full", 1, (8, 16)),
    ("bert-base", "squad", 384, "none", 1, (1, 2)),
    ("bert-base", "squad", 384, "full", 1, (2, 4, 8)),
    ("bert-base", "squad", 384, "selective", 1, (4, 8)),
    ("bert-base", "squad", 384, "nested", 1, (4, 8)),
    ("bert-base", "squad", 128, "none", 1, (2,)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="nine settings instead of all")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()

    budget = make_budget(resolve_device("cpu"))
    rows: list[dict[str, Any]] = []
    print(f"{'setting':52s} {'predicted':>10s} {'measured':>10s} {'error':>7s}  at")
    for model, head, seq_len, policy, accumulation, batches in (
        QUICK if arguments.quick else SETTINGS
    ):
        workload = published_workload(model, seq_len, head)
        levers = Levers(parse_checkpointing(policy), accumulation_steps=accumulation)
        for trial in measure_batches(workload, levers, budget, batches, fresh=True):
            name = f"{model} {head} {seq_len} {policy} x{accumulation} batch {trial.batch}"
            if trial.peak_bytes is None:
                print(f"{name:52s} {trial.outcome}: {trial.message}", flush=True)
                continue
            predicted = predict_footprint(workload, levers, trial.batch)
            error = predicted.peak_bytes / trial.peak_bytes - 1
            print(
                f"{name:52s} {predicted.peak_bytes / 1e6:7,.0f} MB"
                f" {trial.peak_bytes / 1e6:7,.0f} MB {100 * error:+6.1f}%  {predicted.phase}",
                flush=True,
            )
            rows.append(
                {
                    "model": model,
                    "head": head,
                    "seq_len": seq_len,
                    "levers": levers.to_json(),
                    "batch": trial.batch,
                    "measured_bytes": trial.peak_bytes,
                    "predicted_bytes": predicted.peak_bytes,
                    "error": error,
                    "footprint": dataclasses.asdict(predicted),
                }
            )
    if not rows:
        raise SystemExit("nothing could be measured")
    errors = [row["error"] for row in rows]
    median = statistics.median(map(abs, errors))
    print(
        f"{len(rows)} trials; median absolute error {100 * median:.1f}%,"
        f" from {100 * min(errors):+.1f}% to {100 * max(errors):+.1f}%;"
        f" margin of the planner {100 * SAFETY_MARGIN:.0f}%"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"trials": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
