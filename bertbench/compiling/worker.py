"""What happens in the processes of a compilation: one lowers a step, another compiles it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bertbench.core.workload import Setup, levers_from_json, workload_from_json
from finetune.storage.json_files import json_text, parse_json

_COMPILER = "bertbench.compiling.compiler"


def lower(payload: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
    """Lower a step and write it to a file.

    Args:
        payload: `workload`, `levers`, `rows` of the effective batch, `replicas`, and `module`, the
            path of the file.
        send: takes `{"event": "lowered"}`.
    """
    Path(payload["module"]).write_bytes(_lower(payload, optimized=False))
    send({"event": "lowered"})


def compile_here(payload: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
    """Compile a step for this machine's CPU, with TensorFlow's own XLA.

    Args:
        payload: of `lower`, but for `module`.
        send: takes `{"event": "compiled", "memory"}`.
    """
    from tensorflow.compiler.xla.service import hlo_pb2

    compiled = hlo_pb2.HloProto.FromString(_lower(payload, optimized=True))
    sizes = {"argument_bytes": 0, "output_bytes": 0, "temporary_bytes": 0, "program_bytes": 0}
    for allocation in compiled.buffer_assignment.buffer_allocations:
        if allocation.is_thread_local or allocation.is_constant:
            continue  # on a thread's stack, or in the program, which is not in the budget
        part = "temporary_bytes"
        if allocation.is_entry_computation_parameter:
            part = "argument_bytes"
        elif allocation.maybe_live_out:
            part = "output_bytes"
        sizes[part] += allocation.size
    send({"event": "compiled", "memory": sizes})


def _lower(payload: Mapping[str, Any], *, optimized: bool) -> bytes:
    from finetune.train.lowering import lower_step
    from finetune.train.optimization import OptimizerSettings

    setup = Setup(workload_from_json(payload["workload"]), levers_from_json(payload["levers"]))
    workload, levers = setup.workload, setup.levers
    return lower_step(
        workload.spec,
        OptimizerSettings(1e-5, num_train_steps=1_000_000, optimizer=levers.optimizer),
        payload["rows"],
        levers.step_settings(),
        num_labels=workload.num_labels,
        replicas=payload["replicas"],
        optimized=optimized,
    )


def compile_for(payload: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
    """Compile a module for a target, in a program of its own.

    Args:
        payload: the request of `bertbench.compiling.compiler`, and `answer`, a path.
        send: takes `{"event": "compiled", "memory"}` or `{"event": "error", "message"}`.

    Raises:
        RuntimeError: the compiler ended without an answer.
    """
    answer_file = Path(payload["answer"])
    request_file = answer_file.with_name("request.json")
    request_file.write_text(json_text(dict(payload)), encoding="utf-8")
    command = [sys.executable, "-m", _COMPILER, str(request_file), str(answer_file)]
    paths = map(os.path.abspath, filter(None, sys.path))
    code = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        # A compiler that crashes may write files where it is.
        cwd=answer_file.parent,
        stdin=subprocess.DEVNULL,
        check=False,
    ).returncode
    if code < 0:
        # Ends in the same way, so that who started this process learns of it: the kernel, for
        # instance, kills what takes the most of a full memory.
        os.kill(os.getpid(), -code)
    if code:
        raise RuntimeError(f"the compiler ended with code {code}")
    answer = parse_json(answer_file.read_text(encoding="utf-8"))
    if "error" in answer:
        send({"event": "error", "message": answer["error"]})
    else:
        send({"event": "compiled", "memory": answer["memory"]})
