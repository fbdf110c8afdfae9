"""The fastest lever setting that fits: micro-batch, accumulation and checkpointing per layer.

Decided from the predicted footprint and cost alone, in well under a second, without TensorFlow.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bertbench.bytes import format_bytes
from bertbench.cost import Rates, predict_step_seconds
from bertbench.footprint import SAFETY_MARGIN, Footprint, max_micro_batch, predict_footprint
from bertbench.workload import Levers, Workload, levers_from_json
from finetune.checkpointing import NO_CHECKPOINTING, POLICIES, Checkpointing
from finetune.errors import InputError
from finetune.optimizers import OPTIMIZERS


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One lever setting for a target batch, with what is predicted of it.

    Attributes:
        micro_batch: rows of one forward and backward pass.
        levers: the other settings, `accumulation_steps` among them.
        footprint: predicted peak by part.
        predicted_step_seconds: of one effective batch.
    """

    micro_batch: int
    levers: Levers
    footprint: Footprint
    predicted_step_seconds: float

    @property
    def rows(self) -> int:
        """Rows of an optimizer step, padding included."""
        return self.micro_batch * self.levers.accumulation_steps

    def to_json(self) -> dict[str, Any]:
        """Values under the keys of a plan file."""
        return {
            "micro_batch": self.micro_batch,
            **self.levers.to_json(),
            "replicas": 1,
            "exact": self.levers.exact,
            "predicted_peak_bytes": self.footprint.peak_bytes,
            "predicted_host_bytes": self.footprint.host_bytes,
            "predicted_step_seconds": round(self.predicted_step_seconds, 6),
            "footprint": dict(self.footprint.parts),
        }


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A lever setting that was not taken, and why."""

    micro_batch: int
    levers: Levers
    why: str

    def to_json(self) -> dict[str, Any]:
        """Values under the keys of a plan file."""
        return {"micro_batch": self.micro_batch, **self.levers.to_json(), "why": self.why}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer for a workload, a target batch and a budget.

    Attributes:
        workload: what is trained.
        target_batch: effective batch.
        budget_bytes: what the allocator may use.
        device: name of the device.
        chosen: the fastest setting that fits.
        alternatives: slower settings that need less, each at least a tenth less than the one
            before it.
        rejected: settings that are faster but do not fit.
    """

    workload: Workload
    target_batch: int
    budget_bytes: int
    device: str
    chosen: PlanEntry
    alternatives: tuple[PlanEntry, ...]
    rejected: tuple[Rejection, ...]

    def to_json(self) -> dict[str, Any]:
        """Values of a plan file."""
        return {
            "target_batch": self.target_batch,
            "model": self.workload.model,
            "head": self.workload.head,
            "seq_len": self.workload.seq_len,
            "budget_bytes": self.budget_bytes,
            "device": self.device,
            "chosen": self.chosen.to_json(),
            "alternatives": [entry.to_json() for entry in self.alternatives],
            "rejected": [rejection.to_json() for rejection in self.rejected],
        }


def usable_for_plan(budget_bytes: int) -> int:
    """Bytes of a budget that a prediction may fill: the rest covers the prediction's error."""
    return int(budget_bytes / (1 + SAFETY_MARGIN))


def all_policies(layers: int) -> list[Checkpointing]:
    """Checkpointing to choose from: no policy, one, or two next to each other in bytes.

    Layers are alike, so that only the number under each policy matters.
    """
    return [
        NO_CHECKPOINTING,
        *(Checkpointing(policy) for policy in POLICIES[1:]),
        *(
            Checkpointing(policy, count, others)
            for policy, others in (
                ("selective", "none"),
                ("full", "none"),
                ("nested", "none"),
                ("nested", "selective"),
            )
            for count in range(1, layers)
        ),
    ]


def make_plan(
    workload: Workload,
    target_batch: int,
    budget_bytes: int,
    rates: Rates,
    *,
    device: str,
    device_kind: str = "cpu",
    policies: Sequence[Checkpointing] | None = None,
    allowed: Sequence[Levers] = (Levers(),),
    host_if_needed: bool = True,
) -> Plan:
    """Choose the fastest setting whose predicted peak, with its margin, is within the budget.

    Args:
        workload: what is trained.
        target_batch: effective batch, at least 1.
        budget_bytes: what the allocator may use.
        rates: the device's, for comparing settings.
        device: name of the device, for people.
        device_kind: `cpu` or `gpu`.
        policies: checkpointing to choose from; all settings by default.
        allowed: the other levers, in all combinations; only exact ones by default.
        host_if_needed: keep the optimizer's state of a GPU on the host if nothing fits otherwise.

    Returns:
        The plan.

    Raises:
        InputError: the target is not positive, or nothing fits; the missing bytes are named.
    """
    if target_batch < 1:
        raise InputError(f"target batch {target_batch} is not positive")
    if policies is None:
        policies = all_policies(workload.config.num_hidden_layers)
    usable_bytes = usable_for_plan(budget_bytes)
    settings = [
        dataclasses.replace(levers, checkpointing=policy)
        for levers in allowed
        for policy in policies
    ]

    def fitting_entries() -> list[PlanEntry]:
        entries = [
            PlanEntry(
                micro_batch,
                levers,
                predict_footprint(workload, levers, micro_batch, device_kind=device_kind),
                predict_step_seconds(workload, levers, micro_batch, rates),
            )
            for setting in settings
            for micro_batch, levers in _cuts(workload, setting, target_batch, usable_bytes)
        ]
        # More steps have more rows as input than the two that `_cuts` has asked about.
        return [entry for entry in entries if entry.footprint.peak_bytes <= usable_bytes]

    fitting = fitting_entries()
    if not fitting and host_if_needed and device_kind == "gpu":
        # The last resort, because what it costs depends on the host as well.
        settings = [dataclasses.replace(setting, placement="host") for setting in settings]
        fitting = fitting_entries()
    if not fitting:
        raise _nothing_fits(workload, target_batch, budget_bytes, settings, device_kind)
    # Equal seconds: prefer the published update, then fewer bytes.
    fitting.sort(
        key=lambda entry: (
            entry.predicted_step_seconds,
            not entry.levers.exact,
            entry.footprint.peak_bytes,
        )
    )
    chosen = fitting[0]
    return Plan(
        workload,
        target_batch,
        budget_bytes,
        device,
        chosen,
        tuple(_alternatives(fitting, chosen)),
        tuple(
            _rejections(workload, settings, target_batch, chosen, rates, usable_bytes, device_kind)
        ),
    )


def _cuts(
    workload: Workload, whole: Levers, target_batch: int, usable_bytes: int
) -> Iterator[tuple[int, Levers]]:
    """Cuts of the target into micro-batches that fit: the fewest, and somewhat more.

    More micro-batches than needed can still win by padding fewer rows: 32 as 4 x 8 has none,
    3 x 11 has one.
    """
    if max_micro_batch(workload, whole, usable_bytes) >= target_batch:
        yield target_batch, whole
        return
    largest = max_micro_batch(
        workload, dataclasses.replace(whole, accumulation_steps=2), usable_bytes
    )
    if largest < 1:
        return
    fewest = max(2, math.ceil(target_batch / largest))
    seen = set()
    for steps in range(fewest, min(fewest + 8, target_batch) + 1):
        micro_batch = math.ceil(target_batch / steps)
        steps = math.ceil(target_batch / micro_batch)
        if (micro_batch, steps) not in seen and steps > 1:
            seen.add((micro_batch, steps))
            yield micro_batch, dataclasses.replace(whole, accumulation_steps=steps)


def _alternatives(fitting: Sequence[PlanEntry], chosen: PlanEntry) -> list[PlanEntry]:
    """Settings that need clearly fewer bytes than any faster one: the steps of the front."""
    front = []
    least_bytes = chosen.footprint.peak_bytes
    for entry in fitting[1:]:
        if entry.footprint.peak_bytes < 0.9 * least_bytes:
            least_bytes = entry.footprint.peak_bytes
            front.append(entry)
    return front


def _rejections(
    workload: Workload,
    settings: Sequence[Levers],
    target_batch: int,
    chosen: PlanEntry,
    rates: Rates,
    usable_bytes: int,
    device_kind: str,
) -> Iterator[Rejection]:
    """Settings that would be faster, if they fitted: less checkpointing, fewer micro-batches."""
    for setting in settings:
        for steps in range(1, min(chosen.levers.accumulation_steps, 4) + 1):
            levers = dataclasses.replace(setting, accumulation_steps=steps)
            micro_batch = math.ceil(target_batch / steps)
            seconds = predict_step_seconds(workload, levers, micro_batch, rates)
            if seconds >= chosen.predicted_step_seconds:
                continue
            peak_bytes = predict_footprint(
                workload, levers, micro_batch, device_kind=device_kind
            ).peak_bytes
            if peak_bytes > usable_bytes:
                missing = format_bytes(peak_bytes - usable_bytes)
                yield Rejection(
                    micro_batch, levers, f"needs {format_bytes(peak_bytes)}, {missing} too much"
                )


def _nothing_fits(
    workload: Workload,
    target_batch: int,
    budget_bytes: int,
    settings: Sequence[Levers],
    device_kind: str,
) -> InputError:
    def least_needed(settings: Sequence[Levers]) -> int:
        least_bytes = min(
            predict_footprint(
                workload,
                dataclasses.replace(setting, accumulation_steps=min(2, target_batch)),
                1,
                device_kind=device_kind,
            ).peak_bytes
            for setting in settings
        )
        return math.ceil(least_bytes * (1 + SAFETY_MARGIN))

    needed = least_needed(settings)
    hint = "use more memory, a shorter sequence or a smaller model"
    lightest = [dataclasses.replace(setting, optimizer=OPTIMIZERS[-1]) for setting in settings]
    if least_needed(lightest) <= budget_bytes:
        hint = f"allow another update than AdamW's with --allow {OPTIMIZERS[-1]}, or {hint}"
    return InputError(
        f"{workload.model} at sequence length {workload.seq_len} does not fit in "
        f"{format_bytes(budget_bytes)}: even micro-batch 1 needs {format_bytes(needed)}, "
        f"{format_bytes(needed - budget_bytes)} more",
        hint=hint,
    )


def read_plan(path: Path) -> tuple[int, int, Levers]:
    """Read what `run` needs from a plan file.

    Returns:
        Target batch, micro-batch, and levers.

    Raises:
        InputError: the file is missing or is no plan.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        chosen = values["chosen"]
        target_batch, micro_batch = int(values["target_batch"]), int(chosen["micro_batch"])
        levers = levers_from_json(chosen)
    except OSError as error:
        raise InputError(f"cannot read the plan ({error.strerror})", path=path) from error
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON ({error.msg})", path=path, line=error.lineno) from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"not a plan ({error!r})", path=path, hint="make one with `bertbench plan --json FILE`"
        ) from error
    if micro_batch < 1 or micro_batch * levers.accumulation_steps < target_batch:
        raise InputError("the plan's micro-batches do not reach its target batch", path=path)
    return target_batch, micro_batch, levers
