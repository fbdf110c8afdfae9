"""Trials: real training steps in a fresh process, and what they tell about a batch."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bertbench.core.units import MIB_BYTES, format_bytes
from bertbench.core.workload import (
    MOST_BATCH,
    Levers,
    Workload,
    levers_from_json,
    workload_from_json,
)
from bertbench.devices.device import Budget, budget_from_json, check_free
from bertbench.devices.host import host_memory
from bertbench.devices.nvml import list_gpus
from bertbench.memory.allocator.limit import child_environment
from bertbench.memory.allocator.recording import Recording, recording_from_text
from bertbench.trials.isolation import Ending, Message, run_isolated
from bertbench.trials.outcome import (
    Outcome,
    classify_error,
    classify_exit,
    recorded_outcome,
    shorten,
    summarise_error,
)
from finetune.errors import InputError
from finetune.storage.json_files import build

TARGET = "bertbench.trials.worker:run_trial"
"""What a trial's process runs: training steps for every batch of a `TrialRequest`."""

_GIVEN_BACK_SECONDS = 5.0

_HOST_RESERVE_SHARE = 0.02
_HOST_RESERVE_BYTES = 256 * MIB_BYTES

_CLOCK_JUMP_SECONDS = 5.0
_CLOCK_SET = "the system's clock was set during the trial"
_AGAIN = "the same command tries again"

TIMEOUT_SECONDS = 900.0
"""Default limit of one batch: its steps, and for the first also start, tracing and set-up."""


_OF_RUN = "in a run: "
"""What the message of a trial begins with that was a step of a run."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One batch tried at one lever setting.

    Attributes:
        batch: examples of a micro-batch.
        outcome: `fits`, `oom` or `failed`.
        peak_bytes: largest memory in use, by the allocator; None unless it fits.
        step_seconds: time of an optimizer step after warm-up; None unless it fits.
        seconds: whole time that this batch took, with the process's start if it was the first.
        message: why it does not fit; empty if it does.
        fresh: it was the first batch of its process, so nothing had touched the memory before.
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
    if not 1 <= trial.batch <= MOST_BATCH or not all(
        size is None or 0 <= size < math.inf for size in sizes
    ):
        raise InputError(f"a number of the trial of batch {trial.batch} is out of range")
    outcome = recorded_outcome(trial.outcome, trial.message)
    return trial if outcome == trial.outcome else dataclasses.replace(trial, outcome=outcome)


@dataclasses.dataclass(frozen=True)
class TrialRequest:
    """What a trial's process is asked to do.

    Attributes:
        workload: model, head and sequence length.
        levers: lever settings.
        budget: device, and the bytes of it that the allocator may use.
        batches: micro-batch sizes to run one after the other, rising.
        steps: optimizer steps to run for each.
        record: record what is asked of the allocator; for a single batch, and two steps more.
    """

    workload: Workload
    levers: Levers
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
            "workload": dataclasses.asdict(self.workload),
            "levers": self.levers.to_json(),
            "budget": self.budget.to_json(),
            "batches": list(self.batches),
            "steps": self.steps,
            "record": self.record,
        }


def request_from_payload(payload: Mapping[str, Any]) -> TrialRequest:
    """Read what `TrialRequest.to_payload` wrote."""
    return TrialRequest(
        workload=workload_from_json(payload["workload"]),
        levers=levers_from_json(payload["levers"]),
        budget=budget_from_json(payload["budget"]),
        batches=tuple(payload["batches"]),
        steps=int(payload["steps"]),
        record=bool(payload["record"]),
    )


def measure_batches(
    workload: Workload,
    levers: Levers,
    budget: Budget,
    batches: Sequence[int],
    *,
    steps: int = 3,
    timeout_seconds: float = TIMEOUT_SECONDS,
    fresh: bool = False,
    on_trial: Callable[[Trial], None] | None = None,
    on_recording: Callable[[int, Recording], None] | None = None,
    check: Callable[[], None] = lambda: None,
    target: str = TARGET,
) -> list[Trial]:
    """Try rising batches until one does not fit.

    The target is called as `target(payload, send)` with the payload of a `TrialRequest`, and sends

    - `{"event": "trial", "batch", "peak_bytes", "process_peak_bytes", "step_seconds"}` for each
      batch that fits;
    - `{"event": "error", "batch", "type", "message"}` for an exception, after which it ends.
      An exception that leaves it counts for the batch that was next;
    - `{"event": "paused"}` before one of these, if the process was stopped and went on since it
      began. What it measured after that is no evidence of a limit, and no time;
    - `{"event": "recording", "batch", "recording"}`, the text of a
      `bertbench.memory.allocator.recording.Recording`, if that is asked for.

    Anything else that it sends with an `event` is ignored.

    Args:
        workload: model, head and sequence length.
        levers: lever settings.
        budget: device, and the bytes of it that the allocator may use.
        batches: micro-batch sizes, rising.
        steps: optimizer steps for each batch.
        timeout_seconds: limit of one batch, see `TIMEOUT_SECONDS`.
        fresh: take a new process for every batch, instead of one for all.
        on_trial: called with every trial as soon as it is known, to make it durable.
        on_recording: called with a batch that fits and what it asked of the allocator. Only with
            `fresh`, or for a single batch.
        check: called several times a second; what it raises ends the trial and is raised on.
        target: `module:function` that trains.

    Returns:
        Trials in the order of `batches`; only the last may be `oom` or `failed`.
    """
    request = TrialRequest(workload, levers, budget, tuple(batches), steps)
    fresh = fresh or len(request.batches) == 1
    groups = [(batch,) for batch in request.batches] if fresh else [request.batches]
    trials: list[Trial] = []
    for group in groups:
        record = fresh and on_recording is not None
        part = dataclasses.replace(request, batches=group, record=record)
        trials += _measure_in_one_process(
            part, timeout_seconds, on_trial, on_recording, check, target
        )
        if trials[-1].outcome != "fits":
            break
    return trials


def _measure_in_one_process(
    request: TrialRequest,
    timeout_seconds: float,
    on_trial: Callable[[Trial], None] | None,
    on_recording: Callable[[int, Recording], None] | None,
    check: Callable[[], None],
    target: str,
) -> list[Trial]:
    trials: list[Trial] = []
    texts: list[str] = []
    paused = False
    began = time.monotonic()
    clock_offset = _clock_offset()

    def add(outcome: Outcome, message: str = "", measured: Message | None = None) -> None:
        nonlocal began
        now = time.monotonic()
        doubt = ""
        if outcome == "oom":
            has_jumped = abs(_clock_offset() - clock_offset) > _CLOCK_JUMP_SECONDS
            doubt = f"{_CLOCK_SET}; {_AGAIN}" if has_jumped else _doubt(request.budget, paused)
        if doubt:
            outcome, message = "failed", shorten(f"{doubt} ({message})")
        trial = Trial(
            batch=request.batches[len(trials)],
            outcome=outcome,
            peak_bytes=measured["peak_bytes"] if measured else None,
            step_seconds=measured["step_seconds"] if measured and not paused else None,
            seconds=now - began,
            message=message,
            fresh=not trials,
            process_peak_bytes=measured.get("process_peak_bytes") if measured else None,
        )
        began = now
        trials.append(trial)
        if on_trial:
            on_trial(trial)

    def on_message(message: Message) -> None:
        nonlocal paused
        if len(trials) == len(request.batches) or (trials and trials[-1].outcome != "fits"):
            return
        event = message.get("event")
        if event == "error":
            kind, text = str(message.get("type")), str(message.get("message"))
            add(classify_error(kind, text), summarise_error(kind, text))
        elif event == "trial" and _is_result(message, request.batches[len(trials)]):
            add("fits", measured=message)
            if on_recording is not None:
                for recording in _readable(texts):
                    on_recording(request.batches[0], recording)
        elif event == "paused":
            paused = True
        elif event == "recording":
            texts.append(str(message["recording"]))
        elif event == "trial":
            add("failed", shorten(f"the trial's process sent a wrong result: {message}"))

    def stop() -> str:
        check()
        if _clock_offset() - clock_offset < -_CLOCK_JUMP_SECONDS:
            return f"{_CLOCK_SET}, and TensorFlow may wait until it is there again; {_AGAIN}"
        return _host_exhausted()

    ending = run_isolated(
        target,
        request.to_payload(),
        environment=child_environment(request.budget),
        timeout_seconds=timeout_seconds,
        on_message=on_message,
        stop=stop,
    )
    if len(trials) < len(request.batches) and (not trials or trials[-1].outcome == "fits"):
        add(*_explain(ending, timeout_seconds))
    return trials


def _readable(texts: Sequence[str]) -> Iterator[Recording]:
    """Read recordings; a search does without one that is damaged."""
    for text in texts:
        try:
            recording = recording_from_text(text)
        except ValueError:
            continue
        yield recording


def _clock_offset() -> float:
    """Seconds between the clock that people set, by which TensorFlow waits, and the steady one."""
    return time.time() - time.monotonic()


def _host_exhausted() -> str:
    """Say that the host has next to no memory left; "" while it has."""
    total_bytes, free_bytes = host_memory()
    # A share that lets the rest of the machine go on without swapping.
    if free_bytes >= max(total_bytes * _HOST_RESERVE_SHARE, _HOST_RESERVE_BYTES):
        return ""
    return (
        f"stopped before the machine would swap: {format_bytes(free_bytes)} of its "
        f"{format_bytes(total_bytes)} were left; give a smaller --memory, or end what holds them"
    )


def _doubt(budget: Budget, paused: bool) -> str:
    """Say why a device's memory that ran out may not have been the budget's; "" if it was."""
    if paused:
        return (
            "the trial was stopped and went on, and TensorFlow waits for memory by the clock; "
            "the same command tries again"
        )
    if budget.device.kind != "gpu":
        return ""
    deadline = time.monotonic() + _GIVEN_BACK_SECONDS
    while True:
        try:
            _check_free_now(budget)
        except InputError as error:
            # What a process held is given back a moment after its end.
            if time.monotonic() > deadline:
                return str(error)
        else:
            return ""
        time.sleep(0.1)


def _check_free_now(budget: Budget) -> None:
    """Refuse a GPU that others have taken memory of since the budget was made."""
    now = {gpu.uuid: gpu for gpu in list_gpus()}
    for device in budget.device.each:
        if device.uuid in now:
            check_free(dataclasses.replace(budget, device=now[device.uuid]))


def _is_result(message: Message, batch: int) -> bool:
    step_seconds = message.get("step_seconds")
    sizes = [message.get(name) for name in ("peak_bytes", "process_peak_bytes")]
    return (
        message.get("batch") == batch
        and all(size is None or (type(size) is int and size >= 0) for size in sizes)
        and (step_seconds is None or (type(step_seconds) in (int, float) and step_seconds >= 0))
    )


def _explain(ending: Ending, timeout_seconds: float) -> tuple[Outcome, str]:
    """Say why a process ended without the result of a batch."""
    if ending.stopped:
        # The machine is full, and not the budget: that says nothing about the batch.
        return "failed", ending.stopped
    if ending.error is not None:
        return classify_error(*ending.error), summarise_error(*ending.error)
    outcome: Outcome = "failed"
    if ending.timed_out:
        reason = f"no result within {timeout_seconds:g} s; killed"
    elif ending.garbage:
        reason = f"the trial's process sent what is no message: {ending.garbage}"
    else:
        outcome, reason = classify_exit(
            ending.exit_code, ending.oom_kills_before, ending.oom_kills_after, ending.printed
        )
    printed = f"; it printed: {ending.tail}" if ending.tail and outcome == "failed" else ""
    return outcome, shorten(reason + printed)
