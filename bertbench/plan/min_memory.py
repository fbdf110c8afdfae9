"""The planner's question the other way round: the smallest memory for a target batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Workload
from bertbench.memory.fit import Room, fits, least_budget_bytes, least_peak_bytes
from bertbench.memory.footprint import SAFETY_MARGIN
from bertbench.plan.candidates import all_settings, cuts
from finetune.spec.checkpointing import POLICIES, Checkpointing


@dataclasses.dataclass(frozen=True)
class LeastMemory:
    """The smallest budget for a target batch.

    Attributes:
        workload: what is trained.
        levers: those that need least.
        micro_batch: likewise.
        budget_bytes: whole MiB.
        device_kind: that it is for.
    """

    workload: Workload
    levers: Levers
    micro_batch: int
    budget_bytes: int
    device_kind: str

    @property
    def on_gpu_bytes(self) -> int:
        """The same on a GPU, where a plan keeps a margin."""
        margin = 0.0 if self.device_kind == "gpu" else SAFETY_MARGIN
        return math.ceil(self.budget_bytes * (1 + margin))

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "model": self.workload.model,
            "head": self.workload.head,
            "seq_len": self.workload.seq_len,
            "min_memory_bytes": self.budget_bytes,
            "micro_batch": self.micro_batch,
            **self.levers.to_json(),
        }


def find_least_memory(
    workload: Workload,
    target_batch: int,
    policies: Sequence[Checkpointing] | None,
    allowed: Sequence[Levers],
    device_kind: str,
    *,
    looked_at: int | None = None,
    replicas: int = 1,
) -> LeastMemory:
    """Find the smallest budget for a target.

    Args:
        workload: what is trained.
        target_batch: effective batch.
        policies: checkpointing to choose from; None for one policy for all layers, for a mixture of
            two does not need less than both of them.
        allowed: the other levers; the number of micro-batches is free.
        device_kind: `cpu`, `gpu` or `tpu`.
        looked_at: how many of the settings that hold least are replayed; None for all.
        replicas: devices that share the target; the budget is that of each.
    """
    settings = all_settings(workload, policies or [*map(Checkpointing, POLICIES)], allowed)
    room = Room(device_kind, 0, replicas=replicas)
    least = sorted(
        (
            (least_peak_bytes(workload, levers, micro_batch, room), micro_batch, levers)
            for setting in settings
            for micro_batch, steps in cuts(math.ceil(target_batch / replicas))
            for levers in (dataclasses.replace(setting, accumulation_steps=steps),)
        ),
        key=lambda one: one[0],
    )
    best: LeastMemory | None = None
    for peak_bytes, micro_batch, levers in least[:looked_at]:
        if best is not None:
            below = Room(device_kind, best.budget_bytes - MIB_BYTES, replicas=replicas)
            if peak_bytes > below.budget_bytes or not fits(workload, levers, micro_batch, below):
                continue
        needed = least_budget_bytes(workload, levers, micro_batch, device_kind, replicas=replicas)
        best = LeastMemory(workload, levers, micro_batch, needed, device_kind)
    assert best is not None
    return best
