"""Run a function in a fresh process that cannot harm this one, and learn how it ended.

The process is forked from a server that has TensorFlow imported but has never run an op
(`multiprocessing`'s fork server with `bertbench.preload`), so it starts in a fraction of a second,
and its environment variables still decide how TensorFlow allocates. What it sends is kept even
when it crashes later, and nothing of it stays: no process, no file.

Linux forks; elsewhere, where a fork after loading system frameworks is unsafe, each process
imports TensorFlow anew. Windows is not supported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from bertbench.hostmemory import oom_kill_counts
from finetune.json_files import json_text

Message = dict[str, Any]

PRELOAD = ("bertbench.preload",)

# A message is a line of JSON; the largest carries what a large model asked of its allocator.
_MESSAGE_LIMIT_BYTES = 1 << 24
_ERROR_TEXT_LIMIT = 1 << 16
# TensorFlow's allocator lists every chunk that it holds when it fails: a megabyte at times.
_PRINTED_LIMIT_BYTES = 1 << 23
_TAIL_LINES = 5
_KILL_SECONDS = 10.0
_ASK_EVERY_SECONDS = 0.2

# Messages of this module's own, which callers do not see, have this key.
_OWN = "isolation"

# Held for all that multiprocessing does with its list of processes, and with the environment.
_start_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Ending:
    """How an isolated process ended.

    Attributes:
        exit_code: its exit code; the negative number of the signal that ended it; None if it
            could not be ended.
        timed_out: it was silent for too long, and was killed for that.
        stopped: why it was killed by request, see `run_isolated`; else empty.
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
            # The stack, innermost call first, is followed by a list of all extension modules.
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
) -> Ending:
    """Run `target(payload, send)` in a fresh process and wait for its end.

    The process has its own session, so a Ctrl-C on the terminal does not reach it; it is killed,
    with whatever it has started, when this function is left for any reason, and dies on its own
    when this process dies. It is the kernel's first choice when host memory runs out.

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
    oom_kills_before = oom_kill_counts()
    with (
        tempfile.TemporaryFile() as log,
        # TensorFlow writes the code that it generates to temporary files, and a process that is
        # killed does not take them away.
        tempfile.TemporaryDirectory(prefix="bertbench-", ignore_cleanup_errors=True) as folder,
    ):
        variables = {**environment, "TMPDIR": folder}
        process, reader = _start(target, payload, variables, log.fileno())
        try:
            with reader:
                inbox = _receive(process, reader, timeout_seconds, on_message, stop)
        finally:
            exit_code = _end(process)
        return Ending(
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
    process: ForkServerProcess | SpawnProcess,
    reader: Connection,
    timeout_seconds: float,
    on_message: Callable[[Message], None],
    stop: Callable[[], str] | None,
) -> _Inbox:
    """Pass messages on until the process has ended, hangs or sends garbage."""
    # The pipe is read raw and in lines: a half-written message of a dying or hanging process then
    # never blocks this one, as `Connection.recv` would.
    inbox = _Inbox()
    deadline = time.monotonic() + timeout_seconds
    # What is there already is read before the first question: a result stands.
    ask_at = time.monotonic() + _ASK_EVERY_SECONDS if stop else math.inf
    sources: list[Any] = [reader, process.sentinel]
    while True:
        now = time.monotonic()
        if stop is not None and now >= ask_at:
            inbox.stopped = stop()
            if inbox.stopped:
                return inbox
            ask_at = now + _ASK_EVERY_SECONDS
        ready = wait(sources, max(min(deadline, ask_at) - now, 0.0))
        if not ready:
            if time.monotonic() < deadline:
                continue
            inbox.timed_out = True
            return inbox
        if reader in ready:
            chunk = os.read(reader.fileno(), 1 << 16)
            if not chunk:
                sources.remove(reader)
            elif _take(inbox, chunk, on_message):
                deadline = time.monotonic() + timeout_seconds
            if inbox.garbage:
                return inbox
        else:
            # It has ended. What it sent before was readable before its end was, so nothing is
            # left; a process that it started may still hold the pipe open.
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
        if message.get(_OWN) == "started":
            inbox.preloaded = bool(message["preloaded"])
        elif message.get(_OWN) == "error":
            inbox.error = (str(message["type"]), str(message["message"]))
        else:
            on_message(message)
    if len(inbox.pending) > _MESSAGE_LIMIT_BYTES:
        inbox.garbage = repr(inbox.pending[:100])
    return bool(lines)


def _start(
    target: str, payload: Mapping[str, Any], environment: dict[str, str], log: int
) -> tuple[ForkServerProcess | SpawnProcess, Connection]:
    context: ForkServerContext | SpawnContext
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        # Takes effect at the server's first start, and is harmless after it.
        context.set_forkserver_preload(list(PRELOAD))
    else:
        context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    # A Connection is how multiprocessing hands over a file descriptor.
    log_writer = Connection(os.dup(log), readable=False)
    with writer, log_writer, _start_lock:
        # The server's own changes of the environment, in another thread, are not for the process.
        arguments = (target, dict(payload), {**os.environ, **environment}, writer, log_writer)
        process = context.Process(target=_child_main, args=arguments, name="bertbench-trial")
        try:
            with _server_environment(), _without_main():
                process.start()
        except (EOFError, OSError) as error:
            reader.close()
            raise RuntimeError(f"cannot start a process for trials ({error!r})") from error
    return process, reader


@contextlib.contextmanager
def _server_environment() -> Iterator[None]:
    """Let the server find `bertbench.preload`, and have its children log their warnings.

    The server does not take this process's `sys.path` over in older Pythons, and a module that it
    cannot import is skipped in silence. TensorFlow's log level is fixed when it is imported.
    """
    root = str(Path(__file__).resolve().parents[1])
    path = os.environ.get("PYTHONPATH")
    chosen = {
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from running the main script again in every child.

    It does so for functions that live there. Ours never do, and a script without an
    `if __name__ == "__main__"` would start its probe again in every trial.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end(process: ForkServerProcess | SpawnProcess) -> int | None:
    """Kill what is left of a process and its descendants; return its exit code."""
    pid = process.pid
    assert pid is not None
    if not wait([process.sentinel], 0):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait([process.sentinel], _KILL_SECONDS)
    # The group outlives its leader when the process has started others.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    # Starting a process polls all others, and an exit code can be read only once.
    with _start_lock:
        exit_code = process.exitcode
        if exit_code is not None:
            process.close()
    return exit_code


def _read_end(log: int) -> str:
    start = max(os.fstat(log).st_size - _PRINTED_LIMIT_BYTES, 0)
    return os.pread(log, _PRINTED_LIMIT_BYTES, start).decode(errors="replace")


def _child_main(
    target: str,
    payload: Message,
    environment: Mapping[str, str],
    messages: Connection,
    log: Connection,
) -> None:
    """Begin an isolated process: everything that must precede the target's first line."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    log.close()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # what the server has found before
    _die_with_parent(environment["TMPDIR"])
    _yield_to_others()
    faulthandler.enable(file=2, all_threads=False)

    def send(message: Mapping[str, Any]) -> None:
        line = json_text(message).encode() + b"\n"
        while line:
            line = line[os.write(messages.fileno(), line) :]

    send({_OWN: "started", "preloaded": "tensorflow" in sys.modules})
    module, _, function = target.partition(":")
    try:
        getattr(importlib.import_module(module), function)(payload, send)
    except Exception as error:
        # The log keeps only the last lines; the parent must see the type to tell what it means.
        text = str(error)
        half = _ERROR_TEXT_LIMIT // 2
        if len(text) > _ERROR_TEXT_LIMIT:
            text = f"{text[:half]}\n{text[-half:]}"
        send({_OWN: "error", "type": type(error).__name__, "message": text})
        raise


def _die_with_parent(folder: str) -> None:
    # The kernel's own PR_SET_PDEATHSIG watches the fork server, which is not the parent meant here.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _yield_to_others() -> None:
    """Leave no core file, and be the process that the kernel kills when host memory runs out."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
