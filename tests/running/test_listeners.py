"""Tests of bertbench.running.listeners: who is told of a training, and what can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertbench.core.errors import WorkError
from bertbench.running.listeners import ProgressListener, cloud_copy, event_files, join_listeners
from bertbench.running.output.cloud_storage import RemoteFolder
from bertbench.running.settings import RunSettings
from finetune.train.evaluation import EvalRecord
from finetune.train.training_loop import Listener, StepRecord

STEP = StepRecord(3, 0.5, 1e-4, 1.0, 2.0)
EVALUATION = EvalRecord(3, {"f1": 80.25})


class UnreachableFolder(RemoteFolder):
    """A folder in a cloud storage that cannot be reached."""

    def push(self) -> None:
        raise WorkError("no network")


def settings(folder: Path, *, tensorboard: bool) -> RunSettings:
    return RunSettings(
        output_dir=folder, max_seq_length=32, train_batch_size=8, predict_batch_size=8,
        learning_rate=1e-4, num_train_epochs=1.0, warmup_proportion=0.1,
        save_checkpoints_steps=100, seed=1, tensorboard=tensorboard,
    )  # fmt: skip


def test_all_are_told_in_their_order_and_one_is_enough_to_stop() -> None:
    told: list[str] = []
    first, second = (
        Listener(
            on_step=lambda record, name=name: told.append(f"{name} step {record.step}"),  # type: ignore[misc]
            on_evaluation=lambda record, name=name: told.append(f"{name} {record.metrics}"),  # type: ignore[misc]
            on_save=lambda name=name: told.append(f"{name} save"),  # type: ignore[misc]
        )
        for name in "ab"
    )
    joined = join_listeners(first, second)
    joined.on_step(STEP)
    joined.on_evaluation(EVALUATION)
    joined.on_save()
    assert told == [
        "a step 3",
        "b step 3",
        "a {'f1': 80.25}",
        "b {'f1': 80.25}",
        "a save",
        "b save",
    ]
    assert not joined.should_stop()
    assert join_listeners(first, Listener(should_stop=lambda: True), second).should_stop()


def test_progress_knows_the_last_step_that_was_done() -> None:
    shown: list[tuple[int, str]] = []
    listener = ProgressListener(lambda done, note: shown.append((done, note)), 2, effective_batch=8)
    listener.on_evaluation_progress(1, 5)
    listener.on_step(STEP)
    listener.on_evaluation_progress(5, 5)
    assert listener.done == 3
    assert shown == [
        (2, "evaluating 1/5"), (3, "loss 0.5000, 4.0 examples/s"), (3, "evaluating 5/5"),
    ]  # fmt: skip


def test_a_copy_that_fails_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud_copy(UnreachableFolder("gs://bucket/out", tmp_path)).on_save()
    assert capsys.readouterr().err == "warning: no network\n"
    cloud_copy(None).on_save()


@pytest.mark.parametrize(
    ("tensorboard", "evaluates", "folders"),
    [(False, True, []), (True, False, [""]), (True, True, ["", "eval"])],
)
def test_event_files_are_written_where_they_are_asked_for(
    tmp_path: Path, tensorboard: bool, evaluates: bool, folders: list[str]
) -> None:
    asked = settings(tmp_path, tensorboard=tensorboard)
    with event_files(asked, evaluates=evaluates) as listener:
        listener.on_step(STEP)
        listener.on_evaluation(EVALUATION)
    written = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    assert written == {tmp_path / folder for folder in folders}
