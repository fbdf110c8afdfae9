"""A trial: what real training steps have told about one batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from bertbench.core.workload import MAX_BATCH
from bertbench.trials.outcome import Outcome, recorded_outcome, shorten
from finetune.errors import InputError
from finetune.storage.json_files import build

_OF_RUN = "in a run: "
"""What the message of a trial begins with that was a step of a run."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One batch of a setup, tried in real training steps.

    Example:
        >>> Trial(8, "oom", seconds=12.0, message="OOM when allocating tensor").of_run
        False

    Attributes:
        batch: rows of each micro-batch.
        outcome: `fits`, `oom` or `failed`.
        peak_bytes: largest memory in use, by the allocator; None unless it fits.
        step_seconds: time of an optimizer step after warm-up; None unless it fits.
        seconds: whole time that this batch took, with the process's start if it was the first.
        message: why it does not fit; empty if it does.
        fresh: it was the first batch of its process (a fresh process), so nothing had touched the
            memory before.
        process_peak_bytes: largest memory that the process had on the device, by the system: what
            lies outside the allocator too. None unless it fits, or where nothing tells.
    """

    batch: int
    outcome: Outcome
    peak_bytes: int | None = None
    step_seconds: float | None = None
    seconds: float = 0.0
    message: str = ""
    fresh: bool = False
    process_peak_bytes: int | None = None

    @property
    def of_run(self) -> bool:
        """Whether it was a step of a run: evidence for plans, but not for a limit."""
        return self.message.startswith(_OF_RUN)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return dataclasses.asdict(self)


def out_of_memory_in_run(micro_batch: int, message: str) -> Trial:
    """What the ledger keeps of a run's step that its device's allocator had no memory for."""
    return Trial(micro_batch, "oom", message=shorten(_OF_RUN + message))


def trial_from_json(values: Mapping[str, Any]) -> Trial:
    """Read what `Trial.to_json` wrote; unknown keys are ignored.

    What an earlier version took for the end of a device's memory and was not is `failed`, see
    `bertbench.trials.outcome.recorded_outcome`.

    Raises:
        InputError: it is something else.
    """
    trial = build(Trial, values)
    sizes = (trial.peak_bytes, trial.process_peak_bytes, trial.step_seconds, trial.seconds)
    if not 1 <= trial.batch <= MAX_BATCH or not all(
        size is None or 0 <= size < math.inf for size in sizes
    ):
        raise InputError(f"a number of the trial of batch {trial.batch} is out of range")
    outcome = recorded_outcome(trial.outcome, trial.message)
    return trial if outcome == trial.outcome else dataclasses.replace(trial, outcome=outcome)
