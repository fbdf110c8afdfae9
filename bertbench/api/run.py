"""`bertbench.run()`: a fine-tuning in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertbench.api.results import Result
from bertbench.core.errors import StoppedEarlyError, WorkError
from bertbench.running.output.cloud_storage import is_url
from finetune.errors import InputError
from finetune.model_files.model_folder import RUN_FILE
from finetune.storage.json_files import load_object

if TYPE_CHECKING:
    import pandas as pd

_INTERRUPTED = 130

_PLAIN_FLAGS = (
    "adam_bias_correction",
    "demo",
    "keep_best",
    "overwrite_output_dir",
    "regression",
    "xla",
)
"""Flags that take no value: False leaves them out."""


@dataclasses.dataclass(frozen=True)
class RunResult(Result):
    """A fine-tuning that has ended.

    Attributes:
        output_dir: folder with checkpoints, predictions and the record of the run.
        scores: metrics by name; empty if nothing was evaluated.
        summary: task, batch, micro-batch, number of steps, seconds.
        steps: one row for each optimizer step: `step`, `loss`, `learning_rate`, `gradient_norm`,
            `seconds`; none if it has not trained.
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
        finetune.errors.InputError: a flag or a file is wrong, or the folder is in cloud storage.
        bertbench.core.errors.StoppedEarlyError: it was interrupted; the message says what is saved.
        bertbench.core.errors.WorkError: the run failed.
    """
    if task not in ("squad", "classifier"):
        raise InputError(f"unknown task {task!r}", hint="use squad or classifier")
    folder = os.fspath(output_dir)
    if is_url(folder):
        raise InputError(
            f"{folder}: a run from Python writes to a folder of this machine",
            hint="use `bertbench run` for cloud storage",
        )
    with tempfile.TemporaryDirectory() as temporary:
        json_file = Path(temporary, "results.json")
        command = [sys.executable, "-m", "bertbench", "run", task]
        command += _arguments({"output_dir": folder, **flags, "json": json_file})
        code, last = _follow(command)
        _check(code, last.removeprefix("bertbench: "))
        return _read(task, Path(folder), json_file)


def _arguments(flags: Mapping[str, object]) -> list[str]:
    arguments = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is False:
            arguments += [] if name in _PLAIN_FLAGS else [f"--{name}=false"]
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def _follow(command: list[str]) -> tuple[int, str]:
    """Run a command and show what it says; return its exit code and the last line."""
    last = ""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # A Ctrl-C on the terminal would reach it beside the signal below, and two end it at once.
        start_new_session=True,
    )
    assert process.stderr is not None
    with process:
        while True:
            try:
                for line in process.stderr:
                    last = line.strip() or last
                    sys.stderr.write(line)
                process.wait()
                break
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
            except BaseException:
                process.terminate()  # which saves, too
                raise
    return process.returncode, last


def _check(code: int, message: str) -> None:
    """Raise what belongs to an exit code."""
    if code < 0:
        raise WorkError(f"the run was killed by {signal.Signals(-code).name}; it said: {message}")
    if code == _INTERRUPTED:
        raise StoppedEarlyError(message)
    if code == 2:
        raise InputError(message)
    if code:
        raise WorkError(message)


def _read(task: str, output_dir: Path, json_file: Path) -> RunResult:
    """Read what a run has recorded; one that only predicts may leave no record."""
    import pandas as pd

    from reports.runs import Run, read_run

    if (output_dir / RUN_FILE).exists():
        found = read_run(output_dir)
    else:
        record = {"task": task, "results": load_object(json_file, what="the results of a run")}
        found = Run(output_dir, record, pd.DataFrame(columns=["step", "seconds"]), pd.DataFrame())
    return RunResult(output_dir, found.scores, found.summary(), found.steps)
