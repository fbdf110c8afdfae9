"""The fastest setting that fits: micro-batch, accumulation steps and checkpointing per layer.

It decides from the predicted memory and the predicted seconds alone, in well under a second.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from bertbench.core.units import format_bytes
from bertbench.core.workload import Setup, TrainingStep, Workload
from bertbench.hardware.step_time import predict_step_seconds
from bertbench.memory.footprint import Footprint
from bertbench.memory.prediction import MemoryPrediction, note_other_tensorflow, predict_memory
from bertbench.memory.room import Room
from bertbench.planning.calibration import Calibration
from bertbench.planning.candidates import all_levers, cuts
from bertbench.planning.min_memory import MinMemory, find_min_memory
from bertbench.planning.requests import PlannedDevice, PlanRequest
from finetune.errors import InputError
from finetune.spec.optimizers import OPTIMIZERS

_MAX_REJECTIONS = 20
_REPLAYED_FOR_MESSAGE = 4
"""Settings that are replayed to say how much memory is missing; a message needs no more."""


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A setting of a plan: a training step for a target batch, with what is predicted of it.

    Attributes:
        step: the training step of each replica. Its micro-batches hold the rows of padding too.
        footprint: predicted peak of each replica by part.
        predicted_step_seconds: seconds of one optimizer step.
        replicas: devices that share the effective batch.
    """

    step: TrainingStep
    footprint: Footprint
    predicted_step_seconds: float
    replicas: int = 1

    @property
    def rows(self) -> int:
        """Rows of an optimizer step on all replicas, padding included."""
        return self.step.micro_batch * self.step.levers.accumulation_steps * self.replicas

    def to_json(self) -> dict[str, Any]:
        """Values under the keys of a plan file."""
        return {
            "micro_batch": self.step.micro_batch,
            **self.step.levers.to_json(),
            "replicas": self.replicas,
            "exact": self.step.levers.exact,
            "predicted_peak_bytes": self.footprint.peak_bytes,
            "predicted_host_bytes": self.footprint.host_bytes,
            "predicted_step_seconds": round(self.predicted_step_seconds, 6),
            "footprint": dict(self.footprint.parts),
        }


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A training step that does not fit, and why."""

    step: TrainingStep
    why: str

    def to_json(self) -> dict[str, Any]:
        """Values under the keys of a plan file."""
        step = self.step
        return {"micro_batch": step.micro_batch, **step.levers.to_json(), "why": self.why}


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
            before it; empty unless the request wanted them.
        rejected: faster settings that do not fit. That which misses the fewest bytes is first.
        timed_trials: trials on the device that its speed was taken from; 0 for none.
    """

    workload: Workload
    target_batch: int
    budget_bytes: int
    device: str
    device_kind: str
    chosen: PlannedStep
    alternatives: tuple[PlannedStep, ...]
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
            "alternatives": [planned.to_json() for planned in self.alternatives],
            "rejected": [rejection.to_json() for rejection in self.rejected],
        }


def make_plan(
    request: PlanRequest,
    workload: Workload,
    device: PlannedDevice,
    calibration: Calibration | None = None,
    *,
    below_bytes: int | None = None,
) -> Plan:
    """Choose the fastest setting that is predicted to fit.

    All settings are put in order of their predicted seconds, and the first that fits is taken, see
    `bertbench.memory.prediction.MemoryPrediction.fits`.

    Args:
        request: what the plan must reach, and what it may choose from.
        workload: what is trained.
        device: the device that it is trained on.
        calibration: what trials have shown of the workload on the device; none by default.
        below_bytes: only settings with a smaller predicted peak are chosen, as after one with this
            peak has run out of memory.

    Returns:
        The plan.

    Raises:
        InputError: the target is not positive, or nothing fits; the missing bytes are named.
    """
    if request.target_batch < 1:
        raise InputError(f"target batch {request.target_batch} is not positive")
    if device.kind != "tpu":
        note_other_tensorflow()
    calibration = calibration or Calibration()

    def choose(request: PlanRequest) -> _Found | None:
        candidates = _candidates(request, workload, device, calibration)
        if below_bytes is not None:
            candidates = [one for one in candidates if one.peak_bytes < below_bytes]
        return _choose(candidates, device, calibration, alternatives=request.alternatives)

    found = choose(request)
    one_gpu = device.kind == "gpu" and device.replicas == 1
    compiled = any(levers.xla for levers in request.allowed)
    if found is None and request.host_if_needed and one_gpu and not compiled:
        # The last resort, because what it costs depends on the host as well.
        request = _with_levers(request, placement="host")
        found = choose(request)
    if found is None:
        raise _nothing_fits(request, workload, device)
    chosen, alternatives, rejected = found
    return Plan(
        workload,
        request.target_batch,
        device.budget_bytes,
        device.name,
        device.kind,
        _planned_step(chosen, device, replayed=True),
        tuple(_planned_step(candidate, device, replayed=False) for candidate in alternatives),
        tuple(rejected),
        calibration.trials,
    )


def _with_levers(request: PlanRequest, **values: Any) -> PlanRequest:
    """A request that allows only levers with these values."""
    allowed = [dataclasses.replace(levers, **values) for levers in request.allowed]
    return dataclasses.replace(request, allowed=allowed)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A setting that the planner compares with others.

    There are hundreds, and most of them are never asked for their memory.
    """

    step: TrainingStep
    room: Room
    seconds: float

    @functools.cached_property
    def memory(self) -> MemoryPrediction:
        """Predicts the memory of its setup's steps."""
        return predict_memory(self.step.setup, self.room)

    @functools.cached_property
    def peak_bytes(self) -> int:
        """The predicted peak, without a replay."""
        return self.memory.peak_bytes(self.step.micro_batch)

    @property
    def missing_bytes(self) -> int:
        """By how much the peak is too large; not above 0 if it is not."""
        return self.peak_bytes - self.memory.usable_bytes


def _candidates(
    request: PlanRequest, workload: Workload, device: PlannedDevice, calibration: Calibration
) -> list[_Candidate]:
    """All settings that reach the target batch, the fastest first.

    Of two with equal seconds, that with the published update is first; of these, that with the
    smaller peak.
    """
    room = device.room(calibration.margin)
    candidates = []
    for levers in all_levers(request, workload):
        for micro_batch, count in cuts(math.ceil(request.target_batch / device.replicas)):
            setup = Setup(workload, dataclasses.replace(levers, accumulation_steps=count))
            step = setup.step(micro_batch)
            seconds = predict_step_seconds(step, device.rates, replicas=device.replicas)
            seconds = calibration.seconds(seconds, micro_batch)
            candidates.append(_Candidate(step, room, seconds))
    return _in_order(candidates)


def _in_order(candidates: Iterable[_Candidate]) -> list[_Candidate]:
    def first(candidate: _Candidate) -> tuple[float, bool]:
        return candidate.seconds, not candidate.step.levers.exact

    ordered: list[_Candidate] = []
    for _, tied in itertools.groupby(sorted(candidates, key=first), first):
        equal = list(tied)
        ordered += sorted(equal, key=lambda c: c.peak_bytes) if len(equal) > 1 else equal
    return ordered


_Found = tuple[_Candidate, list[_Candidate], list[Rejection]]


def _choose(
    candidates: Sequence[_Candidate],
    device: PlannedDevice,
    calibration: Calibration,
    *,
    alternatives: bool,
) -> _Found | None:
    """Take the first candidate that is known or predicted to fit.

    Args:
        candidates: the fastest first.
        device: the device that is planned for.
        calibration: what trials have shown.
        alternatives: whether slower candidates are wanted too.

    Returns:
        None if there is none, else three values. The first candidate that fits. Slower candidates,
        each of which needs clearly less memory than any faster one. Why faster candidates do not
        fit, for those that miss the fewest bytes.
    """
    rejected: list[tuple[int, Rejection]] = []
    for number, candidate in enumerate(candidates):
        step = candidate.step
        known = _known_to_fit(step, device, calibration)
        fits = known
        if known is None:
            fits = candidate.memory.fits(step.micro_batch)
        if fits:
            rejected.sort(key=lambda pair: pair[0])
            nearest = [rejection for _, rejection in rejected[:_MAX_REJECTIONS]]
            slower = _front(candidates[number:]) if alternatives else []
            return candidate, slower, nearest
        why = "ran out of memory before" if known is False else _why_too_large(candidate)
        rejected.append((candidate.missing_bytes, Rejection(step, why)))
    return None


def _known_to_fit(
    step: TrainingStep, device: PlannedDevice, calibration: Calibration
) -> bool | None:
    """Whether trials have shown that a step fits, or that it does not; None if neither."""
    if device.replicas > 1:
        return None  # There is more to hold than a trial on one device has shown.
    return calibration.fits(step.levers, step.micro_batch, device.available_bytes)


def _why_too_large(candidate: _Candidate) -> str:
    margin, missing_bytes = candidate.memory.margin, candidate.missing_bytes
    with_margin = f" with a margin of {margin:.0%}" if margin else ""
    what = "and what is free is in pieces that are too small"
    if candidate.memory.source == "compiled":
        what = "and its compiler refuses that"
    if missing_bytes > 0:
        what = f"{format_bytes(missing_bytes)} too much"
    return f"needs {format_bytes(candidate.peak_bytes)}, {what}{with_margin}"


def _front(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Candidates after the first, each with a peak a tenth below that of any faster one."""
    front = []
    smallest_bytes = candidates[0].peak_bytes
    for candidate in candidates[1:]:
        if candidate.peak_bytes < 0.9 * smallest_bytes:
            smallest_bytes = candidate.peak_bytes
            front.append(candidate)
    return front


def _planned_step(candidate: _Candidate, device: PlannedDevice, *, replayed: bool) -> PlannedStep:
    step = candidate.step
    footprint = candidate.memory.footprint(step.micro_batch, replayed=replayed)
    return PlannedStep(step, footprint, candidate.seconds, device.replicas)


def _nothing_fits(request: PlanRequest, workload: Workload, device: PlannedDevice) -> InputError:
    """The error that says how much is missing, and what would need less."""
    available_bytes = device.available_bytes

    def smallest(request: PlanRequest, replicas: int = device.replicas) -> MinMemory:
        return find_min_memory(
            request, workload, device.kind, replicas=replicas, max_replayed=_REPLAYED_FOR_MESSAGE
        )

    def enough(request: PlanRequest, replicas: int = device.replicas) -> bool:
        return smallest(request, replicas).budget_bytes <= available_bytes

    share = math.ceil(request.target_batch / device.replicas)
    hint = "use more memory, a shorter sequence or a smaller model"
    if enough(_with_levers(request, optimizer=OPTIMIZERS[-1])):
        hint = f"allow another update than AdamW's with --allow {OPTIMIZERS[-1]}, or {hint}"
    if share > 1 and enough(dataclasses.replace(request, target_batch=device.replicas)):
        hint = f"use a smaller target batch, or {hint}"
    if device.replicas > 1 and enough(dataclasses.replace(request, target_batch=share), replicas=1):
        hint = f"train on one device, which adds up no gradients with others, {hint}"
    needed = smallest(request)
    missing_bytes = needed.budget_bytes - available_bytes
    what = f"{workload.model} at sequence length {workload.seq_len}"
    if missing_bytes <= 0:
        found_out = (
            "is too large by its compiler's word" if device.compiled else "ran out of memory before"
        )
        return InputError(
            f"every setting of {what} that should fit in {format_bytes(available_bytes)} "
            + found_out,
            hint=hint,
        )
    return InputError(
        f"{what} does not fit in {format_bytes(available_bytes)}: even micro-batch "
        f"{needed.step.micro_batch} needs {format_bytes(needed.budget_bytes)}, "
        f"{format_bytes(missing_bytes)} more",
        hint=hint,
    )


def describe_planned_step(planned: PlannedStep) -> str:
    """Write a setting of a plan: `2 replicas, each 3 micro-batches of 11, checkpointing full`."""
    share = f"{planned.replicas} replicas, each " if planned.replicas > 1 else ""
    return share + describe_setting(planned.step)


def describe_setting(step: TrainingStep) -> str:
    """Write a setting as `3 micro-batches of 11, checkpointing full`."""
    return f"{describe_split(step)}, checkpointing {step.levers.describe()}"


def describe_split(step: TrainingStep) -> str:
    """Write how an effective batch is split, as in `3 micro-batches of 11`."""
    count = step.levers.accumulation_steps
    return f"{count} micro-batch{'es' * (count != 1)} of {step.micro_batch}"
