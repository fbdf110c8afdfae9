"""Tests of finetune.train.training_loop and finetune.train.evaluation: the loop around the step."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from finetune.model_files.checkpoint_files import list_checkpoints
from finetune.storage.folders import FolderLostError
from finetune.train.evaluation import (
    BEST_FOLDER,
    EVAL_LOG_NAME,
    EvalRecord,
    Evaluation,
    best_record,
    out_of_patience,
    read_eval_log,
)
from finetune.train.step import StepResult, Trainer
from finetune.train.training_loop import (
    LOG_NAME,
    Listener,
    Schedule,
    StopReason,
    example_order,
    read_log,
    resume,
    train,
)
from helpers.tiny_models import CONFIG, eagerly, random_batch, tiny_trainer, values_of

SEQ_LEN = 5
SCHEDULE = Schedule(4, 4, 8, seed=3)


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    with eagerly():
        yield


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    batch = random_batch(10, SEQ_LEN, seed=1)
    return {name: value for name, value in batch.items() if name != "weights"}


def evaluation(values: list[float], **more: object) -> Evaluation:
    """Evaluates to the given scores one after another."""
    scores = iter(values)
    options = {"every_steps": 2, "metric": "f1", **more}
    return Evaluation(lambda: {"f1": next(scores), "loss": 1.0}, **options)  # type: ignore[arg-type]


def records(*values: float) -> list[EvalRecord]:
    return [EvalRecord(step, {"f1": value}) for step, value in enumerate(values, 1)]


def test_order_is_a_permutation_an_epoch_wherever_it_begins() -> None:
    whole = example_order(7, 3, 0, 21)
    assert [sorted(whole[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert len({tuple(whole[i : i + 7]) for i in (0, 7, 14)}) == 3
    np.testing.assert_array_equal(example_order(7, 3, 5, 9), whole[5:14])
    assert (example_order(7, 4, 0, 21) != whole).any()


@pytest.mark.parametrize("stop_at", [1, 4, 5])
def test_stopped_and_continued_is_as_undisturbed(
    tmp_path: Path, data: dict[str, np.ndarray], stop_at: int
) -> None:
    scores = [0.1, 0.5, 0.3, 0.4]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    undisturbed = tiny_trainer("squad", SEQ_LEN)
    assert train(
        undisturbed, data, SCHEDULE, whole, evaluation=evaluation(scores, keep_best=True)
    ) is StopReason.FINISHED  # fmt: skip

    first = tiny_trainer("squad", SEQ_LEN)
    stopping = Listener(should_stop=lambda: int(first.state.step.numpy()) == stop_at)
    before = evaluation(scores, keep_best=True)
    assert (
        train(first, data, SCHEDULE, cut, evaluation=before, listener=stopping) is StopReason.ASKED
    )
    second = tiny_trainer("squad", SEQ_LEN)
    assert resume(second, cut) == stop_at
    after = evaluation(scores[len(read_eval_log(cut)) :], keep_best=True)
    assert train(second, data, SCHEDULE, cut, evaluation=after) is StopReason.FINISHED

    for name, value in values_of(undisturbed).items():
        np.testing.assert_array_equal(values_of(second)[name], value)
    assert read_eval_log(cut) == read_eval_log(whole)
    assert [r.step for r in read_eval_log(cut)] == [2, 4, 6, 8]
    timeless = [
        [dataclasses.replace(r, seconds=0.0) for r in read_log(folder / LOG_NAME)]
        for folder in (whole, cut)
    ]
    assert timeless[0] == timeless[1]
    assert list_checkpoints(cut / BEST_FOLDER) == [cut / BEST_FOLDER / "model.ckpt-4"]
    best = [
        tf.train.load_checkpoint(str(folder / BEST_FOLDER / "model.ckpt-4")).get_tensor(
            "bert/embeddings/word_embeddings"
        )
        for folder in (whole, cut)
    ]
    np.testing.assert_array_equal(*best)


def test_continued_with_xla_stays_on_the_curve(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    assert train(
        tiny_trainer("squad", SEQ_LEN, config=config), data, SCHEDULE, whole
    ) is StopReason.FINISHED  # fmt: skip
    first = tiny_trainer("squad", SEQ_LEN, config=config)
    stopping = Listener(should_stop=lambda: int(first.state.step.numpy()) == 3)
    assert train(first, data, SCHEDULE, cut, listener=stopping) is StopReason.ASKED
    second = tiny_trainer("squad", SEQ_LEN, config=config, xla=True)
    assert resume(second, cut) == 3
    tf.config.run_functions_eagerly(False)
    assert train(second, data, SCHEDULE, cut) is StopReason.FINISHED
    losses, expected = (
        [record.loss for record in read_log(folder / LOG_NAME)] for folder in (cut, whole)
    )
    assert losses == pytest.approx(expected, rel=1e-5)


def test_logs_beyond_the_checkpoint_are_forgotten(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    """As after a kill: steps and evaluations were logged that no checkpoint has."""
    schedule = dataclasses.replace(SCHEDULE, save_checkpoints_steps=3)
    trainer = tiny_trainer("squad", SEQ_LEN)

    def power_cut() -> bool:
        if int(trainer.state.step.numpy()) == 5:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train(trainer, data, schedule, tmp_path, evaluation=evaluation([0.5, 0.6]),
              listener=Listener(should_stop=power_cut))  # fmt: skip
    with (tmp_path / EVAL_LOG_NAME).open("a") as file:
        file.write('{"step": 6, "f1"')
    assert [r.step for r in read_log(tmp_path / LOG_NAME)] == [1, 2, 3, 4, 5]
    assert [r.step for r in read_eval_log(tmp_path)] == [2, 4]
    assert resume(tiny_trainer("squad", SEQ_LEN), tmp_path) == 3
    assert [r.step for r in read_log(tmp_path / LOG_NAME)] == [1, 2, 3]
    assert [r.step for r in read_eval_log(tmp_path)] == [2]


def test_early_stopping_keeps_the_best_and_stays_stopped(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    trainer = tiny_trainer("squad", SEQ_LEN)
    seen: list[int] = []
    listener = Listener(on_step=lambda r: seen.append(r.step))
    impatient = evaluation([0.4, 0.4, 0.3, 0.9], patience=2, keep_best=True)
    ending = train(trainer, data, SCHEDULE, tmp_path, evaluation=impatient, listener=listener)
    assert ending is StopReason.NO_IMPROVEMENT
    assert seen[-1] == 6
    assert list_checkpoints(tmp_path) == [tmp_path / "model.ckpt-6"]
    assert list_checkpoints(tmp_path / BEST_FOLDER) == [tmp_path / BEST_FOLDER / "model.ckpt-2"]

    again = tiny_trainer("squad", SEQ_LEN)
    assert resume(again, tmp_path) == 6
    ending = train(again, data, SCHEDULE, tmp_path, evaluation=impatient, listener=listener)
    assert ending is StopReason.NO_IMPROVEMENT
    assert seen[-1] == 6
    # With more patience it goes on.
    patient = evaluation([0.9], patience=3)
    assert train(again, data, SCHEDULE, tmp_path, evaluation=patient) is StopReason.FINISHED


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        ([], 1, False),
        ([0.1], 1, False),
        ([0.2, 0.2], 1, True),
        ([0.2, 0.1, 0.3], 2, False),
        ([0.2, 0.1, 0.1], 2, True),
        ([math.nan, math.nan], 2, True),
        ([math.nan, 0.1], 2, False),
        ([0.2, 0.1, 0.1], None, False),
    ],
)
def test_patience(values: list[float], patience: int | None, expected: bool) -> None:
    rule = Evaluation(dict, 1, "f1", patience=patience)
    assert out_of_patience(rule, records(*values)) is expected


def test_best_of_losses_is_the_least() -> None:
    rule = Evaluation(dict, 1, "f1", greater_is_better=False)
    best = best_record(rule, records(0.5, 0.2, 0.2, 0.9))
    assert best is not None
    assert best.step == 2
    assert best_record(rule, records(math.nan, math.inf)) is None


@pytest.mark.parametrize("field", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_never_saved(
    tmp_path: Path, data: dict[str, np.ndarray], field: str, value: float
) -> None:
    trainer = tiny_trainer("squad", SEQ_LEN)
    schedule = dataclasses.replace(SCHEDULE, save_checkpoints_steps=1)

    def spoil(step: Callable[..., StepResult]) -> Callable[..., StepResult]:
        def spoiled(batch: object) -> StepResult:
            result = step(batch)
            if int(trainer.state.step.numpy()) == 3:
                return dataclasses.replace(result, **{field: tf.constant(value)})
            return result

        return spoiled

    broken = Trainer(trainer.variables, trainer.state, spoil(trainer.step))
    with pytest.raises(FloatingPointError, match=r"at step 3; use a smaller learning rate"):
        train(broken, data, schedule, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model.ckpt-1", "model.ckpt-2"]


@pytest.mark.parametrize("update_began", [False, True])
def test_a_step_that_runs_out_of_memory_loses_nothing_unless_its_update_began(
    tmp_path: Path, data: dict[str, np.ndarray], update_began: bool
) -> None:
    trainer = tiny_trainer("squad", SEQ_LEN)
    schedule = dataclasses.replace(SCHEDULE, save_checkpoints_steps=2)
    saved: list[int] = []

    def exhausted(batch: object) -> StepResult:
        if int(trainer.state.step.numpy()) == 3:
            if update_began:
                word_embeddings = next(iter(trainer.variables.values()))
                word_embeddings.assign(2.0 * word_embeddings)
                trainer.state.step.assign_add(1)
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return trainer.step(batch)

    broken = Trainer(trainer.variables, trainer.state, exhausted)
    listener = Listener(on_save=lambda: saved.append(int(trainer.state.step.numpy())))
    with pytest.raises(tf.errors.ResourceExhaustedError):
        train(broken, data, schedule, tmp_path, listener=listener)
    assert saved == ([2] if update_began else [2, 3])

    again = tiny_trainer("squad", SEQ_LEN)
    assert resume(again, tmp_path) == saved[-1]
    train(again, data, schedule, tmp_path)
    undisturbed, whole = tiny_trainer("squad", SEQ_LEN), tmp_path / "whole"
    whole.mkdir()
    train(undisturbed, data, schedule, whole)
    for name, value in values_of(undisturbed).items():
        np.testing.assert_array_equal(values_of(again)[name], value)
    assert [r.step for r in read_log(tmp_path / LOG_NAME)] == [*range(1, 9)]


def test_a_failed_step_is_told_even_if_it_cannot_be_saved(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    trainer = tiny_trainer("squad", SEQ_LEN)

    def exhausted(batch: object) -> StepResult:
        if int(trainer.state.step.numpy()) == 3:
            raise tf.errors.InternalError(None, None, "CUBLAS_STATUS_ALLOC_FAILED")
        return trainer.step(batch)

    def full() -> None:
        raise OSError("no space left")

    broken = Trainer(trainer.variables, trainer.state, exhausted)
    with pytest.raises(tf.errors.InternalError, match="CUBLAS"):
        train(broken, data, SCHEDULE, tmp_path, listener=Listener(on_save=full))


def test_an_evaluation_that_fails_loses_no_steps(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    trainer = tiny_trainer("squad", SEQ_LEN)

    def short_of_memory() -> dict[str, float]:
        raise RuntimeError("out of memory while predicting")

    rule = Evaluation(short_of_memory, every_steps=3, metric="f1")
    with pytest.raises(RuntimeError, match="predicting"):
        train(trainer, data, SCHEDULE, tmp_path, evaluation=rule)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model.ckpt-3"]


def undisturbed_losses(folder: Path, data: dict[str, np.ndarray]) -> list[float]:
    folder.mkdir()
    train(tiny_trainer("squad", SEQ_LEN), data, SCHEDULE, folder)
    return [record.loss for record in read_log(folder / LOG_NAME)]


@pytest.mark.parametrize("save_every", [1, 100])
@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_that_is_renamed_ends_the_run_and_none_is_made(
    tmp_path: Path, data: dict[str, np.ndarray], save_every: int, anew: bool
) -> None:
    folder, aside = tmp_path / "out", tmp_path / "aside"
    folder.mkdir()
    schedule = dataclasses.replace(SCHEDULE, save_checkpoints_steps=save_every)
    trainer = tiny_trainer("squad", SEQ_LEN)

    def rename() -> bool:
        if int(trainer.state.step.numpy()) == 3 and not aside.exists():
            folder.rename(aside)
            if anew:
                folder.mkdir()
        return False

    with pytest.raises(FolderLostError, match=f"renamed to {aside}"):
        train(trainer, data, schedule, folder, listener=Listener(should_stop=rename))
    if anew:
        assert not os.listdir(folder)
        folder.rmdir()
    assert not folder.exists()
    aside.rename(folder)
    again = tiny_trainer("squad", SEQ_LEN)
    resume(again, folder)
    train(again, data, schedule, folder)
    got = [record.loss for record in read_log(folder / LOG_NAME)]
    assert got == undisturbed_losses(tmp_path / "whole", data)


@pytest.mark.parametrize("when", ["step", "evaluation"])
def test_a_folder_that_is_deleted_ends_the_run(
    tmp_path: Path, data: dict[str, np.ndarray], when: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    seen: list[int] = []

    def delete(_: object = None) -> dict[str, float]:
        seen.append(0)
        if len(seen) == 3 or when == "evaluation":
            shutil.rmtree(folder)
        return {"f1": 0.5}

    if when == "step":
        rule, listener = None, Listener(on_step=delete)
    else:
        rule, listener = Evaluation(delete, 4, "f1", keep_best=True), Listener()
    with pytest.raises(FolderLostError, match=r"is gone$"):
        train(
            tiny_trainer("squad", SEQ_LEN), data, SCHEDULE, folder,
            evaluation=rule, listener=listener,
        )  # fmt: skip
    assert not folder.exists()


def test_logs_that_are_deleted_are_written_again(
    tmp_path: Path, data: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    def delete(record: object) -> None:
        for name in (LOG_NAME, EVAL_LOG_NAME):
            if (tmp_path / name).exists():
                (tmp_path / name).unlink()

    trainer = tiny_trainer("squad", SEQ_LEN)
    evaluated = evaluation([0.1, 0.2, 0.3, 0.4])
    train(
        trainer, data, SCHEDULE, tmp_path,
        evaluation=evaluated, listener=Listener(on_step=delete),
    )  # fmt: skip
    assert [r.step for r in read_eval_log(tmp_path)] == [2, 4, 6, 8]
    assert not (tmp_path / LOG_NAME).exists()  # the last line went with it
    assert "train_log.jsonl was deleted or replaced" in caplog.text


def test_a_log_that_was_deleted_once_has_all_lines(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    def delete(record: object) -> None:
        if record.step == 5:  # type: ignore[attr-defined]
            (tmp_path / LOG_NAME).unlink()

    train(tiny_trainer("squad", SEQ_LEN), data, SCHEDULE, tmp_path,
          listener=Listener(on_step=delete))  # fmt: skip
    assert [r.step for r in read_log(tmp_path / LOG_NAME)] == [*range(1, 9)]


def test_a_log_that_became_a_folder_ends_the_run_and_loses_no_step(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    def replace(record: object) -> None:
        if record.step == 5:  # type: ignore[attr-defined]
            (tmp_path / LOG_NAME).unlink()
            (tmp_path / LOG_NAME).mkdir()

    with pytest.raises(OSError, match=LOG_NAME):
        train(tiny_trainer("squad", SEQ_LEN), data, SCHEDULE, tmp_path,
              listener=Listener(on_step=replace))  # fmt: skip
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model.ckpt-6"]
