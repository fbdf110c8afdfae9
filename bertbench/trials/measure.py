"""Make trials: run batches in processes of their own, and tell how each of them ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from bertbench.core.workload import Setup, TrainingStep
from bertbench.hardware.device import Budget
from bertbench.memory.allocator.budget import child_environment
from bertbench.memory.allocator.recording import Recording, recording_from_text
from bertbench.trials.interference import THIS_MACHINE, Machine
from bertbench.trials.isolation import Message, run_isolated
from bertbench.trials.outcome import (
    Outcome,
    classify_error,
    explain_end,
    shorten,
    summarise_error,
)
from bertbench.trials.request import TrialRequest
from bertbench.trials.trial import Trial

TARGET = "bertbench.trials.worker:run_trial"
"""What a trial's process runs: training steps for every batch of a `TrialRequest`."""

TIMEOUT_SECONDS = 900.0
"""Longest time of one batch by default: its steps, for the first also start and tracing."""


@dataclasses.dataclass(frozen=True)
class TrialSettings:
    """How trials are made.

    Attributes:
        steps: optimizer steps for each batch.
        timeout_seconds: longest time of one batch, see `TIMEOUT_SECONDS`.
        fresh: take a new process for every batch, instead of one for all of a call.
        target: `module:function` that trains, see `measure_batches`.
    """

    steps: int = 3
    timeout_seconds: float = TIMEOUT_SECONDS
    fresh: bool = False
    target: str = TARGET


@dataclasses.dataclass(frozen=True)
class TrialListener:
    """Functions that are called while trials run.

    Attributes:
        on_trial: takes every trial as soon as it is known, to make it durable.
        on_recording: takes a batch that fits, and what it asked of the allocator. None records
            nothing; batches that share a process are not recorded either.
        poll: called several times a second; what it raises ends the trial and is raised on.
    """

    on_trial: Callable[[Trial], None] = lambda trial: None
    on_recording: Callable[[int, Recording], None] | None = None
    poll: Callable[[], None] = lambda: None


class MeasureBatches(Protocol):
    """What makes trials: `measure_batches`, or what a test puts in its place."""

    def __call__(
        self,
        setup: Setup,
        budget: Budget,
        batches: Sequence[int],
        settings: TrialSettings,
        listener: TrialListener,
    ) -> list[Trial]:
        """See `measure_batches`."""


def measure_step(
    step: TrainingStep,
    budget: Budget,
    settings: TrialSettings = TrialSettings(),
    listener: TrialListener = TrialListener(),
) -> Trial:
    """Try one micro-batch in a fresh process; see `measure_batches`."""
    (trial,) = measure_batches(step.setup, budget, [step.micro_batch], settings, listener)
    return trial


def measure_batches(
    setup: Setup,
    budget: Budget,
    batches: Sequence[int],
    settings: TrialSettings = TrialSettings(),
    listener: TrialListener = TrialListener(),
    machine: Machine = THIS_MACHINE,
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
        setup: workload and levers.
        budget: device, and the bytes of it that the allocator may use.
        batches: micro-batch sizes, rising.
        settings: how the trials are made.
        listener: what is called meanwhile.
        machine: what may end a trial besides its batch.

    Returns:
        Trials in the order of `batches`; only the last may be `oom` or `failed`.
    """
    request = TrialRequest(setup, budget, tuple(batches), settings.steps)
    fresh = settings.fresh or len(request.batches) == 1
    groups = [(batch,) for batch in request.batches] if fresh else [request.batches]
    record = fresh and listener.on_recording is not None
    trials: list[Trial] = []
    for group in groups:
        part = dataclasses.replace(request, batches=group, record=record)
        trials += _OneProcess(part, listener, machine).run(settings)
        if trials[-1].outcome != "fits":
            break
    return trials


class _OneProcess:
    """The trials of one process, put together from what it sends."""

    def __init__(self, request: TrialRequest, listener: TrialListener, machine: Machine) -> None:
        """Begin without trials; the time of the first one counts from here."""
        self._request = request
        self._listener = listener
        self._machine = machine
        self._trials: list[Trial] = []
        self._recordings: list[str] = []
        self._paused = False
        self._began = time.monotonic()
        self._clock_offset = machine.clock_offset()

    def run(self, settings: TrialSettings) -> list[Trial]:
        """Run the process until its end."""
        end = run_isolated(
            settings.target,
            self._request.to_payload(),
            environment=child_environment(self._request.budget),
            timeout_seconds=settings.timeout_seconds,
            on_message=self._receive,
            stop=self._reason_to_stop,
        )
        if not self._is_complete():
            self._add(*explain_end(end, settings.timeout_seconds))
        return self._trials

    def _is_complete(self) -> bool:
        """Whether every batch has its trial, or one of them did not fit."""
        trials = self._trials
        return len(trials) == len(self._request.batches) or (
            bool(trials) and trials[-1].outcome != "fits"
        )

    def _reason_to_stop(self) -> str:
        self._listener.poll()
        return self._machine.reason_to_stop(self._clock_offset)

    def _receive(self, message: Message) -> None:
        if self._is_complete():
            return
        event = message.get("event")
        if event == "error":
            kind, text = str(message.get("type")), str(message.get("message"))
            self._add(classify_error(kind, text), summarise_error(kind, text))
        elif event == "trial" and _is_result(message, self._request.batches[len(self._trials)]):
            self._add("fits", measured=message)
            self._pass_recordings_on()
        elif event == "paused":
            self._paused = True
        elif event == "recording":
            self._recordings.append(str(message["recording"]))
        elif event == "trial":
            self._add("failed", shorten(f"the trial's process sent a wrong result: {message}"))

    def _pass_recordings_on(self) -> None:
        on_recording = self._listener.on_recording
        if on_recording is not None:
            for recording in _readable(self._recordings):
                on_recording(self._request.batches[0], recording)

    def _add(self, outcome: Outcome, message: str = "", measured: Message | None = None) -> None:
        """Add the trial of the batch that is next, unless its outcome is doubtful: then failed."""
        now = time.monotonic()
        if outcome == "oom":
            doubt = self._machine.reason_to_doubt(
                self._request.budget, self._clock_offset, self._paused
            )
            if doubt:
                outcome, message = "failed", shorten(f"{doubt} ({message})")
        trial = Trial(
            batch=self._request.batches[len(self._trials)],
            outcome=outcome,
            peak_bytes=measured["peak_bytes"] if measured else None,
            step_seconds=measured["step_seconds"] if measured and not self._paused else None,
            seconds=now - self._began,
            message=message,
            fresh=not self._trials,
            process_peak_bytes=measured.get("process_peak_bytes") if measured else None,
        )
        self._began = now
        self._trials.append(trial)
        self._listener.on_trial(trial)


def _readable(texts: Sequence[str]) -> Iterator[Recording]:
    """Read recordings; a search does without one that is damaged."""
    for text in texts:
        try:
            recording = recording_from_text(text)
        except ValueError:
            continue
        yield recording


def _is_result(message: Message, batch: int) -> bool:
    step_seconds = message.get("step_seconds")
    sizes = [message.get(name) for name in ("peak_bytes", "process_peak_bytes")]
    return (
        message.get("batch") == batch
        and all(size is None or (type(size) is int and size >= 0) for size in sizes)
        and (step_seconds is None or (type(step_seconds) in (int, float) and step_seconds >= 0))
    )
