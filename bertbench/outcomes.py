"""What a trial's end means: out of memory, or failed for another reason.

Only a real exhaustion of memory may become a batch limit, so the recognisers ask for the kind of
the error as well as for its words; everything they do not know is `failed`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from typing import Literal

Outcome = Literal["fits", "oom", "failed"]

MESSAGE_LIMIT = 500
"""Characters of a trial's message; TensorFlow's can be pages of graph nodes."""

# Errors whose kind already says that some resource ran out: TensorFlow's own, and XLA's client.
_EXHAUSTED_TYPES = ("ResourceExhaustedError", "XlaRuntimeError", "JaxRuntimeError")

# Errors that TensorFlow raises for any trouble of a device or library.
_DEVICE_TYPES = ("InternalError", "UnknownError", "AbortedError", "UnavailableError")

# The same kind stands for limits that no smaller batch would meet.
_OTHER_RESOURCE = re.compile(
    r"(received|sent|send) message larger than|too many open files|no space left on device"
    r"|quota exceeded|exceeds? quota|can't start new thread|MemoryError"
    # A TPU's small memories, which a program overruns by a fault of the compiler.
    r"|memory space [vs]mem\b",
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

# What TensorFlow's allocator itself logs once it has given up, see `classify_exit`.
_ALLOCATOR_FAILED_RE = re.compile(
    r"^[WE]\d{4} .* bfc_allocator\.cc:\d+\] (Allocator \(\S+\) ran out of memory trying to "
    r"allocate [^\n]*)",
    re.MULTILINE,
)
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
    """Tell whether an exception in a training step means that memory ran out.

    Args:
        type_name: name of the exception's class, such as `ResourceExhaustedError`.
        message: its whole text; in a traced function the telling line comes after pages.

    Returns:
        `oom` or `failed`.
    """
    if type_name in _EXHAUSTED_TYPES:
        if _MEMORY_RE.search(message) and not _OTHER_RESOURCE.search(message):
            return "oom"
    elif type_name in _DEVICE_TYPES and _DEVICE_MEMORY_RE.search(message):
        return "oom"
    return "failed"


def summarise_error(type_name: str, message: str) -> str:
    """Return one line that says what happened: the telling line of the message, with the type."""
    lines = [line.strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("[[", "[Op:", "Hint:"))]
    telling = [line for line in lines if _MEMORY_RE.search(line)]
    if classify_error(type_name, message) == "oom" and telling:
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
) -> tuple[Outcome, str]:
    """Tell what the end of a trial's process means, when it ended before its result.

    Some kernels do not check whether their memory could be allocated and crash instead: oneDNN's
    batched matrix product, for instance, aborts with a failed check of its scratch tensor's type
    (seen in TensorFlow 2.21). A crash right after TensorFlow's allocator has logged that it
    gave up is therefore out of memory; the same words from anybody else, or another end, are not.

    Args:
        exit_code: of the process; the negative number of the signal that ended it; None when it
            could not be ended.
        oom_kills_before: `bertbench.hostmemory.oom_kill_counts` before the process started.
        oom_kills_after: the same after it ended.
        printed: what it printed, TensorFlow's log included.

    Returns:
        `oom` or `failed`, and the reason in words.
    """
    if exit_code is None:
        return "failed", "the trial's process could not be ended"
    if exit_code == 0:
        return "failed", "the trial's process ended without a result"
    if exit_code > 0:
        return "failed", f"the trial's process ended with exit code {exit_code}"
    if -exit_code == signal.SIGKILL:
        rising = [
            source
            for source, count in oom_kills_after.items()
            if count > oom_kills_before.get(source, count)
        ]
        if rising:
            return "oom", f"killed by the kernel for want of host memory ({rising[0]})"
        return "failed", "killed by SIGKILL; not known to be out of memory"
    try:
        number = signal.Signals(-exit_code)
    except ValueError:
        return "failed", f"killed by signal {-exit_code}"
    word = _SIGNAL_WORDS.get(number)
    killed = f"killed by {number.name}" + (f" ({word})" if word else "")
    failures = _ALLOCATOR_FAILED_RE.findall(printed) if number in _CRASHES else []
    if failures:
        return "oom", f"{failures[-1]}, after which a kernel crashed ({killed})"
    return "failed", killed


def shorten(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Put a text on one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
