"""The fastest lever setting that fits: micro-batch, accumulation and checkpointing per layer.

It decides from the predicted memory and the predicted seconds alone, in well under a second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers, Setup, TrainingStep, Workload
from bertbench.devices.step_time import Rates, predict_step_seconds
from bertbench.memory.footprint import Footprint
from bertbench.memory.prediction import MemoryPrediction, Room, predict_memory
from bertbench.plan.calibration import Experience
from bertbench.plan.candidates import all_settings, cuts
from bertbench.plan.min_memory import MinMemory, find_min_memory
from finetune.errors import InputError
from finetune.spec.checkpointing import Checkpointing
from finetune.spec.optimizers import OPTIMIZERS

_MOST_REJECTIONS = 20
_LOOKED_AT = 4
"""Settings that are replayed for a message."""


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One lever setting for a target batch, with what is predicted of it.

    Attributes:
        micro_batch: rows of one forward and backward pass on each replica.
        levers: the other settings, `accumulation_steps` among them.
        footprint: predicted peak of each replica by part.
        predicted_step_seconds: of one effective batch.
        replicas: devices that share the effective batch.
    """

    micro_batch: int
    levers: Levers
    footprint: Footprint
    predicted_step_seconds: float
    replicas: int = 1

    @property
    def rows(self) -> int:
        """Rows of an optimizer step on all replicas, padding included."""
        return self.micro_batch * self.levers.accumulation_steps * self.replicas

    def to_json(self) -> dict[str, Any]:
        """Values under the keys of a plan file."""
        return {
            "micro_batch": self.micro_batch,
            **self.levers.to_json(),
            "replicas": self.replicas,
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
        device_kind: `cpu`, `gpu` or `tpu`.
        chosen: the fastest setting that fits.
        alternatives: slower settings that need less, each at least a tenth less than the one
            before it.
        rejected: settings that are faster but do not fit, those first that miss least.
        timed_trials: trials on the device that its speed was taken from; 0 for none.
    """

    workload: Workload
    target_batch: int
    budget_bytes: int
    device: str
    device_kind: str
    chosen: PlanEntry
    alternatives: tuple[PlanEntry, ...]
    rejected: tuple[Rejection, ...]
    timed_trials: int = 0

    def to_json(self) -> dict[str, Any]:
        """Values of a plan file."""
        return {
            "target_batch": self.target_batch,
            "model": self.workload.model,
            "head": self.workload.head,
            "seq_len": self.workload.seq_len,
            "budget_bytes": self.budget_bytes,
            "device": self.device,
            "device_kind": self.device_kind,
            "timed_trials": self.timed_trials,
            "chosen": self.chosen.to_json(),
            "alternatives": [entry.to_json() for entry in self.alternatives],
            "rejected": [rejection.to_json() for rejection in self.rejected],
        }


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
    spare_bytes: int = 0,
    replicas: int = 1,
    experience: Experience | None = None,
    below_bytes: int | None = None,
) -> Plan:
    """Choose the fastest setting that is predicted to fit.

    All settings are put in order of their predicted seconds, and the first that fits is taken, see
    `bertbench.memory.prediction.MemoryPrediction.fits`.

    Args:
        workload: what is trained.
        target_batch: effective batch, at least 1.
        budget_bytes: what the allocator of one device may use.
        rates: the device's, for comparing settings.
        device: name of the device, for people.
        device_kind: `cpu`, `gpu` or `tpu`.
        policies: checkpointing to choose from; all settings by default.
        allowed: the other levers, in all combinations, that the device can be trained on with, see
            `bertbench.devices.accelerators.check_levers`; only exact ones by default.
        host_if_needed: keep the optimizer's state of a single GPU on the host if nothing fits
            otherwise.
        spare_bytes: what is to be left free of the budget.
        replicas: devices that share the effective batch; each has its part of it, and the last
            may have padding.
        experience: what trials have shown of the workload on the device; none by default.
        below_bytes: only what is predicted to need less than this is chosen, as where a setting
            that needs so much has run out of memory.

    Returns:
        The plan.

    Raises:
        InputError: the target is not positive, or nothing fits; the missing bytes are named.
    """
    if target_batch < 1:
        raise InputError(f"target batch {target_batch} is not positive")
    experience = experience or Experience()
    room = Room(device_kind, budget_bytes, spare_bytes, replicas, experience.margin)
    share = math.ceil(target_batch / replicas)

    def choose(allowed: Sequence[Levers]) -> _Found | None:
        settings = all_settings(workload, policies, allowed)
        candidates = _candidates(workload, settings, share, rates, room, experience)
        if below_bytes is not None:
            candidates = [one for one in candidates if one.peak_bytes < below_bytes]
        return _choose(candidates, room, experience)

    found = choose(allowed)
    if found is None and host_if_needed and device_kind == "gpu" and replicas == 1:
        # The last resort, because what it costs depends on the host as well.
        allowed = [dataclasses.replace(levers, placement="host") for levers in allowed]
        found = choose(allowed)
    if found is None:
        raise _nothing_fits(workload, share, policies, allowed, room)
    chosen, alternatives, rejected = found
    return Plan(
        workload,
        target_batch,
        budget_bytes,
        device,
        device_kind,
        _entry(chosen, room, replayed=True),
        tuple(_entry(candidate, room, replayed=False) for candidate in alternatives),
        tuple(rejected),
        experience.trials,
    )


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A training step with what is predicted of it."""

    step: TrainingStep
    memory: MemoryPrediction
    seconds: float
    peak_bytes: int

    @property
    def missing_bytes(self) -> int:
        """By how much the peak is too large; not above 0 if it is not."""
        return self.peak_bytes - self.memory.usable_bytes


def _candidates(
    workload: Workload,
    settings: Sequence[Levers],
    share: int,
    rates: Rates,
    room: Room,
    experience: Experience,
) -> list[_Candidate]:
    """All settings with all cuts of a replica's share of the target, the fastest first.

    Of equal seconds first what gives the published update, then what needs fewer bytes.
    """
    candidates = []
    for levers in settings:
        for micro_batch, count in cuts(share):
            setup = Setup(workload, dataclasses.replace(levers, accumulation_steps=count))
            step, memory = setup.step(micro_batch), predict_memory(setup, room)
            seconds = predict_step_seconds(step, rates, replicas=room.replicas)
            seconds = experience.seconds(seconds, micro_batch)
            candidates.append(_Candidate(step, memory, seconds, memory.peak_bytes(micro_batch)))
    return sorted(candidates, key=lambda c: (c.seconds, not c.step.levers.exact, c.peak_bytes))


_Found = tuple[_Candidate, list[_Candidate], list[Rejection]]


def _choose(candidates: Sequence[_Candidate], room: Room, experience: Experience) -> _Found | None:
    """Take the first that fits.

    Returns:
        It, the slower ones that need clearly less than any faster one, and of the faster ones
        those whose peak is too large by the fewest bytes; None if nothing fits.
    """
    rejected: list[tuple[int, Rejection]] = []
    for number, candidate in enumerate(candidates):
        step = candidate.step
        known = _known_to_fit(step, room, experience)
        fits = known
        if known is None:
            fits = candidate.memory.fits(step.micro_batch)
        if fits:
            rejected.sort(key=lambda pair: pair[0])
            nearest = [rejection for _, rejection in rejected[:_MOST_REJECTIONS]]
            return candidate, _front(candidates[number:]), nearest
        why = "ran out of memory before" if known is False else _why_too_large(candidate)
        rejection = Rejection(step.micro_batch, step.levers, why)
        rejected.append((candidate.missing_bytes, rejection))
    return None


def _known_to_fit(step: TrainingStep, room: Room, experience: Experience) -> bool | None:
    """What trials have shown; None if nothing."""
    if room.replicas > 1:
        return None  # There is more to hold than a trial on one device has shown.
    return experience.fits(step.levers, step.micro_batch, room.budget_bytes - room.spare_bytes)


def _why_too_large(candidate: _Candidate) -> str:
    margin, missing_bytes = candidate.memory.margin, candidate.missing_bytes
    with_margin = f" with a margin of {margin:.0%}" if margin else ""
    what = "and what is free is in pieces that are too small"
    if missing_bytes > 0:
        what = f"{format_bytes(missing_bytes)} too much"
    return f"needs {format_bytes(candidate.peak_bytes)}, {what}{with_margin}"


def _front(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Settings that need clearly fewer bytes than any faster one, from the first on."""
    front = []
    smallest_bytes = candidates[0].peak_bytes
    for candidate in candidates[1:]:
        if candidate.peak_bytes < 0.9 * smallest_bytes:
            smallest_bytes = candidate.peak_bytes
            front.append(candidate)
    return front


def _entry(candidate: _Candidate, room: Room, *, replayed: bool) -> PlanEntry:
    step = candidate.step
    footprint = candidate.memory.footprint(step.micro_batch, replayed=replayed)
    return PlanEntry(step.micro_batch, step.levers, footprint, candidate.seconds, room.replicas)


def _nothing_fits(
    workload: Workload,
    share: int,
    policies: Sequence[Checkpointing] | None,
    allowed: Sequence[Levers],
    room: Room,
) -> InputError:
    def least_needed(allowed: Sequence[Levers], replicas: int, share: int = share) -> MinMemory:
        return find_min_memory(
            workload,
            share * replicas,
            policies,
            allowed,
            room.device_kind,
            looked_at=_LOOKED_AT,
            replicas=replicas,
        )

    least = least_needed(allowed, room.replicas)
    hint = "use more memory, a shorter sequence or a smaller model"
    lightest = [dataclasses.replace(levers, optimizer=OPTIMIZERS[-1]) for levers in allowed]
    available = room.budget_bytes - room.spare_bytes
    if least_needed(lightest, room.replicas).budget_bytes <= available:
        hint = f"allow another update than AdamW's with --allow {OPTIMIZERS[-1]}, or {hint}"
    if share > 1 and least_needed(allowed, room.replicas, 1).budget_bytes <= available:
        hint = f"use a smaller target batch, or {hint}"
    if room.replicas > 1 and least_needed(allowed, 1).budget_bytes <= available:
        hint = f"train on one device, which adds up no gradients with others, {hint}"
    needed = least.budget_bytes
    if needed <= available:
        return InputError(
            f"every setting of {workload.model} at sequence length {workload.seq_len} that should "
            f"fit in {format_bytes(available)} ran out of memory before",
            hint=hint,
        )
    return InputError(
        f"{workload.model} at sequence length {workload.seq_len} does not fit in "
        f"{format_bytes(available)}: even micro-batch {least.step.micro_batch} needs "
        f"{format_bytes(needed)}, {format_bytes(needed - available)} more",
        hint=hint,
    )


def describe_entry(entry: PlanEntry) -> str:
    """Write a plan's setting as `3 steps of 11, checkpointing full`, and its replicas."""
    share = f"{entry.replicas} replicas, each " if entry.replicas > 1 else ""
    return share + describe_setting(entry.micro_batch, entry.levers)


def describe_setting(micro_batch: int, levers: Levers) -> str:
    """Write a setting as `3 steps of 11, checkpointing full`."""
    return f"{describe_cut(micro_batch, levers)}, checkpointing {levers.describe()}"


def describe_cut(micro_batch: int, levers: Levers) -> str:
    """Write how an effective batch is cut as `3 steps of 11`."""
    steps = levers.accumulation_steps
    return f"{steps} step{'s' * (steps != 1)} of {micro_batch}"
