"""Plan files, as `run` reads them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from bertbench.workload import Levers, levers_from_json
from finetune.errors import InputError


@dataclasses.dataclass(frozen=True)
class PlannedSetting:
    """What `run` needs of a plan file; see `bertbench.planner.PlanEntry`."""

    target_batch: int
    micro_batch: int
    levers: Levers
    replicas: int


def read_plan(path: Path) -> PlannedSetting:
    """Read a plan file.

    Raises:
        InputError: the file is missing or is no plan.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "chosen" not in values and "plans" in values:
            raise InputError(
                "plans of several workloads", hint="make one with --model and --seq-len"
            )
        chosen = values["chosen"]
        planned = PlannedSetting(
            int(values["target_batch"]),
            int(chosen["micro_batch"]),
            levers_from_json(chosen),
            int(chosen.get("replicas", 1)),
        )
        if type(planned.levers.accumulation_steps) is not int:
            raise TypeError("accumulation_steps is no whole number")
    except OSError as error:
        raise InputError(f"cannot read the plan ({error.strerror})", path=path) from error
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON ({error.msg})", path=path, line=error.lineno) from error
    except InputError as error:
        raise InputError(str(error), path=path) from error
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"not a plan ({error!r})", path=path, hint="make one with `bertbench plan --json FILE`"
        ) from error
    rows = planned.micro_batch * planned.levers.accumulation_steps * planned.replicas
    if min(planned.micro_batch, planned.replicas) < 1 or rows < planned.target_batch:
        raise InputError("the plan's micro-batches do not reach its target batch", path=path)
    return planned
