"""Compile a training step for a device that need not exist, and learn the memory that it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bertbench.compiling.installed import compiler_versions
from bertbench.compiling.target import CompileTarget
from bertbench.core.errors import WorkError
from bertbench.core.workload import TrainingStep
from bertbench.memory.compiled import (
    CompiledMemory,
    compiled_fits,
    compiled_memory_from_json,
)
from bertbench.trials.interference import THIS_MACHINE, Machine
from bertbench.trials.isolation import Message, ProcessEnd, run_isolated
from bertbench.trials.outcome import classify_error, explain_end, summarise_error
from bertbench.trials.temporary_folders import temporary_folder
from finetune.errors import InputError

TIMEOUT_SECONDS = 7200.0
"""Default limit of one compilation; a TPU's compiler takes an hour for the largest models."""

COMPILED, NO_ROOM, FAILED = "compiled", "no room", "failed"
"""Outcomes of a compilation: the program was made; the compiler itself says that the device's
memory is too small for it, as a TPU's does; or something that says nothing about the batch."""

_LOWER = "bertbench.compiling.worker:lower"
_COMPILE_HERE = "bertbench.compiling.worker:compile_here"
_COMPILE = "bertbench.compiling.worker:compile_for"
_XLA_ERROR = "XlaRuntimeError"

_PROCESS = "the compiler's process"
_ON_A_FULL_HOST = "end what holds the memory, or compile on a machine with more"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """The compiler's word about one micro-batch.

    Attributes:
        micro_batch: examples of one forward and backward pass on each device.
        outcome: `COMPILED`, `NO_ROOM` or `FAILED`.
        memory: what the program needs of one device; None unless it compiled.
        message: why it did not.
        seconds: time that lowering and compiling took.
    """

    micro_batch: int
    outcome: str
    memory: CompiledMemory | None = None
    message: str = ""
    seconds: float = 0.0

    def fits_in(self, step: TrainingStep, kind: str, budget_bytes: int) -> bool:
        """Whether the step fits in a budget; of a compilation that did not fail.

        A TPU's compiler refuses what has no room in the device's memory: what it compiled fits, and
        the budget says nothing more. For a GPU see `bertbench.memory.compiled.compiled_fits`.

        Args:
            step: that was compiled.
            kind: of the device.
            budget_bytes: of each device; not used for a TPU.
        """
        if self.outcome == NO_ROOM or self.memory is None:
            return False
        return kind == "tpu" or compiled_fits(step, self.memory, kind, budget_bytes)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return dataclasses.asdict(self)


Compile = Callable[[TrainingStep, CompileTarget], Compilation]
"""Compiles a step for a target, as `compile_step` does; a test gives a simulated compiler."""


@dataclasses.dataclass(frozen=True)
class CompileSettings:
    """How steps are compiled.

    Attributes:
        timeout_seconds: limit of lowering a step, and again of compiling it.
        poll: called several times a second; what it raises ends the compilation and is raised on.
        machine: what may end it besides the compiler.
        run: starts the processes, as `bertbench.trials.isolation.run_isolated` does.
    """

    timeout_seconds: float = TIMEOUT_SECONDS
    poll: Callable[[], None] = lambda: None
    machine: Machine = THIS_MACHINE
    run: Callable[..., ProcessEnd] = run_isolated


def compile_step(
    step: TrainingStep, target: CompileTarget, settings: CompileSettings = CompileSettings()
) -> Compilation:
    """Compile one optimizer step as `run --xla`, or a TPU, would execute it.

    Nothing of the model is in memory: the step is lowered with variables that nothing fills, in one
    process, and compiled in another.

    Example:
        >>> step = Setup(published_workload("bert-base", 128), Levers(xla=True)).step(32)
        >>> compile_step(step, compile_target(find_accelerator("t4"))).memory.device_bytes

    Args:
        step: workload, levers and micro-batch.
        target: the device.
        settings: limits.

    Raises:
        InputError: the compiler is not installed; the message says what to install.
    """
    began = time.monotonic()
    if target.kind == "cpu":
        end, messages = _run(_COMPILE_HERE, _step_payload(step, 1), settings)
        compilation = _read(end, messages, step.micro_batch, target, settings)
    else:
        compiler_versions(target.kind)
        try:
            with lowered(step, target.replicas, settings) as module:
                compilation = compile_lowered(module, step.micro_batch, target, settings)
        except WorkError as error:
            compilation = Compilation(step.micro_batch, FAILED, None, str(error))
    return dataclasses.replace(compilation, seconds=time.monotonic() - began)


@contextlib.contextmanager
def lowered(
    step: TrainingStep, replicas: int = 1, settings: CompileSettings = CompileSettings()
) -> Iterator[Path]:
    """Lower a step to a file, which several targets can compile; it is gone after the block.

    Args:
        step: workload, levers and micro-batch.
        replicas: devices that share the effective batch.
        settings: limits.

    Raises:
        WorkError: the step could not be lowered.
    """
    with temporary_folder() as folder:
        module = Path(folder) / "module.hlo"
        payload = {**_step_payload(step, replicas), "module": str(module)}
        end, messages = _run(_LOWER, payload, settings)
        if not any(message.get("event") == "lowered" for message in messages):
            raise WorkError(f"the step could not be lowered: {_explain(end, settings)}")
        yield module


def compile_lowered(
    module: Path,
    micro_batch: int,
    target: CompileTarget,
    settings: CompileSettings = CompileSettings(),
) -> Compilation:
    """Compile a step that has been lowered for this number of replicas.

    Args:
        module: file of `lowered`.
        micro_batch: of the step.
        target: the device.
        settings: limits.

    Raises:
        InputError: the compiler is not installed; the message says what to install.
    """
    compiler_versions(target.kind)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=module.parent) as folder:
        payload = {
            **target.to_json(),
            "module": str(module),
            "answer": str(Path(folder) / "answer.json"),
        }
        end, messages = _run(_COMPILE, payload, settings)
    compilation = _read(end, messages, micro_batch, target, settings)
    return dataclasses.replace(compilation, seconds=time.monotonic() - began)


def _step_payload(step: TrainingStep, replicas: int) -> dict[str, Any]:
    """What is lowered, as `bertbench.compiling.worker` takes it."""
    return {
        "workload": dataclasses.asdict(step.workload),
        "levers": step.levers.to_json(),
        "rows": step.micro_batch * step.levers.accumulation_steps * replicas,
        "replicas": replicas,
    }


def _read(
    end: ProcessEnd,
    messages: Sequence[Message],
    micro_batch: int,
    target: CompileTarget,
    settings: CompileSettings,
) -> Compilation:
    """Read what a compilation's process has sent."""
    for message in messages:
        if message.get("event") == "compiled":
            try:
                memory = compiled_memory_from_json(message.get("memory", {}))
            except InputError as error:
                return Compilation(micro_batch, FAILED, None, f"a wrong answer: {error}")
            return Compilation(micro_batch, COMPILED, memory)
        if message.get("event") == "error":
            text = str(message.get("message"))
            # Only a TPU's compiler lays the device's memory out.
            is_limit = target.kind == "tpu" and classify_error(_XLA_ERROR, text) == "oom"
            outcome = NO_ROOM if is_limit else FAILED
            return Compilation(micro_batch, outcome, None, summarise_error(_XLA_ERROR, text))
    return Compilation(micro_batch, FAILED, None, _explain(end, settings))


def _run(
    function: str, payload: dict[str, Any], settings: CompileSettings
) -> tuple[ProcessEnd, list[Message]]:
    offset = settings.machine.clock_offset()
    messages: list[Message] = []

    def stop() -> str:
        settings.poll()
        return settings.machine.reason_to_stop(offset, _ON_A_FULL_HOST)

    end = settings.run(
        function,
        payload,
        # It uses no device, and is to see none.
        environment={"CUDA_VISIBLE_DEVICES": ""},
        timeout_seconds=settings.timeout_seconds,
        on_message=messages.append,
        stop=stop,
    )
    return end, messages


def _explain(end: ProcessEnd, settings: CompileSettings) -> str:
    """Say why a process ended without an answer."""
    _, reason = explain_end(
        end, settings.timeout_seconds, process=_PROCESS, what_to_do=_ON_A_FULL_HOST
    )
    return reason
