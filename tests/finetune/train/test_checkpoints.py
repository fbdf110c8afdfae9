"""Tests of finetune.train.checkpoints."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from finetune.errors import InputError
from finetune.model.modeling import create_variables
from finetune.model.weights import find_checkpoint, load_weights
from finetune.model_files.checkpoint_files import list_checkpoints
from finetune.train.checkpoints import (
    KEPT_CHECKPOINTS,
    restore_state,
    save_state,
    save_weights,
)
from finetune.train.optimization import OptimizerState, create_state
from finetune.train.step import Trainer
from helpers.tiny_models import CONFIG, Arrays, eagerly, random_batch, tiny_trainer, values_of

SEQ_LEN = 5
DATA = ".data-00000-of-00001"
Model = tuple[dict[str, tf.Variable], OptimizerState]


def model(step: int = 0, seed: int = 0, config: object = CONFIG, head: str = "squad") -> Model:
    variables = create_variables(config, head, seed=seed)
    state = create_state([v for v in variables.values() if v.trainable])
    for number, moment in enumerate(state.variables):
        moment.assign(np.full(moment.shape, seed + number / 100, np.float32))
    state.step.assign(step)
    return variables, state


def arrays_of(model: Model) -> list[np.ndarray]:
    variables, state = model
    everything = (*variables.values(), *state.variables, state.step)
    return [variable.numpy() for variable in everything]


def assert_equal(one: Model, other: Model) -> None:
    for left, right in zip(arrays_of(one), arrays_of(other), strict=True):
        np.testing.assert_array_equal(left, right)


def trained(trainer: Trainer, batches: list[Arrays]) -> list[float]:
    return [float(trainer.step(batch).loss) for batch in batches]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_training_goes_on_as_if_never_interrupted(tmp_path: Path, accumulation_steps: int) -> None:
    batches = [random_batch(4, SEQ_LEN, seed=seed) for seed in range(4)]
    with eagerly():
        whole = tiny_trainer("squad", SEQ_LEN, accumulation_steps=accumulation_steps)
        trained(whole, batches[:2])
        save_state(tmp_path, whole.variables, whole.state)
        losses = trained(whole, batches[2:])

        resumed = tiny_trainer("squad", SEQ_LEN, accumulation_steps=accumulation_steps)
        assert restore_state(tmp_path, resumed.variables, resumed.state) == 2
        assert trained(resumed, batches[2:]) == losses
    assert_equal((whole.variables, whole.state), (resumed.variables, resumed.state))
    # The step is part of the state: dropout and the schedule go by it.
    resumed_values = values_of(resumed)
    with eagerly():
        restore_state(tmp_path, resumed.variables, resumed.state)
        resumed.state.step.assign(0)
        trained(resumed, batches[2:])
    assert any((resumed_values[n] != v).any() for n, v in values_of(resumed).items())


def test_everything_comes_back(tmp_path: Path) -> None:
    for head in ("squad", "classifier"):
        saved = model(7, seed=1, head=head)
        prefix = save_state(tmp_path, *saved)
        assert prefix == tmp_path / "model.ckpt-7"
        other = model(0, seed=2, head=head)
        assert restore_state(tmp_path, *other) == 7
        assert_equal(saved, other)


def test_names_and_files_of_the_original(tmp_path: Path) -> None:
    save_state(tmp_path, *model(3))
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint",
        f"model.ckpt-3{DATA}",
        "model.ckpt-3.index",
    ]
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "model.ckpt-3")
    shapes = tf.train.load_checkpoint(str(tmp_path)).get_variable_to_shape_map()
    kernel = "bert/encoder/layer_0/output/dense/kernel"
    assert shapes[kernel] == shapes[f"{kernel}/adam_m"] == shapes[f"{kernel}/adam_v"] == [12, 8]
    assert shapes["global_step"] == []
    assert "bert/pooler/dense/kernel" in shapes
    assert "bert/pooler/dense/kernel/adam_m" not in shapes


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    variables, state = model()
    for step in (5, 9, 10, 100):
        state.step.assign(step)
        save_state(tmp_path, variables, state)
    kept = [tmp_path / "model.ckpt-10", tmp_path / "model.ckpt-100"]
    assert list_checkpoints(tmp_path) == kept
    assert len(kept) == KEPT_CHECKPOINTS
    assert len(os.listdir(tmp_path)) == 2 * KEPT_CHECKPOINTS + 1
    assert restore_state(tmp_path, *model()) == 100


def test_what_was_just_saved_is_kept_beside_later_steps(tmp_path: Path) -> None:
    for step in (100, 200, 10):
        prefix = save_state(tmp_path, *model(step))
    assert prefix in list_checkpoints(tmp_path)
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(prefix)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_state(tmp_path, *model(4, seed=1))
    save_state(tmp_path, *model(4, seed=2))
    restored = model()
    assert restore_state(tmp_path, *restored) == 4
    assert_equal(restored, model(4, seed=2))


@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_interrupted_save_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_before: int
) -> None:
    save_state(tmp_path, *model(4, seed=1))
    replace = os.replace
    calls = []

    def power_cut(source: Path, target: Path) -> None:
        if len(calls) == calls_before:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", power_cut)
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path, *model(8, seed=2))
    # Two renames make a checkpoint: data, then index. The third only names it.
    step = 8 if calls_before == 2 else 4
    assert Path(tf.train.latest_checkpoint(str(tmp_path))).name == "model.ckpt-4"
    # Whoever reads takes the same one, whatever that file says.
    assert find_checkpoint(tmp_path) == tmp_path / f"model.ckpt-{step}"
    other = model()
    load_weights(other[0], tmp_path)
    assert_equal((other[0], model()[1]), (model(seed=2 if step == 8 else 1)[0], model()[1]))
    restored = model()
    assert restore_state(tmp_path, *restored) == step
    assert_equal(restored, model(step, seed=2 if step == 8 else 1))
    # From then on the original's tools do too.
    assert Path(tf.train.latest_checkpoint(str(tmp_path))).name == f"model.ckpt-{step}"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]
    names = {path.name.partition(".data")[0] for path in tmp_path.glob("*.data-*")}
    assert names == {path.name for path in list_checkpoints(tmp_path)}
    save_state(tmp_path, *model(9, seed=3))
    assert restore_state(tmp_path, *model()) == 9


def test_remains_of_a_killed_process_are_ignored(tmp_path: Path) -> None:
    save_state(tmp_path, *model(4))
    for name in (
        f".tmp-model.ckpt-8{DATA}",
        ".tmp-model.ckpt-8.index",
        f"model.ckpt-9{DATA}",  # data without index
        "model.ckpt-10.index",  # index without data
        "model.ckpt-best.index",
    ):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f"model.ckpt-best{DATA}").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == [tmp_path / "model.ckpt-4"]
    assert restore_state(tmp_path, *model()) == 4
    # They are as large as the model, so the next save clears them away.
    save_state(tmp_path, *model(5))
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint",
        *(f"model.ckpt-{step}{suffix}" for step in (4, 5) for suffix in (DATA, ".index")),
        f"model.ckpt-best{DATA}",
        "model.ckpt-best.index",
    ]


def test_no_checkpoint(tmp_path: Path) -> None:
    untouched = model(3, seed=1)
    assert restore_state(tmp_path, *untouched) is None
    assert restore_state(tmp_path / "nowhere", *untouched) is None
    assert_equal(untouched, model(3, seed=1))


@pytest.mark.parametrize(
    ("change", "head", "expected"),
    [
        ({"vocab_size": 40}, "squad", r"no bert/embeddings/word_embeddings of shape \[40, 8\]"),
        ({"num_hidden_layers": 3}, "squad", "no bert/encoder/layer_2/"),
        ({}, "classifier", r"no output_weights of shape \[2, 8\]"),
    ],
)
def test_checkpoint_of_another_model(
    tmp_path: Path, change: dict[str, int], head: str, expected: str
) -> None:
    prefix = save_state(tmp_path, *model(4))
    other = model(0, 1, dataclasses.replace(CONFIG, **change), head)
    before = arrays_of(other)
    with pytest.raises(InputError, match=expected) as caught:
        restore_state(tmp_path, *other)
    assert str(prefix) in str(caught.value)
    assert "choose another output folder" in str(caught.value)
    for left, right in zip(arrays_of(other), before, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("suffix", [".index", DATA])
@pytest.mark.parametrize("size", [0, 30, -40])
def test_damaged_checkpoint(tmp_path: Path, suffix: str, size: int) -> None:
    path = Path(f"{save_state(tmp_path, *model(4))}{suffix}")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"cannot read .*choose another output folder") as caught:
        restore_state(tmp_path, *model())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".index", DATA])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_state(tmp_path, *model(4, seed=1))
    path = Path(f"{save_state(tmp_path, *model(8, seed=2))}{suffix}")
    path.write_bytes(path.read_bytes()[:-40])
    restored = model()
    assert restore_state(tmp_path, *restored) == 4
    assert_equal(restored, model(4, seed=1))
    assert "model.ckpt-8" in caplog.text
    assert Path(tf.train.latest_checkpoint(str(tmp_path))).name == "model.ckpt-4"


@pytest.mark.parametrize("where", [0, -1])
def test_every_reader_passes_over_a_flipped_bit(
    tmp_path: Path, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In the first and in the last tensor of the newest checkpoint."""
    save_weights(tmp_path, model(seed=1)[0], 4)
    good = find_checkpoint(tmp_path)
    for suffix in (".index", DATA):
        shutil.copy(f"{good}{suffix}", tmp_path / f"kept{suffix}")
    path = Path(f"{save_weights(tmp_path, model(seed=2)[0], 8)}{DATA}")
    for suffix in (".index", DATA):
        os.replace(tmp_path / f"kept{suffix}", f"{good}{suffix}")
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    variables = model()[0]
    assert load_weights(variables, tmp_path).source == good
    for name, variable in model(seed=1)[0].items():
        np.testing.assert_array_equal(variables[name], variable)
    assert "passing over a damaged checkpoint" in caplog.text
    for path in tmp_path.glob(f"model.ckpt-4{DATA}"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=r"model\.ckpt-8: cannot read"):
        find_checkpoint(tmp_path)


def test_damaged_best_weights_give_way_to_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = save_state(tmp_path, *model(8))
    best = save_weights(tmp_path / "best", model()[0], 4)
    assert find_checkpoint(tmp_path) == best
    Path(f"{best}.index").write_bytes(b"")
    assert find_checkpoint(tmp_path) == newest
    assert "best/model.ckpt-4" in caplog.text


def test_another_model_is_not_taken_for_damage(tmp_path: Path) -> None:
    save_state(tmp_path, *model(4, head="classifier"))
    save_state(tmp_path, *model(8, head="squad"))
    with pytest.raises(InputError, match=r"model\.ckpt-8"):
        restore_state(tmp_path, *model(head="classifier"))


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    save_state(tmp_path, *model(4, seed=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writing beyond the largest file size fails as writing to a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write the checkpoint"):
            save_state(tmp_path, *model(8, seed=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list_checkpoints(tmp_path) == [tmp_path / "model.ckpt-4"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def test_weights_alone_are_one_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    save_weights(folder, model(seed=1)[0], 5)
    variables = model(seed=2)[0]
    prefix = save_weights(folder, variables, 9)
    assert list_checkpoints(folder) == [prefix]
    assert tf.train.latest_checkpoint(str(folder)) == str(prefix)
    reader = tf.train.load_checkpoint(str(prefix))
    assert set(reader.get_variable_to_shape_map()) == set(variables)
    for name, variable in variables.items():
        np.testing.assert_array_equal(reader.get_tensor(name), variable.numpy())


def test_state_of_another_type_is_damage(tmp_path: Path) -> None:
    whole, other = model(step=3), model(step=4)
    save_state(tmp_path, *whole)
    named = {
        **{name: variable.read_value() for name, variable in other[0].items()},
        **{
            name: tf.train.load_variable(str(tmp_path / "model.ckpt-3"), name)
            for name, _ in tf.train.list_variables(str(tmp_path / "model.ckpt-3"))
            if name not in other[0]
        },
        "global_step": tf.constant(4, tf.int64),
        "bert/pooler/dense/bias": tf.zeros(other[0]["bert/pooler/dense/bias"].shape, tf.int32),
    }
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt-4"),
        tensor_names=list(named),
        shape_and_slices=[""] * len(named),
        tensors=list(named.values()),
    )
    fresh = model()
    assert restore_state(tmp_path, *fresh) == 3
