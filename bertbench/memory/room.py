"""What the memory of a step is compared with."""

from __future__ import annotations

import dataclasses

from bertbench.hardware.device import Budget
from bertbench.memory.allocator.bfc import Memory
from bertbench.memory.allocator.budget import memory_of
from bertbench.memory.compiled import CompiledSteps


@dataclasses.dataclass(frozen=True)
class Room:
    """What a step has to fit in.

    Attributes:
        device_kind: `cpu`, `gpu` or `tpu`.
        budget_bytes: what the allocator of one device may use.
        spare_bytes: what is to be left free of it.
        replicas: devices that share the effective batch, and so add up their gradients.
        margin: part of a prediction by a trace to add, as trials have shown, on a GPU or with
            another TensorFlow than that of the traces; None takes a margin that is safe.
        compiled: what the device's compiler has said of steps; only steps that XLA compiles read
            it.
    """

    device_kind: str
    budget_bytes: int
    spare_bytes: int = 0
    replicas: int = 1
    margin: float | None = None
    compiled: CompiledSteps = dataclasses.field(default_factory=dict, compare=False)

    def memory(self) -> Memory:
        """The allocator's memory."""
        return memory_of(self.device_kind, self.usable_bytes())

    def usable_bytes(self, margin: float = 0.0) -> int:
        """The largest prediction that fits with a margin added to it."""
        return int((self.budget_bytes - self.spare_bytes) / (1 + margin))


def room_of(budget: Budget) -> Room:
    """The room that a device has under a budget, for its replicas' steps."""
    return Room(budget.device.kind, budget.budget_bytes, replicas=budget.device.replicas)
