"""What a compiler says that a program needs of a device's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bertbench.core.workload import Setup, TrainingStep
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES, Memory, Replay, replay
from bertbench.memory.allocator.budget import memory_of
from bertbench.memory.traces.step_requests import state_requests
from finetune.errors import InputError
from finetune.spec.config import INPUT_NAMES, TARGET_NAMES
from finetune.storage.json_files import MAX_WHOLE, get_whole

_PARTS = ("argument_bytes", "output_bytes", "temporary_bytes", "program_bytes")


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes of one device that a compiled step needs, as XLA's buffer assignment counts them.

    Example:
        >>> CompiledMemory(133_275_776, 1_000, 158_221_392, 0).device_bytes
        291498168

    Attributes:
        argument_bytes: model, optimizer state and batch.
        output_bytes: results that are in memory of their own. Updated variables are in the memory
            of their arguments, so this is a few thousand bytes.
        temporary_bytes: everything that lives only during the step, in one buffer: activations,
            gradients, workspaces.
        program_bytes: the program itself, where it is in the device's memory, as on a TPU. XLA
            reports none for GPUs, where it is a few MiB.
    """

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    program_bytes: int

    @property
    def device_bytes(self) -> int:
        """All of them together."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.program_bytes

    def to_json(self) -> dict[str, int]:
        """Values for JSON."""
        return dataclasses.asdict(self)


CompiledSteps = Mapping[Setup, Mapping[int, CompiledMemory | None]]
"""What a device's compiler has said: by setup and micro-batch, what the step needs. None stands
for a step that it refused because the device's memory is too small, as a TPU's compiler does."""


def compiled_memory_from_json(values: Mapping[str, Any]) -> CompiledMemory:
    """Read what `CompiledMemory.to_json` wrote; unknown keys are ignored.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(values, Mapping):
        raise InputError("not the memory of a compiled step")
    return CompiledMemory(**{name: get_whole(dict(values), name, 0, MAX_WHOLE) for name in _PARTS})


def compiled_fits(
    step: TrainingStep, memory: CompiledMemory, device_kind: str, budget_bytes: int
) -> bool:
    """Whether a compiled step fits in a budget.

    On a GPU, or CPU, TensorFlow's allocator has to find room for the model and for one buffer, see
    `replay_compiled`. The compiler of a TPU lays its memory out, so there the sum decides.

    Args:
        step: the step, for one replica.
        memory: what it needs.
        device_kind: `cpu`, `gpu` or `tpu`.
        budget_bytes: of each device.
    """
    if device_kind == "tpu":
        return memory.device_bytes <= budget_bytes
    return (
        memory.device_bytes <= budget_bytes
        and replay_compiled(step, memory, memory_of(device_kind, budget_bytes)).fits
    )


def replay_compiled(step: TrainingStep, memory: CompiledMemory, allocator: Memory) -> Replay:
    """Replay what a compiled step asks of TensorFlow's allocator: does it fit in a GPU or CPU?

    The model, the optimizer's state and the batch are pieces of their own. The temporary buffer is
    one piece, so it needs that much free memory without a gap.

    Example:
        >>> replay_compiled(step, compilation.memory, memory_of("gpu", 11_430 * MIB_BYTES)).fits

    Args:
        step: the step that was compiled, for one replica.
        memory: what its compiler said.
        allocator: what the allocator has.

    Returns:
        Whether every piece was found, and the allocator's peak.
    """
    events, sizes = map(list, state_requests(step.workload, step.levers.optimizer))
    rows = step.micro_batch * step.levers.accumulation_steps
    inputs = [4 * rows * step.workload.seq_len] * len(INPUT_NAMES)
    # Targets and weights.
    inputs += [4 * rows] * (len(TARGET_NAMES[step.workload.head]) + 1)
    # Beside a variable there is its handle, in a piece of its own. So are the graph's constants, up
    # to a few hundred, which are not counted.
    variables = sum(1 if event >= 0 else -1 for event in events) + 1
    handles = [MIN_ALLOCATION_BYTES] * variables
    for size_bytes in (*handles, *inputs, memory.output_bytes, memory.temporary_bytes):
        sizes.append(size_bytes)
        events.append(len(sizes) - 1)
    return replay(events, sizes, allocator)
