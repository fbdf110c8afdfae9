"""Starts trials through a `bertbench.trials.fork_server`, which is itself started when needed."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

import psutil

from bertbench.core.errors import WorkError
from bertbench.core.terminal import say
from bertbench.trials.fork_server import NUMBER, READY, Descriptors, ProcessRequest
from finetune.storage.json_files import json_text

START_SECONDS = 600.0
"""Longest time in which a server imports TensorFlow, be it from a slow disk."""

REPLY_SECONDS = 60.0
"""Longest time in which a server that is up starts a trial, and in which one that starts may be
stopped, as by SIGSTOP: that one makes no progress, however slow the disk is."""

_ASK_EVERY_SECONDS = 1.0

_END_SECONDS = 5.0

PRELOAD = "tensorflow" if sys.platform == "linux" else ""
"""What a server imports before it forks. On macOS a fork is unsafe once system frameworks are
loaded, so each trial imports TensorFlow itself."""

# TensorFlow's log level is fixed when it is imported; trials log their warnings.
_VARIABLES = {"TF_CPP_MIN_LOG_LEVEL": "1"}

_lock = threading.Lock()
_server: _Server | None = None


class _SilentError(Exception):
    """A server runs and does not answer."""


@dataclasses.dataclass(frozen=True)
class _Server:
    """A server; `owner` is the process that started it, which a fork of that process is not."""

    owner: int
    process: subprocess.Popen[bytes]
    control: socket.socket
    log: IO[bytes]


@dataclasses.dataclass(frozen=True)
class StartedProcess:
    """A trial's process that has been started.

    Attributes:
        pid: its number.
        messages: file descriptor to read its messages from.
        status: file descriptor to read its exit code from, see `read_number`.
        life: file descriptor that keeps the process alive; it is killed when this is closed.
    """

    pid: int
    messages: int
    status: int
    life: int

    def close(self) -> None:
        """Close all descriptors."""
        for number in (self.messages, self.status, self.life):
            os.close(number)


def start(request: ProcessRequest, log: int) -> StartedProcess:
    """Start a trial, by a new server if the present one is dead or does not answer.

    Args:
        request: what to run.
        log: file descriptor for what the trial prints.

    Raises:
        WorkError: a second server fails too, or the system allows no more processes.
        OSError: this process cannot have more files, or the system more processes.
    """
    global _server
    with tempfile.TemporaryFile() as file, _lock:
        file.write(json_text(dataclasses.asdict(request)).encode())
        file.flush()
        for last in (False, True):
            is_new = _server is None or _server.owner != os.getpid()
            server = _server = _launch() if is_new else _server
            assert server is not None
            try:
                if is_new:
                    _wait_until_ready(server)
                return _ask(server, file.fileno(), log)
            except (_SilentError, EOFError, ConnectionError) as error:
                why = _explain(server, error)
                _stop()
                if last:
                    raise WorkError(f"the process that starts trials {why}, twice") from error
                say(f"the process that starts trials {why}: starting another one")
            except BaseException:
                _stop()  # it may be half-way
                raise
    raise AssertionError("not reached")


def read_number(descriptor: int, seconds: float) -> int | None:
    """Read a number that a supervisor wrote; None if nothing comes in time.

    Raises:
        EOFError: the supervisor is gone.
    """
    poll = select.poll()  # takes numbers above 1023 too, unlike `select.select`
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(seconds * 1000):
        return None
    data = os.read(descriptor, NUMBER.size)
    if len(data) < NUMBER.size:
        raise EOFError
    return int(NUMBER.unpack(data)[0])


def _launch() -> _Server:
    control, far = socket.socketpair()
    log = tempfile.TemporaryFile()  # noqa: SIM115 -- it stays open as long as the server
    with far:
        code = f"from bertbench.trials.fork_server import serve; serve{(far.fileno(), PRELOAD)}"
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; {code}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **_VARIABLES},
            pass_fds=[far.fileno()],
            start_new_session=True,  # a Ctrl-C on the terminal is not for it
        )
    return _Server(os.getpid(), process, control, log)


def _wait_until_ready(server: _Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    # Counted by looking, not by the clock: whoever stops the server may have stopped this process.
    stopped_seconds = 0.0
    server.control.settimeout(min(_ASK_EVERY_SECONDS, START_SECONDS))
    while True:
        try:
            answer = server.control.recv(1)
            break
        except TimeoutError as error:
            if time.monotonic() >= deadline:
                raise _SilentError(f"was not ready within {START_SECONDS:g} s") from error
            stopped_seconds = stopped_seconds + _ASK_EVERY_SECONDS if _is_stopped(server) else 0.0
            if stopped_seconds >= REPLY_SECONDS:
                raise _SilentError(f"was stopped for {REPLY_SECONDS:g} s") from error
    if answer != READY:
        raise EOFError


def _is_stopped(server: _Server) -> bool:
    try:
        status = psutil.Process(server.process.pid).status()
    except psutil.NoSuchProcess:  # its connection ends too
        return False
    return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def _ask(server: _Server, request: int, log: int) -> StartedProcess:
    with contextlib.ExitStack() as own, contextlib.ExitStack() as sent:
        # New pipes for every attempt: a trial that an attempt left behind ends with its pipes.
        messages, far_messages = _pipe(own, sent)
        far_caller, life = _pipe(sent, own)
        status, far_status = _pipe(own, sent)
        descriptors = Descriptors(request, far_messages, log, far_caller, far_status)
        no_answer = _SilentError(f"did not answer within {REPLY_SECONDS:g} s")
        server.control.settimeout(REPLY_SECONDS)
        try:
            socket.send_fds(server.control, [b"t"], dataclasses.astuple(descriptors))
        except TimeoutError as error:
            raise no_answer from error
        sent.close()
        pid = read_number(status, REPLY_SECONDS)
        if pid is None:
            raise no_answer
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        own.pop_all()
        return StartedProcess(pid, messages, status, life)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe whose ends are closed with these stacks."""
    ends = os.pipe()
    reader.callback(os.close, ends[0])
    writer.callback(os.close, ends[1])
    return ends


def _explain(server: _Server, error: Exception) -> str:
    """Say what a server did instead of answering."""
    if isinstance(error, _SilentError):
        return str(error)
    try:
        code = server.process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    server.log.seek(0)
    lines = server.log.read().decode(errors="replace").split("\n")
    printed = [line.strip() for line in lines if line.strip()]
    return f"ended with exit code {code}" + (f" ({printed[-1]})" if printed else "")


def _stop() -> None:
    """End the server of this process, also one that is stopped; its trials are others' children."""
    global _server
    server, _server = _server, None
    if server is None or server.owner != os.getpid():
        return
    server.control.close()
    server.log.close()
    server.process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(_END_SECONDS)


atexit.register(_stop)
