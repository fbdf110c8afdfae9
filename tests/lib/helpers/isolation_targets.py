"""What tests of `bertbench.trials` run in isolated processes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bertbench.compiling import worker

Payload = dict[str, Any]
Send = Callable[[dict[str, Any]], None]


class ResourceExhaustedError(RuntimeError):
    """Named like TensorFlow's."""


def echo(payload: Payload, send: Send) -> None:
    print("noise on stdout", flush=True)
    send({"payload": payload, "pid": os.getpid(), "environment": dict(os.environ)})


def imports(payload: Payload, send: Send) -> None:
    """Tell what is imported, without the submodules."""
    send({"modules": sorted(name for name in sys.modules if sys.modules[name] and "." not in name)})


def crash(payload: Payload, send: Send) -> None:
    """Send one message, then end as `how` says."""
    send({"before": "the crash"})
    print("last words", flush=True)
    how = payload["how"]
    if how == "exit":
        os._exit(7)
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "hang":
        time.sleep(600)
    elif how == "raise":
        raise ResourceExhaustedError("x" * 100_000 + "\nOOM when allocating tensor with shape[1]")
    elif how == "garbage":
        os.write(_message_pipe(send), b"\x00\xffnot a message\n")
        time.sleep(600)
    elif how == "half":
        os.write(_message_pipe(send), b'{"half a mess')
        time.sleep(600)
    elif how == "flood":
        os.write(_message_pipe(send), b"x" * 20_000_000)
    else:
        os.kill(os.getpid(), getattr(signal, how))


def leave_file(payload: Payload, send: Send) -> None:
    """Leave a temporary file behind, and end or hang."""
    number, path = tempfile.mkstemp(prefix="bertbench-left-")
    os.close(number)
    send({"path": path})
    if payload["how"] == "hang":
        time.sleep(600)
    os._exit(0)


def start_grandchild(payload: Payload, send: Send) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    send({"pids": [os.getpid(), child.pid], "supervisor": os.getppid()})
    if "to_supervisor" in payload:
        os.kill(os.getppid(), getattr(signal, payload["to_supervisor"]))
    if payload["then"] == "hang":
        time.sleep(600)


def _message_pipe(send: Send) -> int:
    """Dig the file descriptor of the messages out of the closure of `send`."""
    cells = dict(zip(send.__code__.co_freevars, send.__closure__ or (), strict=True))
    return int(cells["messages"].cell_contents)


def allocate(payload: Payload, send: Send) -> None:
    """Fill a tensor for every size, under a budget that the environment sets."""
    import tensorflow as tf

    for size_mib in payload["sizes_mib"]:
        tf.ones([size_mib << 18])
        send({"size_mib": size_mib, **tf.config.experimental.get_memory_info("CPU:0")})


def train(payload: Payload, send: Send) -> None:
    """Pretend to train: batch b needs b units, and `script` says what happens at a batch."""
    script = payload["levers"]["optimizer"]
    kind, _, at = script.partition("@")
    for batch in payload["batches"]:
        if kind == "paused" and batch >= int(at):
            send({"event": "paused"})
            kind, at = "oom", str(batch + 1)
        if kind and batch >= int(at or 1 << 30):
            if kind in ("exit", "segfault", "SIGKILL", "hang", "garbage"):
                crash({"how": kind}, send)
            elif kind == "oom":
                text = "OOM when allocating tensor with shape[2]"
                error = {"type": "ResourceExhaustedError", "message": text}
                send({"event": "error", "batch": batch, **error})
            elif kind == "uncaught":
                raise ResourceExhaustedError("OOM when allocating tensor with shape[3]")
            elif kind == "liar":
                print("OOM when allocating tensor; CUDA_ERROR_OUT_OF_MEMORY", flush=True)
                raise ValueError("OOM when allocating tensor")
            elif kind == "wrong":
                result = {"batch": batch, "peak_bytes": "many", "step_seconds": 1}
                send({"event": "trial", **result})
            return
        result = {"batch": batch, "peak_bytes": batch * 1000 + os.getpid(), "step_seconds": 0.5}
        send({"event": "trial", **result})
        send({"event": "progress"})


def stop_in_a_step(payload: Payload, send: Send) -> None:
    """A trial that is stopped in its step, and runs out of memory when it goes on."""
    from bertbench.trials import worker

    def measure(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        raise ResourceExhaustedError("OOM when allocating tensor with shape[2]")

    worker.measure_steps = measure
    worker.build_trainer = worker.start_tensorflow = lambda *arguments: None
    worker.run_trial(payload, send)


def compile_with_a_dying_compiler(payload: Payload, send: Send) -> None:
    """Compile with a program that ends at once, by the signal that `signal` names."""
    os.environ["DYING_COMPILER"] = payload["signal"]
    worker._COMPILER = __name__
    worker.compile_for(payload, send)


if __name__ == "__main__":
    os.kill(os.getpid(), int(os.environ["DYING_COMPILER"]))
