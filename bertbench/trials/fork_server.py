"""The processes that start a trial and wait for its end; `bertbench.trials.isolation` asks them to.

    caller -- a request --> server -- fork --> supervisor -- fork --> trial

The server has TensorFlow imported, so that a fork of it starts in a fraction of a second. It never
runs an operation of TensorFlow: the first one would fix the allocator's settings, which the
environment variables of the trial are to decide.

Each trial has a supervisor of its own. It tells the caller how the trial ended, and kills the trial
when the caller is gone. So a server that is stopped or killed loses nothing about a trial.

Processes reach each other through file descriptors that they inherit. An address in the file system
would be limited in its length, and would stay behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from bertbench.core.without_keras import leave_out_keras
from finetune.storage.json_files import json_text

Message = dict[str, Any]

OWN_KEY = "isolation"
"""The key of this module's own messages, which `run_isolated` does not pass on."""

NUMBER = struct.Struct("q")
"""What a supervisor writes: first the trial's process number, or a negative error number if the
trial could not be started; at the end the trial's exit code."""

READY = b"r"

_ERROR_TEXT_LIMIT = 1 << 16


@dataclasses.dataclass(frozen=True)
class ProcessRequest:
    """What a process is to run, and where; it is passed on as JSON.

    Attributes:
        target: `module:function`.
        payload: JSON values for it.
        environment: all variables of the process. `TMPDIR` is a folder that goes with it.
        module_path: `sys.path` of the process.
    """

    target: str
    payload: Mapping[str, Any]
    environment: Mapping[str, str]
    module_path: list[str]


@dataclasses.dataclass(frozen=True)
class Descriptors:
    """File descriptors of a trial, in the order in which they are sent to the server.

    Attributes:
        request: a file with the `ProcessRequest`.
        messages: where messages go, one JSON value a line.
        log: a file for what is printed.
        caller: a pipe that ends when the caller is gone.
        status: where the supervisor writes each `NUMBER`.
    """

    request: int
    messages: int
    log: int
    caller: int
    status: int


_COUNT = len(dataclasses.fields(Descriptors))


def serve(control: int, preload: str) -> None:
    """Start a trial for every byte that comes with its `Descriptors`, until the caller is gone.

    Args:
        control: a socket.
        preload: module to import before trials are forked. If it is empty, each trial is a new
            Python process instead of a fork.
    """
    leave_out_keras()
    if preload:
        importlib.import_module(preload)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with socket.socket(fileno=control) as connection:
        connection.send(READY)
        while True:
            data, numbers, _, _ = socket.recv_fds(connection, 1, _COUNT)
            if not data:
                return
            descriptors = Descriptors(*numbers)
            try:
                supervisor = os.fork()
            except OSError as error:
                _tell(descriptors.status, -(error.errno or 1))
            else:
                if not supervisor:
                    connection.close()
                    _become(_supervise, descriptors, bool(preload))
            for number in numbers:
                os.close(number)


def _become(part: Callable[..., None], *arguments: Any) -> NoReturn:
    """Run a function in a forked process and end it, so that it does not go on as its parent."""
    try:
        part(*arguments)
    except Exception:  # noqa: BLE001 -- it must not go on as a second server
        traceback.print_exc()
    finally:
        os._exit(1)


def _supervise(descriptors: Descriptors, forks: bool) -> None:
    """Start a trial, wait for its end and tell the caller; kill it when the caller is gone."""
    read_wake, write_wake = os.pipe()
    os.set_blocking(write_wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(write_wake)
    try:
        trial = os.fork()
    except OSError as error:
        _tell(descriptors.status, -(error.errno or 1))
        return
    if not trial:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (read_wake, write_wake, descriptors.caller, descriptors.status):
            os.close(number)
        if forks:
            _become(run_trial, descriptors.request, descriptors.messages, descriptors.log)
        _become(_run_in_fresh_process, descriptors)
    os.close(descriptors.messages)  # or its end would never be seen
    _tell(descriptors.status, trial)
    sources = [read_wake, descriptors.caller]
    ended = 0
    while not ended:
        ready, _, _ = select.select(sources, [], [])
        if descriptors.caller in ready:
            sources.remove(descriptors.caller)
            os.kill(trial, signal.SIGKILL)
        if read_wake in ready:
            os.read(read_wake, 64)
        ended, state = os.waitpid(trial, os.WNOHANG)
    # The group outlives its leader when the trial has started others.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(trial, signal.SIGKILL)
    if descriptors.caller not in sources:
        shutil.rmtree(_read(descriptors.request).environment["TMPDIR"], ignore_errors=True)
    _tell(descriptors.status, os.waitstatus_to_exitcode(state))
    os._exit(0)


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the caller is gone
        os.write(status, NUMBER.pack(number))


def _read(request: int) -> ProcessRequest:
    size = os.fstat(request).st_size
    return ProcessRequest(**json.loads(os.pread(request, size, 0)))


def _run_in_fresh_process(descriptors: Descriptors) -> None:
    numbers = (descriptors.request, descriptors.messages, descriptors.log)
    for number in numbers:
        os.set_inheritable(number, True)
    code = f"from bertbench.trials.fork_server import run_trial; run_trial{numbers}"
    path = f"import sys; sys.path[:] = {sys.path}"
    os.execv(sys.executable, [sys.executable, "-c", f"{path}; {code}"])


def run_trial(request_file: int, messages: int, log: int) -> NoReturn:
    """Run the target of a request in this process, the trial's, after setting the process up."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    request = _read(request_file)
    os.close(request_file)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[:] = request.module_path
    tempfile.tempdir = None  # what the server has found before
    leave_out_keras()  # unless this is a fork, in which the server has done it
    _yield_to_others()
    faulthandler.enable(file=2, all_threads=False)

    def send(message: Mapping[str, Any]) -> None:
        line = json_text(message).encode() + b"\n"
        while line:
            line = line[os.write(messages, line) :]

    send({OWN_KEY: "started", "preloaded": "tensorflow" in sys.modules})
    module, _, function = request.target.partition(":")
    code = 1
    try:
        getattr(importlib.import_module(module), function)(request.payload, send)
        code = 0
    except Exception as error:  # noqa: BLE001 -- whatever it is, the caller decides
        traceback.print_exc()
        # The log keeps only the last lines; the caller must see the type to tell what it means.
        send({OWN_KEY: "error", "type": type(error).__name__, "message": _shorten(str(error))})
    finally:
        with contextlib.suppress(OSError):  # a full disk
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _shorten(text: str) -> str:
    half = _ERROR_TEXT_LIMIT // 2
    return f"{text[:half]}\n{text[-half:]}" if len(text) > _ERROR_TEXT_LIMIT else text


def _yield_to_others() -> None:
    """Leave no core file, and let the kernel kill this process first when host memory runs out."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
