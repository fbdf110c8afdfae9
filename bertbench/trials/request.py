"""What a trial's process is asked to do, in a form that crosses to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bertbench.core.workload import Setup, levers_from_json, workload_from_json
from bertbench.hardware.device import Budget, budget_from_json


@dataclasses.dataclass(frozen=True)
class TrialRequest:
    """Batches to try in one process.

    Attributes:
        setup: workload and levers.
        budget: device, and the bytes of it that the allocator may use.
        batches: micro-batch sizes to run one after the other, rising.
        steps: optimizer steps to run for each.
        record: record what is asked of the allocator; for a single batch, and two steps more.
    """

    setup: Setup
    budget: Budget
    batches: tuple[int, ...]
    steps: int
    record: bool = False

    def __post_init__(self) -> None:
        """Refuse what no trial could answer."""
        if not self.batches or list(self.batches) != sorted({*self.batches}) or self.batches[0] < 1:
            raise ValueError(f"batches must be positive and rising, not {self.batches}")
        if self.steps < 1:
            raise ValueError(f"a trial needs at least one step, not {self.steps}")
        if self.record and len(self.batches) > 1:
            raise ValueError(f"one batch at a time is recorded, not {self.batches}")

    def to_payload(self) -> dict[str, Any]:
        """Plain values, to cross into another process."""
        return {
            "workload": dataclasses.asdict(self.setup.workload),
            "levers": self.setup.levers.to_json(),
            "budget": self.budget.to_json(),
            "batches": list(self.batches),
            "steps": self.steps,
            "record": self.record,
        }


def request_from_payload(payload: Mapping[str, Any]) -> TrialRequest:
    """Read what `TrialRequest.to_payload` wrote."""
    return TrialRequest(
        setup=Setup(workload_from_json(payload["workload"]), levers_from_json(payload["levers"])),
        budget=budget_from_json(payload["budget"]),
        batches=tuple(payload["batches"]),
        steps=int(payload["steps"]),
        record=bool(payload["record"]),
    )
