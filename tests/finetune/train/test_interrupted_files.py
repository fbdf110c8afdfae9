"""A training that ends between two file operations loses nothing, wherever that is."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from finetune.model.weights import find_checkpoint, load_weights
from finetune.model_files.checkpoint_files import list_checkpoints, remove_half_written
from finetune.train.evaluation import BEST_FOLDER, Evaluation, read_eval_log
from finetune.train.step import Trainer
from finetune.train.training_loop import LOG_NAME, Schedule, StopReason, read_log, resume, train
from helpers.tiny_models import eagerly, random_batch, tiny_trainer, values_of

SEQ_LEN = 5
STEPS = 4
SCHEDULE = Schedule(4, 4, STEPS, seed=3, save_checkpoints_steps=2)
OPERATIONS = ("replace", "fsync", "unlink", "open")


class Killed(BaseException):
    """Nothing may catch it, and nothing is tidied up after it: see `Faults`."""


class Faults:
    """Lets operations on files pass up to a count, and then fails, once or from then on.

    After a kill no operation has an effect any more, as if the process were gone: what would be
    tidied up stays.
    """

    def __init__(self, patch: pytest.MonkeyPatch, passing: int, *, kill: bool) -> None:
        self.passed, self.passing, self.kill = 0, passing, kill
        for name in OPERATIONS:
            patch.setattr(os, name, functools.partial(self._call, name, getattr(os, name)))

    def _call(self, name: str, operation: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        writes = name != "open" or any(isinstance(a, int) and a & os.O_CREAT for a in arguments)
        if writes:
            self.passed += 1
            if self.passed > self.passing and (self.kill or self.passed == self.passing + 1):
                raise Killed if self.kill else OSError(errno.ENOSPC, "No space left on device")
        return operation(*arguments, **more)


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    with eagerly():
        yield


DATA = {name: v for name, v in random_batch(10, SEQ_LEN, seed=1).items() if name != "weights"}


def new_trainer() -> Trainer:
    return tiny_trainer("squad", SEQ_LEN)


def go_on(folder: Path, trainer: Trainer) -> StopReason:
    """What `bertbench run` does with a folder, as often as it is called."""
    scores = {2: 0.5, 4: 0.3}
    rule = Evaluation(
        lambda: {"f1": scores[int(trainer.state.step.numpy())]}, 2, "f1", keep_best=True
    )
    remove_half_written(folder)
    remove_half_written(folder / BEST_FOLDER)
    resume(trainer, folder)
    return train(trainer, DATA, SCHEDULE, folder, evaluation=rule)


@functools.cache
def undisturbed() -> tuple[list[float], dict[str, np.ndarray]]:
    with tempfile.TemporaryDirectory() as name:
        trainer = new_trainer()
        go_on(Path(name), trainer)
        return [record.loss for record in read_log(Path(name) / LOG_NAME)], values_of(trainer)


def interrupted(folder: Path, passing: int, *, kill: bool) -> int:
    """Train until the fault; returns how many operations there were."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, passing, kill=kill)
        with contextlib.suppress(Killed, OSError):
            go_on(folder, new_trainer())
        return faults.passed


def check_what_is_left(folder: Path) -> None:
    """Every reader takes the newest whole checkpoint; repeating comes to the same end."""
    whole = list_checkpoints(folder)
    if list_checkpoints(folder / BEST_FOLDER):
        assert find_checkpoint(folder).parent.name == BEST_FOLDER
    elif whole:
        assert find_checkpoint(folder) == whole[-1]
        load_weights(new_trainer().variables, folder)
    trainer = new_trainer()
    assert go_on(folder, trainer) is StopReason.FINISHED
    losses, values = undisturbed()
    assert [record.loss for record in read_log(folder / LOG_NAME)] == losses
    assert [record.step for record in read_eval_log(folder)] == [2, 4]
    for name, value in values_of(trainer).items():
        np.testing.assert_array_equal(value, values[name])
    assert Path(tf.train.latest_checkpoint(str(folder))).name == f"model.ckpt-{STEPS}"
    assert [path.name for path in list_checkpoints(folder / BEST_FOLDER)] == ["model.ckpt-2"]
    left = {path.name for path in folder.rglob(".tmp-*")}
    assert not left


EVERY = range(45)


@pytest.mark.parametrize("kill", [True, False])
@pytest.mark.parametrize("passing", EVERY[4::14])
def test_a_training_that_ends_between_two_operations(
    tmp_path: Path, passing: int, kill: bool
) -> None:
    interrupted(tmp_path, passing, kill=kill)
    check_what_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [True, False])
@pytest.mark.parametrize("passing", EVERY)
def test_a_training_that_ends_between_any_two_operations(
    tmp_path: Path, passing: int, kill: bool
) -> None:
    interrupted(tmp_path, passing, kill=kill)
    check_what_is_left(tmp_path)


def test_these_are_all_the_operations(tmp_path: Path) -> None:
    assert 20 < interrupted(tmp_path, 10**6, kill=True) <= len(EVERY)
