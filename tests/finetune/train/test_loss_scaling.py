"""Dynamic loss scaling: what it saves from vanishing, what it repeats, what it never applies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from finetune.train import loss_scaling
from finetune.train.checkpoints import restore_state, save_state
from finetune.train.loss_scaling import INITIAL_SCALE
from finetune.train.optimization import OptimizerState
from finetune.train.step import Trainer
from helpers.tiny_models import eagerly, norm_of, random_batch, tiny_trainer, values_of

SEQ_LEN = 7
BATCH = random_batch(4, SEQ_LEN)


@pytest.fixture(autouse=True)
def _eager(request: pytest.FixtureRequest) -> Iterator[None]:
    if "compiled" in request.node.name:
        yield
        return
    with eagerly():
        yield


def trainer_at(scale: float) -> Trainer:
    """A trainer in float16 whose first update is made at a rate above 0."""
    trainer = tiny_trainer("squad", SEQ_LEN, precision="fp16")
    trainer.state.step.assign(1)
    scale_of(trainer.state).assign(scale)
    return trainer


def scale_of(state: OptimizerState) -> object:
    assert state.loss_scale is not None
    return state.loss_scale.scale


def test_the_update_does_not_depend_on_the_scale() -> None:
    one, other = trainer_at(2.0**10), trainer_at(2.0**13)
    before = values_of(one)
    norms = [float(trainer.step(BATCH).gradient_norm) for trainer in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    change = {name: value - before[name] for name, value in values_of(one).items()}
    difference = {name: value - values_of(one)[name] for name, value in values_of(other).items()}
    assert norm_of(difference) < 0.02 * norm_of(change)


def test_small_gradients_vanish_without_it() -> None:
    tiny = trainer_at(1.0)
    weights = {name: variable for name, variable in tiny.variables.items() if "squad" in name}
    for variable in weights.values():
        # What comes into the encoder's gradient is then below float16's smallest number.
        variable.assign(variable * 1e-9)
    lost = tiny_encoder_change(tiny)
    scaled = trainer_at(2.0**24)
    for name in weights:
        scaled.variables[name].assign(weights[name])
    assert int(tiny.state.step.numpy()) == 2
    assert lost == 0
    assert tiny_encoder_change(scaled) > 0


def tiny_encoder_change(trainer: Trainer) -> float:
    """Size of the first layer's first moments after a step."""
    trainer.step(BATCH)
    names = [name for name, variable in trainer.variables.items() if variable.trainable]
    slots = dict(zip(names, trainer.state.slots, strict=True))
    return norm_of({"m": slots["bert/encoder/layer_0/output/dense/kernel"]["adam_m"].numpy()})


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_step_that_overflows_is_made_again_on_the_same_examples(accumulation_steps: int) -> None:
    too_large = tiny_trainer(
        "squad", SEQ_LEN, precision="fp16", accumulation_steps=accumulation_steps
    )
    too_large.state.step.assign(1)
    scale_of(too_large.state).assign(2.0**40)
    result = too_large.step(BATCH)
    scale = float(scale_of(too_large.state).numpy())
    assert 1.0 < scale < 2.0**40
    assert np.isfinite(result.gradient_norm)
    assert int(too_large.state.step.numpy()) == 2
    # As if it had begun with the scale that was found.
    right = tiny_trainer("squad", SEQ_LEN, precision="fp16", accumulation_steps=accumulation_steps)
    right.state.step.assign(1)
    scale_of(right.state).assign(scale)
    right.step(BATCH)
    for name, value in values_of(right).items():
        np.testing.assert_array_equal(value, values_of(too_large)[name], err_msg=name)


def test_the_scale_grows_after_many_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scaling, "UPDATES_BEFORE_GROWTH", 3)
    monkeypatch.setattr(loss_scaling, "MAX_SCALE", 64.0)
    trainer = trainer_at(16.0)
    scales = []
    for _ in range(8):
        trainer.step(BATCH)
        scales.append(float(scale_of(trainer.state).numpy()))
    assert scales == [16, 16, 32, 32, 32, 64, 64, 64]


def test_what_no_scale_can_mend_is_reported_and_not_applied() -> None:
    trainer = trainer_at(INITIAL_SCALE)
    name = "bert/encoder/layer_1/output/dense/bias"
    trainer.variables[name].assign(np.full(trainer.variables[name].shape, np.nan, np.float32))
    before = values_of(trainer)
    result = trainer.step(BATCH)
    assert not np.isfinite(result.loss)
    assert int(trainer.state.step.numpy()) == 1
    for name, value in values_of(trainer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_run_goes_on_with_its_scale_and_in_another_precision(tmp_path: Path) -> None:
    trainer = trainer_at(2.0**7)
    trainer.step(BATCH)
    save_state(tmp_path, trainer.variables, trainer.state)
    same = tiny_trainer("squad", SEQ_LEN, precision="fp16")
    assert restore_state(tmp_path, same.variables, same.state) == 2
    assert float(scale_of(same.state).numpy()) == 2.0**7
    assert same.state.loss_scale is not None
    assert int(same.state.loss_scale.updates.numpy()) == 1
    single = tiny_trainer("squad", SEQ_LEN)
    assert restore_state(tmp_path, single.variables, single.state) == 2
    single.step(BATCH)
    save_state(tmp_path, single.variables, single.state)
    again = tiny_trainer("squad", SEQ_LEN, precision="fp16")
    assert restore_state(tmp_path, again.variables, again.state) == 3
    assert float(scale_of(again.state).numpy()) == INITIAL_SCALE


def test_compiled_as_well() -> None:
    trainer = trainer_at(2.0**40)
    before = values_of(trainer)
    assert np.isfinite(trainer.step(BATCH).gradient_norm)
    assert 1.0 < float(scale_of(trainer.state).numpy()) < 2.0**40
    assert int(trainer.state.step.numpy()) == 2
    assert all(np.isfinite(value).all() for value in values_of(trainer).values())
    assert norm_of({name: values_of(trainer)[name] - before[name] for name in before}) > 0
