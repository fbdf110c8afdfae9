"""The command line in forks of a process that has imported TensorFlow.

The import takes longer than most of what tests run. `bertbench.trials.fork_server` starts trials in
the same way. A command is otherwise as in a process of its own: it has its own arguments,
environment and streams, may be killed, and ends with an exit code. As a program, this is the
process that forks: each line that it reads is a request, and it writes the exit code.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
from pathlib import Path

AVAILABLE = sys.platform == "linux"
"""Elsewhere a fork is unsafe once system frameworks are loaded."""


def run_forked(
    arguments: list[str], folder: Path, timeout_seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run `bertbench` with these arguments in a folder, with this process's environment.

    Raises:
        subprocess.TimeoutExpired: it took too long, and was killed.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as outputs:
        files = [Path(outputs, name) for name in ("stdout", "stderr")]
        request = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": str(folder),
            "files": [str(file) for file in files],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout_seconds)[0]:
            _server.cache_clear()
            server.kill()
            raise subprocess.TimeoutExpired(arguments, timeout_seconds)
        exit_code = int(server.stdout.readline())
        output, errors = (file.read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(arguments, exit_code, output, errors)


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "1"},
    )
    atexit.register(server.kill)
    return server


def _serve() -> None:
    """Fork for each request, until there are no more; in a fork, return after the command."""
    import tensorflow  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(**json.loads(line))
            return
        _, state = os.waitpid(child, 0)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(state))


def _run(arguments: list[str], environment: dict[str, str], folder: str, files: list[str]) -> None:
    import ctypes
    import signal

    # It ends with its parent, which is killed when the command takes too long.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["bertbench", *arguments]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module("bertbench", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
