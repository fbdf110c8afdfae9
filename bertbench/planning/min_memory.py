"""The planner's question the other way round: the smallest memory for a target batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Setup, TrainingStep, Workload
from bertbench.memory.prediction import (
    SAFETY_MARGIN,
    min_budget_bytes,
    note_other_tensorflow,
    predict_memory,
)
from bertbench.memory.room import Room
from bertbench.planning.candidates import all_levers, cuts
from bertbench.planning.requests import PlanRequest
from finetune.spec.checkpointing import POLICIES, Checkpointing


@dataclasses.dataclass(frozen=True)
class MinMemory:
    """The smallest budget for a target batch.

    Attributes:
        step: the training step that fits in it.
        budget_bytes: whole MiB.
        device_kind: `cpu`, `gpu` or `tpu`, that it is for.
    """

    step: TrainingStep
    budget_bytes: int
    device_kind: str

    @property
    def on_gpu_bytes(self) -> int:
        """The smallest budget on a GPU, where a plan keeps a margin."""
        margin = 0.0 if self.device_kind == "gpu" else SAFETY_MARGIN
        return math.ceil(self.budget_bytes * (1 + margin))

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "model": self.step.workload.model,
            "head": self.step.workload.head,
            "seq_len": self.step.workload.seq_len,
            "min_memory_bytes": self.budget_bytes,
            "micro_batch": self.step.micro_batch,
            **self.step.levers.to_json(),
        }


def find_min_memory(
    request: PlanRequest,
    workload: Workload,
    device_kind: str,
    *,
    replicas: int = 1,
    max_replayed: int | None = None,
) -> MinMemory:
    """Find the smallest budget for a target batch.

    Args:
        request: the target, and what may be chosen from. Without policies it is one policy for all
            layers, as a mixture of two does not need less than both of them.
        workload: what is trained.
        device_kind: `cpu`, `gpu` or `tpu`.
        replicas: devices that share the target; the budget is that of each.
        max_replayed: number of settings that are replayed, those with the smallest predicted
            peaks; None for all.
    """
    if device_kind != "tpu":
        note_other_tensorflow()
    if request.policies is None:
        request = dataclasses.replace(request, policies=[*map(Checkpointing, POLICIES)])
    share = math.ceil(request.target_batch / replicas)
    steps = [
        Setup(workload, dataclasses.replace(levers, accumulation_steps=count)).step(micro_batch)
        for levers in all_levers(request, workload)
        for micro_batch, count in cuts(share)
    ]
    room = Room(device_kind, 0, replicas=replicas)
    peaks = [(predict_memory(s.setup, room).peak_bytes(s.micro_batch), s) for s in steps]
    best: MinMemory | None = None
    for peak_bytes, step in sorted(peaks, key=lambda peak: peak[0])[:max_replayed]:
        if best is not None:
            below = Room(device_kind, best.budget_bytes - MIB_BYTES, replicas=replicas)
            if peak_bytes > below.budget_bytes:
                continue
            if not predict_memory(step.setup, below).fits(step.micro_batch):
                continue
        budget_bytes = min_budget_bytes(step, device_kind, replicas=replicas)
        best = MinMemory(step, budget_bytes, device_kind)
    assert best is not None
    return best
