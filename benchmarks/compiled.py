"""What compilers say that a step needs, checked where it can be, and asked where it cannot.

    python benchmarks/compiled.py [--quick] [--part check|policies] [--gpu NAME,NAME] [--json FILE]

`check` compiles steps for this machine's CPU and runs the same steps as trials, one after the
other: 62 settings take about an hour on two cores, `--quick` 4 in three minutes. An error above 0 %
means that more memory was predicted than used. Predicted is
what TensorFlow's allocator makes of the compiler's sum, see
`bertbench.memory.compiled.replay_compiled`.

`policies` compiles steps of two micro-batches for accelerators that need not be here, and tells the
bytes of each further example by checkpointing policy. It needs `bertbench[compile-gpu]` or
`bertbench[compile-tpu]`.

Results are written after each setting; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bertbench.compiling.compilation import compile_step
from bertbench.compiling.installed import compiler_versions
from bertbench.compiling.target import CPU_TARGET, compile_target
from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, Setup, TrainingStep, published_workload
from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.allocator.budget import memory_of
from bertbench.memory.compiled import compiled_memory_from_json, replay_compiled
from bertbench.trials.measure import TrialSettings, measure_step
from finetune.spec.checkpointing import parse_checkpointing
from finetune.storage.json_files import json_text, parse_json

_BUDGET_BYTES = 6 * GIB_BYTES

# Model, sequence length, micro-batch, number of micro-batches.
_SHAPES = (
    ("bert-tiny", 64, 16, 1),
    ("bert-tiny", 128, 12, 3),
    ("bert-tiny", 512, 4, 1),
    ("bert-mini", 64, 16, 3),
    ("bert-mini", 128, 8, 1),
    ("bert-mini", 384, 4, 2),
    ("bert-small", 128, 16, 1),
    ("bert-small", 256, 4, 2),
    ("bert-medium", 128, 6, 1),
)
_POLICIES = ("none", "selective", "full", "nested", "full:1", "nested:1+selective")
_LARGE = (
    ("bert-base", 128, 4, 1, "none"),
    ("bert-base", 128, 4, 2, "selective"),
    ("bert-base", 128, 8, 1, "full"),
    ("bert-base", 128, 8, 1, "nested"),
)
_HEADS = ("squad", "classifier")
_PRECISIONS = ("float32", "float32", "bf16")
_QUICK = 4


def check_steps() -> Iterator[TrainingStep]:
    """The steps of part `check`: heads and precisions take turns."""
    small = [(*shape, policy) for shape, policy in itertools.product(_SHAPES, _POLICIES)]
    for index, (model, seq_len, micro_batch, count, policy) in enumerate([*small, *_LARGE]):
        turn = index + index // len(_POLICIES)
        head, precision = _HEADS[turn % len(_HEADS)], _PRECISIONS[turn % len(_PRECISIONS)]
        levers = Levers(parse_checkpointing(policy), count, precision, xla=True)
        yield Setup(published_workload(model, seq_len, head), levers).step(micro_batch)
    workload = published_workload("bert-mini", 128)
    for optimizer in ("lion", "adafactor"):
        for count in (1, 2):
            levers = Levers(accumulation_steps=count, optimizer=optimizer, xla=True)
            yield Setup(workload, levers).step(8)


def name_of(step: TrainingStep) -> str:
    """Write a step as one line."""
    workload, levers = step.workload, step.levers
    return (
        f"{workload.model} {workload.seq_len} {workload.head}, {levers.accumulation_steps} x "
        f"{step.micro_batch}, {levers.checkpointing}, {levers.precision}, {levers.optimizer}"
    )


def check(step: TrainingStep) -> dict[str, Any]:
    """Compile a step for the CPU, run it, and compare."""
    compilation = compile_step(step, CPU_TARGET)
    trial = measure_step(
        step, make_budget(resolve_device("cpu"), _BUDGET_BYTES), TrialSettings(steps=2)
    )
    if compilation.memory is None or trial.peak_bytes is None:
        return {"message": compilation.message or trial.message}
    return {
        **compilation.memory.to_json(),
        "measured_bytes": trial.peak_bytes,
        "compile_seconds": round(compilation.seconds, 1),
    }


def error_of(step: TrainingStep, row: Mapping[str, Any]) -> float:
    """Part by which the prediction is larger than what was measured."""
    memory = compiled_memory_from_json(row)
    predicted = replay_compiled(step, memory, memory_of("cpu", _BUDGET_BYTES))
    return predicted.peak_bytes / int(row["measured_bytes"]) - 1


def policies(step: TrainingStep, name: str) -> dict[str, Any]:
    """Compile a step and one of half its micro-batch; tell the bytes of an example."""
    accelerator = find_accelerator(name)
    target = compile_target(accelerator)
    half = dataclasses.replace(step, micro_batch=step.micro_batch // 2)
    both = [compile_step(one, target) for one in (half, step)]
    if any(one.memory is None for one in both):
        return {"message": " ".join(one.message for one in both)}
    smaller, larger = (one.memory.device_bytes for one in both if one.memory is not None)
    return {
        "bytes": [smaller, larger],
        "program_bytes": both[1].memory.program_bytes if both[1].memory else 0,
        "bytes_per_example": (larger - smaller) / (step.micro_batch - half.micro_batch),
        "compile_seconds": [round(one.seconds, 1) for one in both],
    }


def policy_steps(quick: bool) -> Iterator[TrainingStep]:
    """The steps of part `policies`: BERT-Base at 384, or BERT-Mini at 128."""
    workload = published_workload(*(("bert-mini", 128) if quick else ("bert-base", 384)))
    for precision in ("float32", "bf16"):
        for policy in ("none", "selective", "full", "nested"):
            levers = Levers(parse_checkpointing(policy), precision=precision, xla=True)
            yield Setup(workload, levers).step(16)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=("check", "policies"), default="check")
    parser.add_argument("--gpu", default="a100,tpu-v2-8", help="products of the catalogue")
    parser.add_argument("--json", type=Path, help="results, one line for each setting")
    arguments = parser.parse_args()
    known: dict[str, Any] = {}
    if arguments.json is not None and arguments.json.exists():
        lines = map(parse_json, arguments.json.read_text(encoding="utf-8").splitlines())
        known = {line["setting"]: line for line in lines}
    names = arguments.gpu.split(",") if arguments.part == "policies" else [""]
    steps = check_steps() if arguments.part == "check" else policy_steps(arguments.quick)
    work = [(step, name) for name in names for step in steps_of(list(steps), arguments)]
    errors = []
    for number, (step, name) in enumerate(work, 1):
        setting = f"{name} {name_of(step)}".strip()
        if setting not in known:
            found = check(step) if arguments.part == "check" else policies(step, name)
            kind = find_accelerator(name).kind if name else "cpu"
            known[setting] = {"setting": setting, **found, "versions": compiler_versions(kind)}
            if arguments.json is not None:
                with arguments.json.open("a", encoding="utf-8") as file:
                    file.write(json_text(known[setting]) + "\n")
        row = known[setting]
        if "measured_bytes" in row:
            errors.append(error_of(step, row))
            shown = f"{errors[-1]:+.3%} of {row['measured_bytes']:,} bytes"
        elif "bytes_per_example" in row:
            shown = f"{row['bytes_per_example'] / 1e6:.1f} MB an example"
        else:
            shown = row["message"]
        print(f"[{number}/{len(work)}] {setting}: {shown}", flush=True)
    if errors:
        sizes = sorted(map(abs, errors))
        print(
            f"{len(errors)} settings: median error {statistics.median(sizes):.3%}, "
            f"worst {sizes[-1]:.3%}, from {min(errors):+.3%} to {max(errors):+.3%}"
        )


def steps_of(steps: list[TrainingStep], arguments: argparse.Namespace) -> list[TrainingStep]:
    """All steps, or the first few with `--quick`."""
    return steps[:_QUICK] if arguments.quick and arguments.part == "check" else steps


if __name__ == "__main__":
    main()
