"""`bertbench.run()`: a fine-tuning in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertbench.api.results import Result
from bertbench.core.errors import StoppedEarlyError, WorkError
from finetune.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class RunResult(Result):
    """A fine-tuning that has ended.

    Attributes:
        output_dir: folder with checkpoints, predictions and the record of the run.
        scores: metrics by name; empty if nothing was evaluated.
        summary: task, batch, micro-batch, number of steps, seconds.
        steps: one row for each optimizer step: `step`, `loss`, `learning_rate`, `gradient_norm`,
            `seconds`.
    """

    output_dir: Path
    scores: Mapping[str, float]
    summary: Mapping[str, Any]
    steps: pd.DataFrame

    def describe(self) -> str:
        """Describe the result in one line."""
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
        steps = f"{self.summary['task']}, {self.summary['steps']} steps"
        return f"{steps}: {scores}" if scores else steps

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each optimizer step."""
        rows: list[dict[str, Any]] = self.steps.to_dict("records")
        return rows


def run(task: str, *, output_dir: str | os.PathLike[str], **flags: object) -> RunResult:
    """Fine-tune, predict and evaluate, as `bertbench run` does.

    The run has a process of its own, so that its memory is free again afterwards, and so that this
    process may have used TensorFlow already. What it says appears on standard error. An
    interruption is handed on to it: it saves what is done, and the same call goes on from there.

    Example:
        >>> import bertbench
        >>> done = bertbench.run(
        ...     "squad",
        ...     output_dir="/tmp/squad",
        ...     model="bert-base-folder",
        ...     train_file="train-v1.1.json",
        ...     memory="12GiB",
        ... )  # doctest: +SKIP
        >>> done.to_frame().plot("step", "loss")  # doctest: +SKIP

    Args:
        task: `squad` or `classifier`.
        output_dir: folder for results and checkpoints.
        **flags: the flags of `bertbench run TASK --help`, such as `train_batch_size=32`. True sets
            a flag, None leaves it out.

    Returns:
        What the run has recorded.

    Raises:
        finetune.errors.InputError: a flag or a file is wrong.
        bertbench.core.errors.StoppedEarlyError: it was interrupted; what was done is saved.
        bertbench.core.errors.WorkError: the run failed.
    """
    if task not in ("squad", "classifier"):
        raise InputError(f"unknown task {task!r}", hint="use squad or classifier")
    command = [sys.executable, "-m", "bertbench", "run", task]
    command += _arguments({"output_dir": os.fspath(output_dir), **flags})
    code, last = _follow(command)
    message = last.removeprefix("bertbench: ")
    if code == _INTERRUPTED:
        raise StoppedEarlyError(message)
    if code == 2:
        raise InputError(message)
    if code:
        raise WorkError(message)
    return _read(Path(output_dir))


def _arguments(flags: Mapping[str, object]) -> list[str]:
    arguments = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None:
            arguments.append(f"--{name}={'false' if value is False else value}")
    return arguments


def _follow(command: list[str]) -> tuple[int, str]:
    """Run a command and show what it says; return its exit code and the last line."""
    last = ""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stderr is not None
    with process:
        while True:
            try:
                for line in process.stderr:
                    last = line.strip() or last
                    sys.stderr.write(line)
                break
            except KeyboardInterrupt:
                # A notebook interrupts this process alone.
                process.send_signal(signal.SIGINT)
    return process.returncode, last


def _read(output_dir: Path) -> RunResult:
    from reports.runs import read_run

    found = read_run(output_dir)
    return RunResult(output_dir, found.scores, found.summary(), found.steps)
