"""Functions of `helpers.isolation_targets`, run in isolated processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bertbench.trials.isolation import ProcessEnd, run_isolated
from helpers.paths import LIBRARY, REPOSITORY


def run(
    function: str,
    payload: dict[str, Any] | None = None,
    *,
    timeout_seconds: float = 60,
    environment: dict[str, str] | None = None,
    on_message: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], str] | None = None,
) -> tuple[list[dict[str, Any]], ProcessEnd]:
    messages: list[dict[str, Any]] = []  # of `on_message`, unless another is given
    end = run_isolated(
        f"helpers.isolation_targets:{function}",
        payload or {},
        environment=environment or {},
        timeout_seconds=timeout_seconds,
        on_message=on_message or messages.append,
        stop=stop,
    )
    return messages, end


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and not zombie(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.05)


def zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


# A script without a main guard, as a user might write it, that is killed while it measures.
SCRIPT = """
import sys
sys.path[:0] = {paths!r}
print("script starts", flush=True)
from bertbench.trials import fork_client
from bertbench.core.errors import WorkError
from bertbench.trials.isolation import run_isolated
fork_client.PRELOAD = "json"  # imported at once
run_isolated("helpers.isolation_targets:start_grandchild", {{"then": {then!r}}}, environment={{}},
             timeout_seconds=60, on_message=lambda m: print(*m["pids"], flush=True))
print("script ends", flush=True)
"""


def start_script(tmp_path: Path, then: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(REPOSITORY), str(LIBRARY)], then=then))
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, cwd=tmp_path, text=True
    )
