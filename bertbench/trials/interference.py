"""What on the machine may disturb a trial: end it, or be taken for the end of its budget.

The host may run out of memory, the clock may be set, and other processes may take memory of a GPU.
None of that says anything about the batch, so such a trial has failed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from bertbench.core.units import MIB_BYTES, format_bytes
from bertbench.hardware.device import Budget, Device, check_free
from bertbench.hardware.host import host_memory
from bertbench.hardware.nvml import list_gpus
from finetune.errors import InputError

_HOST_RESERVE_SHARE = 0.02
_HOST_RESERVE_BYTES = 256 * MIB_BYTES

_CLOCK_JUMP_SECONDS = 5.0
_CLOCK_SET = "the system's clock was set during the trial"
_AGAIN = "the same command tries again"

TRY_LESS_MEMORY = "end what holds the memory, or give a smaller --memory"
"""What to do when the host's memory ran out in a trial."""


def _clock_offset() -> float:
    return time.time() - time.monotonic()


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is asked about the machine while trials run. Tests replace what it tells.

    Attributes:
        host_memory: tells the host's total and free bytes.
        list_gpus: lists the GPUs as they are now.
        clock_offset: tells the seconds between the clock that people set, by which TensorFlow
            waits for memory, and the steady one.
        given_back_seconds: how long a GPU may take to give back what an ended process held.
    """

    host_memory: Callable[[], tuple[int, int]] = host_memory
    list_gpus: Callable[[], Sequence[Device]] = list_gpus
    clock_offset: Callable[[], float] = _clock_offset
    given_back_seconds: float = 5.0

    def reason_to_stop(self, offset_before: float, what_to_do: str = TRY_LESS_MEMORY) -> str:
        """Say why a trial that runs cannot tell anything; "" if nothing is wrong.

        Args:
            offset_before: `clock_offset` when the trial began.
            what_to_do: when the machine's memory is full.
        """
        if self.clock_offset() - offset_before < -_CLOCK_JUMP_SECONDS:
            return f"{_CLOCK_SET}, and TensorFlow may wait until it is there again; {_AGAIN}"
        total_bytes, free_bytes = self.host_memory()
        # A share that lets the rest of the machine go on without swapping.
        if free_bytes >= max(total_bytes * _HOST_RESERVE_SHARE, _HOST_RESERVE_BYTES):
            return ""
        return (
            f"stopped before the machine would swap: {format_bytes(free_bytes)} of its "
            f"{format_bytes(total_bytes)} were left; {what_to_do}"
        )

    def reason_to_doubt(self, budget: Budget, offset_before: float, paused: bool) -> str:
        """Say why memory that ran out may not have been the budget's; "" if it was.

        Args:
            budget: of the trial that ran out.
            offset_before: `clock_offset` when its process began.
            paused: the process was stopped, as by Ctrl-Z, and went on.
        """
        if abs(self.clock_offset() - offset_before) > _CLOCK_JUMP_SECONDS:
            return f"{_CLOCK_SET}; {_AGAIN}"
        if paused:
            return (
                "the trial was stopped and went on, and TensorFlow waits for memory by the clock; "
                + _AGAIN
            )
        return self._taken_by_others(budget) if budget.device.kind == "gpu" else ""

    def _taken_by_others(self, budget: Budget) -> str:
        """Say who has taken GPU memory since the budget was made; "" if nobody has."""
        deadline = time.monotonic() + self.given_back_seconds
        while True:
            try:
                self._check_free_now(budget)
            except InputError as error:
                # What a process held is given back a moment after its end.
                if time.monotonic() > deadline:
                    return str(error)
            else:
                return ""
            time.sleep(0.1)

    def _check_free_now(self, budget: Budget) -> None:
        now = {gpu.uuid: gpu for gpu in self.list_gpus()}
        for device in budget.device.each:
            if device.uuid in now:
                check_free(dataclasses.replace(budget, device=now[device.uuid]))


THIS_MACHINE = Machine()
