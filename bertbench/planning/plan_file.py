"""Plan files, as `run` reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bertbench.core.workload import MAX_BATCH, Levers, levers_from_json
from finetune.errors import InputError
from finetune.storage.json_files import get_whole, load_object

_HINT = "make one with `bertbench plan --json FILE`"


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """What `run` needs of a plan file.

    Attributes:
        target_batch: effective batch.
        micro_batch: rows of each micro-batch.
        levers: lever settings, with the number of accumulation steps.
        replicas: devices that share the effective batch.
    """

    target_batch: int
    micro_batch: int
    levers: Levers
    replicas: int


def read_plan(path: Path) -> PlanFile:
    """Read a plan file.

    Raises:
        InputError: the file is missing or is no plan.
    """
    values = load_object(path, what="the plan", hint=_HINT)
    if "chosen" not in values and "plans" in values:
        raise InputError(
            "plans of several workloads", path=path, hint="make one with --model and --seq-len"
        )
    chosen = values.get("chosen")
    if not isinstance(chosen, dict):
        raise InputError("not a plan (no setting is chosen)", path=path, hint=_HINT)
    try:
        planned = PlanFile(
            get_whole(values, "target_batch", 1, MAX_BATCH),
            get_whole(chosen, "micro_batch", 1, MAX_BATCH),
            levers_from_json(chosen),
            get_whole(chosen, "replicas", 1, MAX_BATCH, default=1),
        )
    except InputError as error:
        raise InputError(f"not a plan ({error})", path=path, hint=_HINT) from error
    rows = planned.micro_batch * planned.levers.accumulation_steps * planned.replicas
    if rows < planned.target_batch:
        raise InputError("the plan's micro-batches do not reach its target batch", path=path)
    return planned
