"""Random plans for products that need not be here: does what was planned compile to what fits?

    python benchmarks/compiled_plans.py [--quick] [--plans N] [--seed N] [--json FILE]

Each plan is for a random model, length, target batch and product, in a budget in which the fastest
setting does not fit. Its step is compiled for the product. 60 plans take about 40 minutes on two
quiet cores, `--quick` makes three. It needs `bertbench[compile-gpu]` and `bertbench[compile-tpu]`.

A ratio above 1 means that a plan was too large. What is told of plans with `--verify` is this with
another plan in place of those that were too large.

Results are written after each plan; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
from pathlib import Path
from typing import Any

from bertbench.compiling.compilation import compile_step
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.accelerators import ACCELERATORS, Accelerator
from bertbench.memory.compiled_prediction import CompiledPrediction
from bertbench.memory.room import Room
from bertbench.planning.compiled_evidence import planned_target
from bertbench.planning.planner import Plan, make_plan
from bertbench.planning.requests import PlanRequest, catalogue_device
from bertbench.planning.verify_compiled import compiled_step
from finetune.errors import InputError
from finetune.spec.precisions import EXACT_PRECISION
from finetune.storage.json_files import json_text, parse_json

_MODELS = ("bert-mini", "bert-small", "bert-small", "bert-medium", "bert-medium", "bert-base")
_TPU_MODELS = ("bert-tiny", "bert-mini")
"""A TPU's compiler takes minutes for larger ones."""

_LENGTHS = (64, 128, 256, 384, 512)
_TARGETS = (8, 16, 24, 32, 48, 64)
_TPU_EVERY = 10
_TPUS = ("tpu-v2-8", "tpu-v3-8", "tpu-v5e-8")
_SHARES = (0.3, 0.9)
"""Part of what the fastest setting would need that a plan gets."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three plans")
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="results, one line for each plan")
    arguments = parser.parse_args()
    known: dict[int, dict[str, Any]] = {}
    if arguments.json is not None and arguments.json.exists():
        lines = map(parse_json, arguments.json.read_text(encoding="utf-8").splitlines())
        known = {line["number"]: line for line in lines}
    count = 3 if arguments.quick else arguments.plans
    for number in range(count):
        if number not in known:
            known[number] = {"number": number, **compiled_plan(arguments.seed, number)}
            if arguments.json is not None:
                with arguments.json.open("a", encoding="utf-8") as file:
                    file.write(json_text(known[number]) + "\n")
        row = known[number]
        shown = row["message"] or f"{row['ratio']:.3f} of the budget"
        print(f"[{number + 1}/{count}] {row['setting']}: {shown}", flush=True)
    show([known[number] for number in range(count)])


def compiled_plan(seed: int, number: int) -> dict[str, Any]:
    """Make a random plan and compile its step."""
    draw = random.Random(seed * 100_003 + number)
    while True:
        try:
            accelerator, plan = random_plan(draw, is_tpu=number % _TPU_EVERY == _TPU_EVERY - 1)
        except InputError:
            continue  # Nothing fits: drawn again.
        if plan.rejected:
            break
    step = compiled_step(plan.chosen.step)
    device = catalogue_device(accelerator, plan.budget_bytes)
    target = planned_target(device)
    assert target is not None
    compilation = compile_step(step, target)
    workload, levers = step.workload, step.levers
    needed = None if compilation.memory is None else compilation.memory.device_bytes
    return {
        "setting": f"{workload.model} {workload.seq_len} {workload.head}, "
        f"{levers.accumulation_steps} x {step.micro_batch}, {levers.checkpointing}, "
        f"{levers.precision}, {accelerator.name}, {plan.budget_bytes // MIB_BYTES} MiB",
        "budget_bytes": plan.budget_bytes,
        "predicted_bytes": plan.chosen.footprint.peak_bytes,
        "compiled_bytes": needed,
        "fits": compilation.fits_in(step, accelerator.kind, plan.budget_bytes)
        and needed is not None
        and needed <= plan.budget_bytes,
        "ratio": 0.0 if needed is None else round(needed / plan.budget_bytes, 4),
        "seconds": round(compilation.seconds, 1),
        "message": compilation.message,
    }


def random_plan(draw: random.Random, *, is_tpu: bool) -> tuple[Accelerator, Plan]:
    """Draw a workload, a product and a budget, and plan for them."""
    names = [name for name, one in ACCELERATORS.items() if one.kind == "gpu"]
    accelerator = ACCELERATORS[draw.choice(_TPUS if is_tpu else names)]
    model = draw.choice(_TPU_MODELS if is_tpu else _MODELS)
    head = draw.choice(("squad", "classifier"))
    workload = published_workload(model, draw.choice(_LENGTHS), head)
    batch = draw.choice(_TARGETS) * (accelerator.replicas if is_tpu else 1)
    has_bf16 = is_tpu or (accelerator.compute_capability or 0.0) >= 8.0
    precision = "bf16" if has_bf16 and draw.random() < 0.3 else EXACT_PRECISION
    levers = Levers(precision=precision, xla=True)
    whole = CompiledPrediction(Setup(workload, levers), Room(accelerator.kind, 0))
    most_bytes = whole.peak_bytes(batch // accelerator.replicas)
    budget_bytes = int(draw.uniform(*_SHARES) * most_bytes) // MIB_BYTES * MIB_BYTES
    device = catalogue_device(accelerator, min(budget_bytes, accelerator.usable_bytes))
    request = PlanRequest(batch, allowed=(levers,), alternatives=False)
    return accelerator, make_plan(request, workload, dataclasses.replace(device, compiled={}))


def show(rows: list[dict[str, Any]]) -> None:
    """Sum the plans up."""
    compiled = [row for row in rows if row["compiled_bytes"] is not None]
    for kind in ("gpu", "tpu"):
        of_kind = [row for row in compiled if ("tpu" in row["setting"]) == (kind == "tpu")]
        if not of_kind:
            continue
        ratios = [row["ratio"] for row in of_kind]
        errors = [row["predicted_bytes"] / row["compiled_bytes"] - 1 for row in of_kind]
        print(
            f"{kind}: {len(of_kind)} plans, {sum(not row['fits'] for row in of_kind)} too large; "
            f"compiled bytes of the budget: median {statistics.median(ratios):.3f}, "
            f"{min(ratios):.3f} to {max(ratios):.3f}; "
            f"predicted {min(errors):+.1%} to {max(errors):+.1%}"
        )


if __name__ == "__main__":
    main()
