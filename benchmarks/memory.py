"""What a training step needs: bytes an example, bytes a parameter, largest batch, smallest cap.

    python benchmarks/memory.py [--quick] [--part NAME ...] [--json FILE]

Every figure comes from real optimizer steps with dropout, in float32 with AdamW where nothing else
is said. Without `--quick` every one of them has a process of its own. Step times are ratios within
one round, and the median of the rounds.

| part | what | two cores |
| --- | --- | --- |
| policies | slope and zero of the peak, and step time, for every checkpointing policy | 15 min |
| optimizers | the same for every optimizer | 2 min |
| precisions | for every precision that the device has | 2 min |
| xla | for XLA beside TensorFlow's own kernels | 9 min |
| maximum | the largest micro-batch in one piece that is predicted to fit, by a real step | 40 min |
| smallest | smallest budget in which an effective batch runs | 20 min |
| peer | speed beside KerasHub's BERT, if keras-hub is installed | 3 min |

`--quick`, on BERT-Mini and BERT-Tiny, takes two minutes for all. `--device` and `--memory` choose
another device or budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.hardware.device import Budget, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.footprint import predict_footprint
from bertbench.memory.formula_prediction import FormulaPrediction
from bertbench.memory.prediction import TracePrediction, predict_memory
from bertbench.memory.room import room_of
from bertbench.probing.limit_from_trace import is_traced
from bertbench.trials.measure import TrialSettings, measure_batches, measure_step
from bertbench.trials.trial import Trial
from finetune.spec.checkpointing import POLICIES, Checkpointing
from finetune.spec.config import parameter_count
from finetune.spec.optimizers import OPTIMIZERS
from finetune.spec.precisions import PRECISIONS
from finetune.storage.json_files import json_text

TIMEOUT_SECONDS = 7200.0


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the benchmark is run on.

    Attributes:
        workload: of `policies`.
        batches: the two micro-batches whose peaks give the slope.
        light: of `optimizers`, `precisions` and `xla`.
        light_batches: likewise.
        accumulated: policies of `policies` that are run with two micro-batches too.
        compiled: policies of `xla`.
        memory_mib: default budget.
        largest: workloads of `maximum`.
        smallest: workload and effective batch of `smallest`.
        peer: workload and batch of `peer`.
        rounds: of timing, besides the trials that measure peaks.
        tolerance: of the borders that `maximum` and `smallest` look for.
    """

    workload: Workload
    batches: tuple[int, int]
    light: Workload
    light_batches: tuple[int, int]
    accumulated: tuple[str, ...]
    compiled: tuple[str, ...]
    memory_mib: int
    largest: tuple[Workload, ...]
    smallest: tuple[Workload, int]
    peer: tuple[Workload, int]
    rounds: int
    tolerance: float


FULL = Scale(
    workload=published_workload("bert-base", 384),
    batches=(4, 8),
    light=published_workload("bert-small", 128),
    light_batches=(8, 32),
    accumulated=POLICIES,
    compiled=POLICIES,
    memory_mib=11_430,
    largest=(published_workload("bert-base", 384), published_workload("bert-large", 384)),
    smallest=(published_workload("bert-large", 384), 24),
    peer=(published_workload("bert-base", 128, "classifier"), 8),
    rounds=3,
    tolerance=0.02,
)
QUICK = Scale(
    workload=published_workload("bert-mini", 128),
    batches=(8, 16),
    light=published_workload("bert-tiny", 64),
    light_batches=(64, 128),
    accumulated=("nested",),
    compiled=("none",),
    memory_mib=512,
    largest=(published_workload("bert-mini", 128),),
    smallest=(published_workload("bert-mini", 128), 24),
    peer=(published_workload("bert-mini", 128, "classifier"), 8),
    rounds=0,
    tolerance=0.15,
)


def main() -> None:
    parts: dict[str, Callable[[Scale, Budget], list[dict[str, Any]]]] = {
        "policies": policies,
        "optimizers": optimizers,
        "precisions": precisions,
        "xla": xla,
        "maximum": maximum,
        "smallest": smallest,
        "peer": peer,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="small models instead of Base and Large"
    )
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=int, metavar="MIB", help="budget in MiB")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--keras-hub", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    if arguments.keras_hub:
        print(json_text(time_keras_hub(scale, *map(int, arguments.keras_hub))))
        return
    mebibytes = arguments.memory or scale.memory_mib
    budget = make_budget(resolve_device(arguments.device), mebibytes * MIB_BYTES)
    results: dict[str, Any] = {"budget": budget.to_json()}
    for name in arguments.part:
        results[name] = parts[name](scale, budget)
        if arguments.json:
            arguments.json.write_text(json_text(results, indent=2) + "\n", encoding="utf-8")


def policies(scale: Scale, budget: Budget) -> list[dict[str, Any]]:
    """Every checkpointing policy, with one micro-batch and with two."""
    settings = [
        Levers(Checkpointing(policy), accumulation_steps=steps)
        for policy in POLICIES
        for steps in ((1, 2) if policy in scale.accumulated else (1,))
    ]
    return _compare(scale, scale.workload, scale.batches, budget, settings)


def optimizers(scale: Scale, budget: Budget) -> list[dict[str, Any]]:
    """Every optimizer, where activations need little."""
    policy = Checkpointing("nested")
    settings = [Levers(policy, optimizer=optimizer) for optimizer in OPTIMIZERS]
    return _compare(scale, scale.light, scale.light_batches, budget, settings)


def precisions(scale: Scale, budget: Budget) -> list[dict[str, Any]]:
    """Every precision; a CPU has no TensorFloat-32."""
    names = [name for name in PRECISIONS if name != "tf32" or budget.device.kind == "gpu"]
    settings = [Levers(precision=name) for name in names]
    return _compare(scale, scale.light, scale.light_batches, budget, settings)


def xla(scale: Scale, budget: Budget) -> list[dict[str, Any]]:
    """XLA beside TensorFlow's own kernels."""
    return [
        row
        for policy in scale.compiled
        for row in _compare(
            scale,
            scale.light,
            scale.light_batches,
            budget,
            [Levers(Checkpointing(policy), xla=compiled) for compiled in (False, True)],
        )
    ]


def _compare(
    scale: Scale,
    workload: Workload,
    batches: tuple[int, int],
    budget: Budget,
    settings: list[Levers],
) -> list[dict[str, Any]]:
    """Slope of the peak, what is left at zero examples, and step time beside the first setting's.

    The step time of two micro-batches is that of an effective batch twice as large, so that only
    the settings with one are compared.
    """
    small, large = batches
    parameters = parameter_count(workload.config, workload.head, workload.num_labels)
    print(f"{workload.model}, sequence length {workload.seq_len}, {parameters:,} parameters")
    print(f"{'levers':20s} {'MB/example':>10s} {'bytes/parameter at 0':>20s} {'time':>5s}  peaks")
    rows: list[dict[str, Any]] = []
    for levers in settings:
        trials = measure_batches(
            Setup(workload, levers),
            budget,
            batches,
            TrialSettings(2 if scale.rounds else 4, TIMEOUT_SECONDS, fresh=scale is FULL),
        )
        peaks = [_peak(trial) for trial in trials]
        slope = (peaks[1] - peaks[0]) / (large - small)
        rows.append(
            {
                "model": workload.model,
                "seq_len": workload.seq_len,
                "levers": levers.to_json(),
                "batches": [small, large],
                "peak_bytes": peaks,
                "bytes_per_example": slope,
                "bytes_per_parameter": (peaks[0] - slope * small) / parameters,
                "step_seconds": [trials[-1].step_seconds or math.nan],
            }
        )
    timed = [
        (levers, row)
        for levers, row in zip(settings, rows, strict=True)
        if levers.accumulation_steps == 1
    ]
    if scale.rounds:
        for _, row in timed:
            row["step_seconds"] = []
    for _ in range(scale.rounds):
        for levers, row in timed:
            trial = _trial(workload, levers, budget, large, steps=4)
            row["step_seconds"].append(trial.step_seconds or math.nan)
    first = rows[0]["step_seconds"]
    for _, row in timed:
        ratios = [a / b for a, b in zip(row["step_seconds"], first, strict=True)]
        row["time_ratio"] = statistics.median(ratios)
    for levers, row in zip(settings, rows, strict=True):
        steps = f" x{levers.accumulation_steps}" if levers.accumulation_steps > 1 else ""
        ratio = f"{row['time_ratio']:.2f}" if "time_ratio" in row else ""
        print(
            f"{levers.describe() + steps:20s} {row['bytes_per_example'] / 1e6:10.1f}"
            f" {row['bytes_per_parameter']:20.2f} {ratio:>5s}  "
            + ", ".join(f"{peak / 1e6:,.0f} MB" for peak in row["peak_bytes"]),
            flush=True,
        )
    return rows


def maximum(scale: Scale, budget: Budget) -> list[dict[str, Any]]:
    """The largest micro-batch in one piece, as predicted, by one real step; less if it fails.

    No certificate: `bertbench probe` gives those. Here a step takes up to half an hour.
    """
    levers = Levers(Checkpointing("nested"))
    rows: list[dict[str, Any]] = []
    for workload in scale.largest:
        batch = _predicted_limit(workload, levers, budget)
        while True:
            trial = _trial(workload, levers, budget, batch, steps=1)
            rows.append(_row(workload, levers, trial, budget))
            if trial.outcome != "oom" or batch == 1:
                break
            batch -= max(1, round(scale.tolerance * batch))
    return rows


def _predicted_limit(workload: Workload, levers: Levers, budget: Budget) -> int:
    setup, room, found = Setup(workload, levers), room_of(budget), 0
    if is_traced(budget, setup):
        found = TracePrediction(setup, room).max_micro_batch()
    return found or FormulaPrediction(setup, room).max_micro_batch()


def smallest(scale: Scale, budget: Budget) -> list[dict[str, Any]]:
    """Smallest budget in which an effective batch runs, by two steps in it and in little less.

    A step with room to spare tells where to begin: no budget below its peak can hold it.
    """
    workload, target = scale.smallest
    settings = [
        (Levers(Checkpointing("nested"), accumulation_steps=steps), math.ceil(target / steps))
        for steps in range(1, target + 1)
    ]
    levers, batch = min(
        settings, key=lambda s: predict_footprint(Setup(workload, s[0]).step(s[1])).peak_bytes
    )
    predicted = predict_footprint(Setup(workload, levers).step(batch)).peak_bytes
    rows: list[dict[str, Any]] = []

    def attempt(mebibytes: int) -> Trial:
        limited = make_budget(budget.device, mebibytes * MIB_BYTES)
        trial = _trial(workload, levers, limited, batch, steps=2)
        rows.append({**_row(workload, levers, trial, limited), "memory_mib": mebibytes})
        print(f"    at {mebibytes:,} MiB, effective batch {target}", flush=True)
        return trial

    spacious = attempt(predicted * 3 // 2 // MIB_BYTES)
    if spacious.outcome != "fits":
        return rows
    mebibytes = math.ceil(_peak(spacious) / MIB_BYTES)
    outcomes: set[str] = set()
    while not ("failed" in outcomes or {"fits", "oom"} <= outcomes):
        outcome = attempt(mebibytes).outcome
        outcomes.add(outcome)
        step = max(1, round(scale.tolerance * mebibytes))
        mebibytes += -step if outcome == "fits" else step
    return rows


def peer(scale: Scale, budget: Budget) -> list[dict[str, Any]]:
    """Step time of `none` beside KerasHub's BERT with AdamW, in turns."""
    workload, batch = scale.peer
    if importlib.util.find_spec("keras_hub") is None:
        print("keras_hub is not installed: no peer")
        return []
    command = [sys.executable, __file__, *(["--quick"] if scale is QUICK else [])]
    rows: list[dict[str, Any]] = []
    for _ in range(scale.rounds):
        ours = _trial(workload, Levers(), budget, batch, steps=8).step_seconds or math.nan
        output = subprocess.run(
            [*command, "--keras-hub", str(batch), "8"], check=True, capture_output=True, text=True
        )
        theirs = json.loads(output.stdout.splitlines()[-1])["step_seconds"]
        rows.append({"batch": batch, "step_seconds": ours, "keras_hub_step_seconds": theirs})
        print(
            f"batch {batch}, seq {workload.seq_len}: ours {batch / ours:.2f} examples/s,"
            f" KerasHub {batch / theirs:.2f}, ratio {theirs / ours:.3f}",
            flush=True,
        )
    return rows


def time_keras_hub(scale: Scale, batch: int, steps: int) -> dict[str, float]:
    """Median seconds of KerasHub's compiled training step; runs in a process of its own."""
    import keras
    import keras_hub
    import numpy as np

    workload, _ = scale.peer
    config = workload.config
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        dropout=0.1,
        max_sequence_length=config.max_position_embeddings,
    )
    model = keras_hub.models.BertTextClassifier(backbone=backbone, num_classes=2, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-5, weight_decay=0.01, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    shape = (batch, workload.seq_len)
    generator = np.random.default_rng(0)
    rows = {
        "token_ids": generator.integers(0, config.vocab_size, shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "padding_mask": np.ones(shape, np.int32),
    }
    labels = generator.integers(0, 2, batch, np.int32)
    seconds = []
    for _ in range(steps):
        began = time.monotonic()
        model.train_on_batch(rows, labels)
        seconds.append(time.monotonic() - began)
    return {"step_seconds": statistics.median(seconds[1:])}


def _trial(workload: Workload, levers: Levers, budget: Budget, batch: int, steps: int) -> Trial:
    step = Setup(workload, levers).step(batch)
    return measure_step(step, budget, TrialSettings(steps, TIMEOUT_SECONDS))


def _peak(trial: Trial) -> int:
    if trial.peak_bytes is None:
        raise SystemExit(f"batch {trial.batch}: {trial.outcome}: {trial.message}")
    return trial.peak_bytes


def _row(workload: Workload, levers: Levers, trial: Trial, budget: Budget) -> dict[str, Any]:
    prediction = predict_memory(Setup(workload, levers), room_of(budget))
    predicted = prediction.footprint(trial.batch).peak_bytes
    peak = f"{trial.peak_bytes / MIB_BYTES:,.0f} MiB" if trial.peak_bytes else trial.message[:40]
    print(
        f"{workload.model} {workload.seq_len} {levers.checkpointing}"
        f" {trial.batch} x {levers.accumulation_steps}: {trial.outcome}, {peak}"
        f" (predicted {predicted / MIB_BYTES:,.0f} MiB), {trial.seconds:.0f} s",
        flush=True,
    )
    return {
        "model": workload.model,
        "seq_len": workload.seq_len,
        "levers": levers.to_json(),
        "predicted_bytes": predicted,
        **trial.to_json(),
    }


if __name__ == "__main__":
    main()
