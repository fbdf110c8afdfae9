"""What happens inside a trial's process: the optimizer step that a run would do, measured."""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from bertbench.core.workload import Setup, Workload
from bertbench.hardware import tpu
from bertbench.hardware.process_memory import process_peak_bytes
from bertbench.memory.allocator.recording import recording_to_text
from bertbench.memory.allocator.tensorflow_setup import start_tensorflow
from bertbench.trials.request import TrialRequest, request_from_payload
from finetune.model.modeling import create_variables
from finetune.spec.config import INPUT_NAMES, TARGET_NAMES
from finetune.train.optimization import OptimizerSettings
from finetune.train.step import Trainer, make_trainer

_NO_STATISTICS = (ValueError, tf.errors.OpError)


def run_trial(payload: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
    """Run real training steps for each batch of a request, in this process.

    Forward pass, backward pass, clipping and update, with dropout, on sequences of full length:
    attention and padding cost the same memory, so no data set needs more. The peak is the
    allocator's over all steps of a batch, the first among them. A batch is that of one replica:
    each of a TPU's cores has as many examples.

    Args:
        payload: of a `bertbench.trials.request.TrialRequest`.
        send: takes the messages of `bertbench.trials.measure.measure_batches`.

    Raises:
        tensorflow.errors.ResourceExhaustedError: a batch does not fit.
    """
    request = request_from_payload(payload)
    paused = _notice_pauses()

    def tell(message: Mapping[str, Any]) -> None:
        if paused.is_set():
            send({"event": "paused"})
        send(message)

    try:
        _run_batches(request, tell)
    except Exception:
        if paused.is_set():
            send({"event": "paused"})
        raise


def _notice_pauses() -> threading.Event:
    """Return what is set once this process has been stopped and goes on, as by Ctrl-Z and `fg`."""
    paused = threading.Event()
    signal.signal(signal.SIGCONT, lambda number, frame: paused.set())
    # TensorFlow's own calls of the system go on as without the handler.
    signal.siginterrupt(signal.SIGCONT, False)
    return paused


def _run_batches(request: TrialRequest, send: Callable[[Mapping[str, Any]], None]) -> None:
    tpu_settings = request.budget.device.tpu
    if tpu_settings is not None:
        strategy, device = tpu.connect(tpu_settings), "TPU:0"
        trainer = build_trainer(request.setup, strategy)
    else:
        device = start_tensorflow(request.budget)
        if request.record:
            trainer = _recorded(request, device, send)
        else:
            trainer = build_trainer(request.setup)
    for batch in request.batches:
        send(measure_steps(request, trainer, device, batch))


def measure_steps(
    request: TrialRequest, trainer: Trainer, device: str, batch: int
) -> dict[str, Any]:
    """Run a batch's steps, and tell their time and their peak.

    Args:
        request: what is asked; with a recording, the peak is that of the recorded steps too.
        trainer: of its setup.
        device: TensorFlow's name of it.
        batch: micro-batch of one replica.

    Returns:
        The message of `bertbench.trials.measure.measure_batches` for a batch that fits.

    Raises:
        tensorflow.errors.ResourceExhaustedError: it does not fit.
    """
    replicas = request.budget.device.replicas
    steps = request.setup.levers.accumulation_steps
    rows = random_batch(request.setup.workload, batch * steps * replicas)
    if not request.record:
        _forget_peak(device)
    step_seconds = []
    for _ in range(request.steps):
        began = time.monotonic()
        float(trainer.step(rows).loss)
        step_seconds.append(time.monotonic() - began)
    return {
        "event": "trial",
        "batch": batch,
        "peak_bytes": _peak_bytes(device),
        "process_peak_bytes": process_peak_bytes(request.budget.device),
        # The first step pays for tracing or for the allocator's growth.
        "step_seconds": statistics.median(step_seconds[1:] or step_seconds),
    }


def _forget_peak(device: str) -> None:
    with contextlib.suppress(*_NO_STATISTICS):
        tf.config.experimental.reset_memory_stats(device)


def _peak_bytes(device: str) -> int | None:
    try:
        return int(tf.config.experimental.get_memory_info(device)["peak"])
    except _NO_STATISTICS:
        # The devices of another host, as a Cloud TPU's are, keep no statistics here.
        if device.startswith("TPU"):
            return None
        raise


def _recorded(
    request: TrialRequest, device: str, send: Callable[[Mapping[str, Any]], None]
) -> Trainer:
    """Make a trainer and do two steps, the first of which is not like the others, recorded."""
    from bertbench.memory.allocator.profiler import recorded_allocations

    (batch,) = request.batches
    with recorded_allocations(device) as recordings:
        trainer = build_trainer(request.setup)
        # The peak is that of steps, as without a recording.
        _forget_peak(device)
        rows = random_batch(request.setup.workload, batch * request.setup.levers.accumulation_steps)
        for _ in range(2):
            float(trainer.step(rows).loss)
    for recording in recordings:
        text = recording_to_text(recording)
        send({"event": "recording", "batch": batch, "recording": text})
    return trainer


def build_trainer(setup: Setup, strategy: tf.distribute.Strategy | None = None) -> Trainer:
    """Make a randomly initialised model and its step, on the replicas of a strategy if given."""
    workload, levers = setup.workload, setup.levers
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        variables = create_variables(
            workload.config, workload.head, num_labels=workload.num_labels, seed=0
        )
    optimizer = OptimizerSettings(1e-5, num_train_steps=1_000_000, optimizer=levers.optimizer)
    return make_trainer(variables, workload.spec, optimizer, levers.step_settings(), strategy)


def random_batch(workload: Workload, rows: int) -> dict[str, np.ndarray]:
    """Draw an effective batch of full-length sequences.

    Args:
        workload: gives shapes and ranges.
        rows: examples.

    Returns:
        Arrays as `finetune.train.step.make_trainer` takes them.
    """
    generator = np.random.default_rng(0)
    shape = (rows, workload.seq_len)
    batch = {name: np.ones(shape, np.int32) for name in INPUT_NAMES}
    batch["input_ids"] = generator.integers(0, workload.config.vocab_size, shape, np.int32)
    classes = workload.seq_len if workload.head == "squad" else workload.num_labels
    for name in TARGET_NAMES[workload.head]:
        targets = generator.integers(0, classes, rows, np.int32)
        batch[name] = targets.astype(np.float32) if name == "label_values" else targets
    batch["segment_ids"] %= workload.config.type_vocab_size
    return {**batch, "weights": np.ones(rows, np.float32)}
