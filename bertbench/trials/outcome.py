"""What a trial's end means: out of memory, or failed for another reason.

Every device has an allocator with a budget, and only that allocator can say that a batch does not
fit. When host memory runs out, that says something about the machine and not about the batch. So
an error counts as out of memory by its type together with its text. Everything else is `failed`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from typing import Literal

from bertbench.trials.interference import TRY_LESS_MEMORY
from bertbench.trials.isolation import ProcessEnd

Outcome = Literal["fits", "oom", "failed"]

MESSAGE_LIMIT = 500
"""Characters of a trial's message; TensorFlow's can be pages of graph nodes."""

# Errors whose kind already says that some resource ran out: TensorFlow's own, and XLA's client.
_EXHAUSTED_TYPES = ("ResourceExhaustedError", "XlaRuntimeError", "JaxRuntimeError")

# Errors that TensorFlow raises for any trouble of a device or library.
_DEVICE_TYPES = ("InternalError", "UnknownError", "AbortedError", "UnavailableError")

# Errors of those types also tell of other things that ran out, such as threads or disk space. A
# smaller batch would need as much of these.
_OTHER_RESOURCE = re.compile(
    r"(received|sent|send) message larger than|too many open files|no space left on device"
    r"|quota exceeded|exceeds? quota|can't start new thread|MemoryError"
    # A TPU's small memories, which a program overruns by a fault of the compiler.
    r"|memory space [vs]mem\b",
    re.IGNORECASE,
)

_KERNEL_KILLED = "killed by the kernel for want of host memory"

# Host memory that ran out: the kernel, the system's calls, the C++ and Python runtimes, oneDNN,
# TensorFlow's allocators of host memory, and the refusal of a capped CPU's whole budget (see
# `bertbench.memory.allocator.budget`), which is asked for in rows of a MiB.
_HOST_MEMORY_RE = re.compile(
    _KERNEL_KILLED + r"|cannot allocate memory|\bENOMEM\b|bad_alloc|MemoryError"
    r"|could not (?:create|allocate) (?:a )?(?:memory object|scratch)"
    r"|pinned host memory|failed to alloc(?:ate)? \d+ bytes on host"
    r"|by allocator (?:cpu|mklcpu|\w+_host_bfc)\b|Allocator \((?:cpu|mklcpu|\w+_host_bfc)\)"
    r"|shape\[\d+,1048576\] and type uint8\b",
    re.IGNORECASE,
)

# Codes of CUDA, ROCm and their libraries, and TensorFlow's word for a copy to a device whose
# destination could not be allocated (tensorflow/tensorflow issue 7025).
_DEVICE_MEMORY = (
    r"\b(?:CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory|CUFFT_ALLOC_FAILED"
    r"|CU(?:BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED)\b"
    r"|Dst tensor is not initialized"
    r"|RESOURCE_EXHAUSTED: [^\n]*(?:out of memory|failed to allocate request)"
)
_DEVICE_MEMORY_RE = re.compile(_DEVICE_MEMORY, re.IGNORECASE)

# Allocators (BFC on GPU and capped CPU, eager copies), XLA at run time, XLA at compile time
# on GPU and TPU.
_MEMORY_RE = re.compile(
    _DEVICE_MEMORY + r"|OOM when allocating tensor"
    r"|failed to allocate memory"
    r"|unable to allocate output tensor"
    r"|out of (?:gpu )?memory"
    r"|failed to allocate request for [\d.]+"
    r"|attempting to (?:reserve|allocate) [\d.]+\s*\w+\b[^\n]*not possible"
    r"|exceeded hbm capacity"
    r"|would exceed memory",
    re.IGNORECASE,
)

# What TensorFlow's allocator itself logs once it has given up, see `classify_exit`. It logs the
# same with `_NO_FAILURE` for an operation that can do with less memory and goes on.
_ALLOCATOR_FAILED_RE = re.compile(
    r"^[WE]\d{4} .* bfc_allocator\.cc:\d+\] (Allocator \(\S+\) ran out of memory trying to "
    r"allocate [^\n]*)",
    re.MULTILINE,
)
_NO_FAILURE = "this is not a failure"
_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)

_SIGNAL_WORDS = {
    signal.SIGSEGV: "segmentation fault",
    signal.SIGABRT: "aborted",
    signal.SIGBUS: "bus error",
    signal.SIGFPE: "arithmetic error",
    signal.SIGILL: "illegal instruction",
    signal.SIGTERM: "terminated",
}


def classify_error(type_name: str, message: str) -> Outcome:
    """Tell whether an exception in a training step means that the device's memory ran out.

    Args:
        type_name: name of the exception's class, such as `ResourceExhaustedError`.
        message: its whole text; in a traced function the telling line comes after pages.

    Returns:
        `oom` or `failed`.
    """
    if memory_ran_out(type_name, message) and not _HOST_MEMORY_RE.search(message):
        return "oom"
    return "failed"


def memory_ran_out(type_name: str, message: str) -> bool:
    """Whether an exception means that memory ran out, be it the device's or the host's.

    A run may go on with a plan that needs less of either. It is no evidence of a limit.
    """
    if type_name in _EXHAUSTED_TYPES:
        return bool(_MEMORY_RE.search(message)) and not _OTHER_RESOURCE.search(message)
    return type_name in _DEVICE_TYPES and bool(_DEVICE_MEMORY_RE.search(message))


def summarise_error(type_name: str, message: str) -> str:
    """Return one line that says what happened: the line of the message that tells, and the type."""
    lines = [line.strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("[[", "[Op:", "Hint:"))]
    telling = [line for line in lines if _MEMORY_RE.search(line)]
    if memory_ran_out(type_name, message) and telling:
        line = telling[0]
    elif lines and lines[0].startswith("Graph execution error"):
        line = lines[-1]
    else:
        line = lines[0] if lines else ""
    line = re.sub(r"\{\{function_node [^}]*\}\}\s*", "", line)
    line = re.sub(r"\s*\[Op:[^\]]*\](\s*name:)?\s*$", "", line)
    return shorten(f"{type_name}: {line}" if line else type_name)


def classify_exit(
    exit_code: int | None,
    oom_kills_before: Mapping[str, int],
    oom_kills_after: Mapping[str, int],
    printed: str = "",
    *,
    process: str = "the trial's process",
    what_to_do: str = TRY_LESS_MEMORY,
) -> tuple[Outcome, str]:
    """Tell what the end of a trial's process means, when it ended before its result.

    Some kernels do not check whether their memory could be allocated and crash instead: oneDNN's
    batched matrix product, for instance, aborts with a failed check of its scratch tensor's type
    (seen in TensorFlow 2.21). So a crash is out of memory if TensorFlow's allocator has logged just
    before that it gave up. The same text from another source, or another kind of end, is not.
    Neither is a kill by the kernel when the host's memory runs out: it was not the budget that was
    full.

    Args:
        exit_code: of the process; the negative number of the signal that ended it; None when it
            could not be ended.
        oom_kills_before: `bertbench.hardware.host.oom_kill_counts` before the process started.
        oom_kills_after: the same after it ended.
        printed: what it printed, TensorFlow's log included.
        process: what the process is called in the reason.
        what_to_do: when the host's memory ran out.

    Returns:
        `oom` or `failed`, and the reason in words.
    """
    if exit_code is None:
        return "failed", f"{process} could not be ended"
    if exit_code == 0:
        return "failed", f"{process} ended without a result"
    if exit_code > 0:
        return "failed", f"{process} ended with exit code {exit_code}"
    if -exit_code == signal.SIGKILL:
        return "failed", _explain_kill(oom_kills_before, oom_kills_after, what_to_do)
    try:
        number = signal.Signals(-exit_code)
    except ValueError:
        return "failed", f"killed by signal {-exit_code}"
    word = _SIGNAL_WORDS.get(number)
    killed = f"killed by {number.name}" + (f" ({word})" if word else "")
    failure = _last_failure(printed) if number in _CRASHES else ""
    if failure:
        return "oom", f"{failure}, after which a kernel crashed ({killed})"
    return "failed", killed


def explain_end(
    end: ProcessEnd,
    timeout_seconds: float,
    *,
    process: str = "the trial's process",
    what_to_do: str = TRY_LESS_MEMORY,
) -> tuple[Outcome, str]:
    """Say why an isolated process ended without its result.

    Args:
        end: of the process.
        timeout_seconds: how long it might send nothing.
        process: see `classify_exit`.
        what_to_do: see `classify_exit`.

    Returns:
        `oom` or `failed`, and the reason in words.
    """
    if end.stopped:
        # The machine is full, and not the budget: that says nothing about the batch.
        return "failed", end.stopped
    if end.error is not None:
        return classify_error(*end.error), summarise_error(*end.error)
    outcome: Outcome = "failed"
    if end.timed_out:
        reason = f"no result within {timeout_seconds:g} s; killed"
    elif end.garbage:
        reason = f"{process} sent what is no message: {end.garbage}"
    else:
        outcome, reason = classify_exit(
            end.exit_code,
            end.oom_kills_before,
            end.oom_kills_after,
            end.printed,
            process=process,
            what_to_do=what_to_do,
        )
    printed = f"; it printed: {end.tail}" if end.tail and outcome == "failed" else ""
    return outcome, shorten(reason + printed)


def recorded_outcome(outcome: Outcome, message: str) -> Outcome:
    """Outcome of a trial that was recorded, by today's rules.

    Earlier versions took the end of host memory for that of the device's.

    Args:
        outcome: that was recorded.
        message: that was recorded with it.
    """
    if outcome == "oom" and (_HOST_MEMORY_RE.search(message) or _NO_FAILURE in message):
        return "failed"
    return outcome


def _explain_kill(before: Mapping[str, int], after: Mapping[str, int], what_to_do: str) -> str:
    rising = [source for source, count in after.items() if count > before.get(source, count)]
    if not rising:
        return "killed by SIGKILL; not known to be out of memory"
    return f"{_KERNEL_KILLED} ({rising[0]}), which tells nothing of the batch; {what_to_do}"


def _last_failure(printed: str) -> str:
    """Return what the allocator logged last when it gave up, if the host did not run out later."""
    failures = [
        found for found in _ALLOCATOR_FAILED_RE.finditer(printed) if _NO_FAILURE not in found[1]
    ]
    if not failures or _HOST_MEMORY_RE.search(printed, failures[-1].start()):
        return ""
    return failures[-1][1]


def shorten(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Put a text on one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
