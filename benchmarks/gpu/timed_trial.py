"""Trials that share a GPU, and take turns at the steps that are timed.

Most of a trial's time is the host's: starting, building the graph, loading kernels. Several do that
at once, with a step of one example each; who is timed holds a lock. A trial of a single micro-batch
does all of its steps in its turn, the first, which builds the graph, among them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bertbench.hardware.lock import locked

TARGET = "timed_trial:run_in_turn"
"""Target of `bertbench.trials.measure.measure_batches`."""

TURN_VARIABLE = "BERTBENCH_TURN"
"""Environment variable with the path of the lock."""


def run_in_turn(payload: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
    """Do what `bertbench.trials.worker.run_trial` does, with the steps that count in turn.

    A single micro-batch is as exact as an ordinary trial's: no step has touched the memory before.

    Args:
        payload: of a `bertbench.trials.request.TrialRequest` for one device.
        send: takes the messages of `measure_batches`.
    """
    from bertbench.memory.allocator.tensorflow_setup import start_tensorflow
    from bertbench.trials.request import request_from_payload
    from bertbench.trials.worker import build_trainer, measure_steps, random_batch

    request = request_from_payload(payload)
    device = start_tensorflow(request.budget)
    trainer = build_trainer(request.setup)
    if len(request.batches) > 1:
        # The step is traced, and kernels are loaded, for any micro-batch.
        trainer.step(random_batch(request.setup.workload, request.setup.levers.accumulation_steps))
    with locked(Path(os.environ[TURN_VARIABLE]), lambda: None):
        for batch in request.batches:
            send(measure_steps(request, trainer, device, batch))
