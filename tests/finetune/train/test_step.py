"""Tests of finetune.train.step: weights of rows, what a step reports and leaves alone."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from finetune.model.modeling import create_variables
from finetune.spec.config import has_no_gradient, is_trained
from finetune.spec.optimizers import OPTIMIZERS
from finetune.spec.step_settings import ModelSpec, StepSettings
from finetune.train import gradients
from finetune.train.batches import pad_batch
from finetune.train.gradients import example_losses
from finetune.train.inference import make_predictor
from finetune.train.optimization import OptimizerSettings
from finetune.train.step import Trainer, make_trainer
from helpers.paths import REPOSITORY
from helpers.tiny_models import (
    CONFIG,
    NUM_LABELS,
    SETTINGS,
    WEIGHTS_SEED,
    Arrays,
    eagerly,
    losses_of,
    random_batch,
    reset,
    tiny_trainer,
    values_of,
)

SEQ_LEN = 6


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """A classifier without dropout in two micro-batches."""
    return tiny_trainer(
        "classifier", SEQ_LEN, accumulation_steps=2, config=CONFIG.without_dropout()
    )


@pytest.fixture
def initial(trainer: Trainer) -> Iterator[Arrays]:
    """The trainer's weights, to which it is reset; its steps run without being compiled."""
    values = create_variables(CONFIG, "classifier", num_labels=NUM_LABELS, seed=WEIGHTS_SEED)
    initial = {name: variable.numpy() for name, variable in values.items()}
    reset(trainer, initial)
    with eagerly():
        yield initial


def test_loss_is_the_weighted_mean(trainer: Trainer, initial: Arrays) -> None:
    batch = random_batch(4, SEQ_LEN)
    losses, _ = losses_of("classifier", batch)
    batch["weights"] = np.array([1, 0.5, 0, 2], np.float32)
    result = trainer.step(batch)
    assert float(result.loss) == pytest.approx((losses @ batch["weights"]) / 3.5, rel=1e-5)
    assert float(result.learning_rate) == 0.0
    assert int(trainer.state.step) == 1


def test_rows_of_weight_zero_have_no_influence(trainer: Trainer, initial: Arrays) -> None:
    results = []
    for ids in (3, 4):
        reset(trainer, initial)
        batch = random_batch(4, SEQ_LEN)
        batch["weights"][2:] = 0
        batch["input_ids"][2:] = ids
        batch["label_ids"][2:] = ids - 3
        results.append([float(trainer.step(batch).gradient_norm) for _ in range(2)])
    assert results[0] == results[1]


def test_micro_batch_of_nothing_but_padding(trainer: Trainer, initial: Arrays) -> None:
    batch = random_batch(2, SEQ_LEN)
    padded = pad_batch(batch, 4)
    result = trainer.step(padded)
    assert np.isfinite(float(result.loss))
    assert float(result.loss) == pytest.approx(losses_of("classifier", batch)[0].mean(), rel=1e-5)


def test_new_batch_sizes_do_not_trace_again(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []

    def count(*args: object, **kwargs: object) -> tf.Tensor:
        traces.append(1)
        return example_losses(*args, **kwargs)

    monkeypatch.setattr(gradients, "example_losses", count)
    trainer = tiny_trainer("squad", SEQ_LEN, accumulation_steps=2)
    trainer.step(random_batch(2, SEQ_LEN))
    traced = len(traces)
    for rows in (4, 6):
        trainer.step(random_batch(rows, SEQ_LEN))
    assert len(traces) == traced


def test_pooler_under_the_squad_head_stays_as_it_is() -> None:
    trainer = tiny_trainer("squad", SEQ_LEN)
    before = values_of(trainer)
    with eagerly():
        for seed in range(3):
            trainer.step(random_batch(3, SEQ_LEN, seed=seed))
    changed = {name for name, value in values_of(trainer).items() if (value != before[name]).any()}
    assert set(before) - changed == {"bert/pooler/dense/kernel", "bert/pooler/dense/bias"}
    moments = trainer.state.variables
    assert len(moments) == 2 * (len(before) - 2)


@pytest.mark.parametrize("head", ["squad", "classifier"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rounding_noise_in_place_of_a_gradient_moves_nothing(optimizer: str, head: str) -> None:
    """What divides a gradient by its own size would move a weight at the full rate for it."""
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer, num_warmup_steps=0)
    trainer = tiny_trainer(head, SEQ_LEN, settings=settings)
    before = values_of(trainer)
    with eagerly():
        for seed in range(3):
            trainer.step(random_batch(5, SEQ_LEN, seed=seed))
    moved = {name: np.abs(value - before[name]).max() for name, value in values_of(trainer).items()}
    still = [name for name in moved if has_no_gradient(name, head, CONFIG)]
    assert len(still) == {"squad": 4, "classifier": 2}[head]
    for name, distance in moved.items():
        if name in still:
            # AdamW's epsilon, 1e-6, is large beside the noise.
            assert distance <= (1e-2 * SETTINGS.learning_rate if optimizer == "adamw" else 0), name
        elif is_trained(name, head):
            assert distance >= 0.1 * SETTINGS.learning_rate, name


def test_dropout_changes_from_step_to_step_and_with_the_seed() -> None:
    settings = OptimizerSettings(0.0, 10)
    batch = random_batch(3, SEQ_LEN)
    losses = set()
    for seed in (0, 1):
        trainer = tiny_trainer("squad", SEQ_LEN, seed=seed, settings=settings)
        with eagerly():
            losses |= {float(trainer.step(batch).loss) for _ in range(3)}
    assert len(losses) == 6


def test_rows_that_cannot_be_cut(trainer: Trainer, initial: Arrays) -> None:
    with pytest.raises(ValueError, match="3 rows cannot be cut into 2 micro-batches"):
        trainer.step(random_batch(3, SEQ_LEN))
    assert int(trainer.state.step) == 0


def test_no_accumulation_steps() -> None:
    with pytest.raises(ValueError, match="accumulation_steps is 0"):
        make_trainer(
            {}, ModelSpec(CONFIG, "squad", SEQ_LEN), SETTINGS, StepSettings(accumulation_steps=0)
        )


def test_places_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="moon"):
        tiny_trainer("squad", SEQ_LEN, placement="moon")
    with pytest.raises(ValueError, match="XLA"):
        tiny_trainer("squad", SEQ_LEN, placement="host", xla=True)


def test_no_code_is_generated_into_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoGraph would write a file for every function, which a killed process leaves behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trainer = tiny_trainer("squad", 8, accumulation_steps=2)
    trainer.step(random_batch(4, 8))
    make_predictor(trainer.variables, ModelSpec(CONFIG, "squad", 8))(random_batch(2, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["finetune", "bertbench", "reports"])
def test_every_graph_is_made_without_autograph(package: str) -> None:
    """What AutoGraph has converted once it does not write again: the test above may miss it."""
    folder = REPOSITORY / package
    for path in folder.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if "tf.function" in line:
                assert "autograph=False" in line, f"{path}:{number}"
