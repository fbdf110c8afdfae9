"""Predictions with another version of TensorFlow than that of the traces."""

from __future__ import annotations

import pytest

from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.memory.prediction import FORMULA_MARGIN, note_other_tensorflow, predict_memory
from bertbench.memory.room import Room
from bertbench.memory.traces.archive import package_archive

SETUP = Setup(published_workload("bert-mini", 64))
ROOM = Room("cpu", GIB_BYTES)
RECORDED = package_archive().manifest.tensorflow
OTHER = "9.9.9"


@pytest.mark.parametrize("device_kind", ["cpu", "gpu"])
def test_a_prediction_keeps_the_margin_of_the_formula(device_kind: str) -> None:
    prediction = predict_memory(SETUP, Room(device_kind, GIB_BYTES), tensorflow=OTHER)
    assert prediction.source == "trace"
    assert prediction.margin == FORMULA_MARGIN
    same = predict_memory(SETUP, Room(device_kind, GIB_BYTES), tensorflow=RECORDED)
    assert same.margin < FORMULA_MARGIN
    assert prediction.peak_bytes(8) == same.peak_bytes(8)
    assert prediction.max_micro_batch() < same.max_micro_batch()


def test_the_error_of_trials_with_this_version_is_the_margin() -> None:
    room = Room("cpu", GIB_BYTES, margin=0.03)
    assert predict_memory(SETUP, room, tensorflow=OTHER).margin == 0.03
    assert predict_memory(SETUP, room, tensorflow=RECORDED).margin == 0.0


def test_the_formula_is_of_no_version() -> None:
    setup = Setup(SETUP.workload, Levers(precision="bf16"))
    margins = [predict_memory(setup, ROOM, tensorflow=v).margin for v in (OTHER, RECORDED)]
    assert margins == [FORMULA_MARGIN] * 2


def test_it_is_said_once_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    note_other_tensorflow.cache_clear()
    for version in (OTHER, RECORDED, OTHER):
        note_other_tensorflow(version)
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert RECORDED in line
    assert OTHER in line
