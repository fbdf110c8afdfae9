"""Run a function in a fresh process that cannot harm this one, and learn how it ended.

`bertbench.trials.fork_server` starts the process, with TensorFlow imported. What the process has
sent counts even if it crashes later. It leaves neither a process nor a file behind, and every wait
for it has an end. Windows is not supported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from bertbench.core.errors import WorkError
from bertbench.hardware.host import oom_kill_counts
from bertbench.trials.fork_client import StartedProcess, read_number, start
from bertbench.trials.fork_server import OWN_KEY, Message, ProcessRequest
from bertbench.trials.temporary_folders import temporary_folder

# A message is a line of JSON; the largest carries what a large model asked of its allocator.
_MESSAGE_LIMIT_BYTES = 1 << 24
# TensorFlow's allocator lists every chunk that it holds when it fails: a megabyte at times.
_PRINTED_LIMIT_BYTES = 1 << 23
_TAIL_LINES = 5
_ASK_EVERY_SECONDS = 0.2

KILL_SECONDS = 10.0
"""Longest time that a killed process takes to end."""

_NOT_KNOWN = "how it ended is not known: the process that waits for its end does not tell"

# Processes of this one's trials that could not be ended.
_not_ended: set[int] = set()


@dataclasses.dataclass(frozen=True)
class ProcessEnd:
    """How an isolated process ended.

    Attributes:
        exit_code: its exit code; the negative number of the signal that ended it; None if it
            could not be ended.
        timed_out: it was killed because it sent nothing for too long.
        stopped: why `stop` of `run_isolated` had it killed, or why its end is not known; else
            empty.
        garbage: what it sent that is no message, for which it was killed; else empty.
        error: type name and text of the exception that left the function.
        printed: the end of what it printed.
        oom_kills_before: the kernel's OOM kill counts at its start.
        oom_kills_after: the same at its end.
        preloaded: TensorFlow was imported when it began, as it should be under a fork server.
        seconds: from the request to its end.
    """

    exit_code: int | None
    timed_out: bool
    stopped: str
    garbage: str
    error: tuple[str, str] | None
    printed: str
    oom_kills_before: Mapping[str, int]
    oom_kills_after: Mapping[str, int]
    preloaded: bool
    seconds: float

    @property
    def tail(self) -> str:
        """The last lines that it printed; of a crash, the innermost calls."""
        lines = [line.strip() for line in self.printed.splitlines() if line.strip()]
        for index, line in enumerate(lines):
            # After the stack, innermost call first, comes a list of all extension modules.
            if line.startswith("Fatal Python error"):
                stack = [found for found in lines[index:] if found.startswith(("Fatal", "File"))]
                return "\n".join([*lines[max(index - 2, 0) : index], *stack[:_TAIL_LINES]])
        return "\n".join(lines[-_TAIL_LINES:])


def run_isolated(
    target: str,
    payload: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    timeout_seconds: float,
    on_message: Callable[[Message], None],
    stop: Callable[[], str] | None = None,
) -> ProcessEnd:
    """Run `target(payload, send)` in a fresh process and wait for its end.

    The process has its own session, so a Ctrl-C on the terminal does not reach it. It is killed,
    with whatever it has started, when this function is left for any reason, and when this process
    dies. The kernel kills it before others when host memory runs out.

    Args:
        target: `module:function`, importable here and there. It takes the payload and a function
            that sends a dict of JSON values.
        payload: picklable values.
        environment: variables to set before anything else happens, on top of this process's.
        timeout_seconds: longest time without a message before the process counts as hanging.
        on_message: called here with every message as it comes. What it raises ends the process
            and is raised on.
        stop: asked several times a second; a reason that it gives ends the process.

    Returns:
        How the process ended.
    """
    started = time.monotonic()
    _check_ended()
    oom_kills_before = oom_kill_counts()
    # TensorFlow writes the code that it generates to temporary files, and a process that is
    # killed does not take them away.
    with tempfile.TemporaryFile() as log, temporary_folder() as folder:
        variables = {**os.environ, **environment, "TMPDIR": str(folder)}
        trial = start(ProcessRequest(target, payload, variables, sys.path), log.fileno())
        try:
            inbox = _receive(trial, timeout_seconds, on_message, stop)
        finally:
            exit_code = _end(trial)
            trial.close()
        return ProcessEnd(
            exit_code=exit_code,
            timed_out=inbox.timed_out,
            stopped=inbox.stopped,
            garbage=inbox.garbage,
            error=inbox.error,
            printed=_read_end(log.fileno()),
            oom_kills_before=oom_kills_before,
            oom_kills_after=oom_kill_counts(),
            preloaded=inbox.preloaded,
            seconds=time.monotonic() - started,
        )


@dataclasses.dataclass
class _Inbox:
    """What has come from a process so far."""

    pending: bytes = b""
    garbage: str = ""
    error: tuple[str, str] | None = None
    timed_out: bool = False
    stopped: str = ""
    preloaded: bool = False


def _receive(
    trial: StartedProcess,
    timeout_seconds: float,
    on_message: Callable[[Message], None],
    stop: Callable[[], str] | None,
) -> _Inbox:
    """Pass messages on until the process has ended, hangs or sends garbage."""
    inbox = _Inbox()
    deadline = time.monotonic() + timeout_seconds
    has_ended = False
    # What is there already is read before the first question: a result stands.
    ask_at = time.monotonic() + _ASK_EVERY_SECONDS if stop else math.inf
    sources = select.poll()
    sources.register(trial.messages, select.POLLIN)
    sources.register(trial.status, select.POLLIN)
    while True:
        now = time.monotonic()
        if stop is not None and now >= ask_at:
            inbox.stopped = stop()
            if inbox.stopped:
                return inbox
            ask_at = now + _ASK_EVERY_SECONDS
        ready = dict(sources.poll(max(min(deadline, ask_at) - now, 0.0) * 1000))
        if not ready:
            if time.monotonic() < deadline:
                continue
            inbox.timed_out = not has_ended
            inbox.stopped = _NOT_KNOWN if has_ended else ""
            return inbox
        if trial.messages in ready:
            chunk = os.read(trial.messages, 1 << 16)
            if not chunk:
                sources.unregister(trial.messages)
                has_ended = True  # and its supervisor is about to tell how
                deadline = min(deadline, time.monotonic() + KILL_SECONDS)
            elif _take(inbox, chunk, on_message):
                deadline = time.monotonic() + timeout_seconds
            if inbox.garbage:
                return inbox
        else:
            # It has ended. What it had sent was readable before its end was, so nothing is left
            # to read; a process that it started may still hold the pipe open.
            inbox.stopped = "" if ready[trial.status] & select.POLLIN else _NOT_KNOWN
            return inbox


def _take(inbox: _Inbox, chunk: bytes, on_message: Callable[[Message], None]) -> bool:
    """Handle the whole lines in what was received; tell whether there was any."""
    *lines, inbox.pending = (inbox.pending + chunk).split(b"\n")
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:  # also text that is not UTF-8
            message = None
        if not isinstance(message, dict):
            inbox.garbage = repr(line[:100])
            return False
        if message.get(OWN_KEY) == "started":
            inbox.preloaded = bool(message["preloaded"])
        elif message.get(OWN_KEY) == "error":
            inbox.error = (str(message["type"]), str(message["message"]))
        else:
            on_message(message)
    if len(inbox.pending) > _MESSAGE_LIMIT_BYTES:
        inbox.garbage = repr(inbox.pending[:100])
    return bool(lines)


def _end(trial: StartedProcess) -> int | None:
    """Kill what is left of a process and its descendants; return its exit code."""
    with contextlib.suppress(EOFError):
        exit_code = read_number(trial.status, 0)
        if exit_code is not None:
            return exit_code  # and its supervisor has ended its descendants
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(trial.pid, signal.SIGKILL)
    with contextlib.suppress(EOFError):
        exit_code = read_number(trial.status, KILL_SECONDS)
        if exit_code is not None:
            return exit_code
    # The supervisor does not tell; the process may be dead all the same.
    deadline = time.monotonic() + KILL_SECONDS
    while _is_running(trial.pid):
        if time.monotonic() > deadline:
            _not_ended.add(trial.pid)
            return None
        time.sleep(0.05)
    return -signal.SIGKILL


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _check_ended() -> None:
    """Refuse to measure beside a process that holds memory and cannot be ended."""
    _not_ended.intersection_update([pid for pid in _not_ended if _is_running(pid)])
    if _not_ended:
        raise WorkError(
            f"process {min(_not_ended)} of an earlier trial cannot be ended and holds its memory: "
            "trials beside it would tell nothing; end it, or start the machine again"
        )


def _read_end(log: int) -> str:
    start = max(os.fstat(log).st_size - _PRINTED_LIMIT_BYTES, 0)
    return os.pread(log, _PRINTED_LIMIT_BYTES, start).decode(errors="replace")
