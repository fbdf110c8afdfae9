"""Predicted footprints: arithmetic, monotony, and peaks that were measured."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.memory.footprint import Footprint, inference_bytes, predict_footprint
from bertbench.memory.formula_prediction import FormulaPrediction
from bertbench.memory.prediction import (
    FORMULA_MARGIN,
    inference_batch,
    min_budget_bytes,
    predict_memory,
)
from bertbench.memory.room import Room
from finetune.spec.checkpointing import parse_checkpointing

# Peaks of the CPU allocator, 2026-11-25, TensorFlow 2.21: model, head, sequence length, policy,
# accumulation steps, micro-batch, megabytes.
MEASURED = [
    ("bert-mini", "squad", 128, "none", 1, 2, 197),
    ("bert-mini", "squad", 128, "full", 2, 32, 316),
    ("bert-mini", "classifier", 128, "full", 1, 64, 411),
    ("bert-mini", "squad", 128, "selective", 1, 32, 336),
    ("bert-mini", "squad", 128, "none", 2, 16, 362),
    ("bert-small", "squad", 256, "full", 2, 8, 608),
    ("bert-small", "squad", 128, "none", 1, 16, 703),
    ("bert-small", "squad", 64, "none", 4, 16, 628),
    ("bert-small", "squad", 384, "nested", 2, 16, 601),
    ("bert-medium", "squad", 128, "full", 1, 16, 736),
    ("bert-medium", "squad", 256, "none", 2, 4, 1051),
    ("bert-medium", "classifier", 128, "none", 1, 8, 836),
    ("bert-tiny", "squad", 512, "full", 1, 16, 203),
    ("bert-base", "squad", 384, "full", 1, 8, 1981),
    ("bert-base", "squad", 384, "none", 1, 8, 4061),
    ("bert-base", "squad", 384, "selective", 1, 8, 2577),
    ("bert-base", "squad", 384, "nested", 1, 8, 1826),
    ("bert-base", "squad", 384, "nested", 2, 8, 1996),
]


def predict(workload: Workload, policy: str, micro_batch: int, accumulation: int = 1) -> Footprint:
    levers = Levers(parse_checkpointing(policy), accumulation_steps=accumulation)
    return predict_footprint(Setup(workload, levers).step(micro_batch))


@pytest.mark.parametrize("head", ["squad", "classifier"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_state_takes_sixteen_bytes_a_trained_parameter(head: str, accumulation: int) -> None:
    workload = published_workload("bert-base", 128, head)
    counts = {name: math.prod(shape) for name, shape in workload.parameters.items()}
    trained = sum(count for name, count in counts.items() if workload.trained(name))
    footprint = predict(workload, "full", 1, accumulation)
    parts = footprint.parts
    # The allocator rounds each of 200 variables up to 256 bytes.
    assert parts["weights"] == pytest.approx(4 * sum(counts.values()), abs=200 * 256)
    assert parts["optimizer_state"] == pytest.approx(8 * trained, abs=2 * 200 * 256)
    # Accumulators exist while activations do; gradients come to life as activations go.
    phase, held = ("backward", "accumulators") if accumulation > 1 else ("update", "gradients")
    assert footprint.phase.startswith(phase)
    assert parts[held] == pytest.approx(4 * trained, abs=200 * 256)


def test_a_layer_keeps_what_its_gradient_reads() -> None:
    # A batch so large that rounding and states are nothing beside activations.
    workload = published_workload("bert-base", 128, "squad")
    b, s, h, a, f = 1024, 128, 768, 12, 3072
    kept = 4 * b * s * (8 * h + 2 * f) + 2 * b * s * h + 4 * b * a * s * s
    footprint = predict(workload, "none", b)
    assert footprint.phase == "backward of layer 11"
    assert footprint.parts["saved_activations"] == 12 * kept
    recomputed = predict(workload, "full:8", b)
    assert recomputed.parts["saved_activations"] == 8 * 4 * b * s * h + 4 * kept
    # All layers checkpointed: the first layer is differentiated while all other gradients exist.
    whole = predict(workload, "full", b)
    assert whole.parts["layer_working_set"] > kept


@given(
    st.sampled_from(["bert-tiny", "bert-medium", "bert-large"]),
    st.sampled_from(["none", "full", "full:1", "selective", "nested:3+selective"]),
    st.sampled_from([1, 3]),
    st.sampled_from([64, 200, 512]),
    st.integers(1, 300),
)
def test_more_examples_never_take_less(
    model: str, policy: str, accumulation: int, seq_len: int, micro_batch: int
) -> None:
    workload = published_workload(model, seq_len)
    one, more = (predict(workload, policy, n, accumulation) for n in (micro_batch, micro_batch + 1))
    assert one.peak_bytes <= more.peak_bytes
    assert one.peak_bytes == sum(one.parts.values())
    assert all(type(size) is int and size >= 0 for size in one.parts.values())


def test_checkpointing_more_layers_takes_less() -> None:
    workload = published_workload("bert-large", 384)
    policies = ("nested", "full", "nested:18+selective", "selective", "full:6", "none")
    peaks = [predict(workload, policy, 32).peak_bytes for policy in policies]
    assert peaks == sorted(peaks)
    assert 3 * peaks[0] < peaks[-1]


@pytest.mark.parametrize("policy", ["none", "nested"])
def test_max_micro_batch_is_the_last_that_fits(policy: str) -> None:
    workload = published_workload("bert-base", 384)
    setup = Setup(workload, Levers(parse_checkpointing(policy)))

    def max_micro_batch(budget_bytes: int) -> int:
        return FormulaPrediction(setup, Room("cpu", budget_bytes)).max_micro_batch()

    budget_bytes = 12 << 30
    largest = max_micro_batch(budget_bytes)
    assert predict(workload, policy, largest).peak_bytes <= budget_bytes
    assert predict(workload, policy, largest + 1).peak_bytes > budget_bytes
    exact = predict(workload, policy, 5).peak_bytes
    assert max_micro_batch(exact) >= 5
    assert max_micro_batch(1 << 30) == 0


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: "-".join(map(str, case[:6])))
def test_close_to_measured_peaks(case: tuple[str, str, int, str, int, int, int]) -> None:
    model, head, seq_len, policy, accumulation, micro_batch, megabytes = case
    workload = published_workload(model, seq_len, head)
    predicted = predict(workload, policy, micro_batch, accumulation).peak_bytes
    assert predicted == pytest.approx(1e6 * megabytes, rel=0.07)
    assert predicted * (1 + FORMULA_MARGIN) >= 1e6 * megabytes


def test_a_micro_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="below 1"):
        predict(published_workload("bert-tiny", 64), "none", 0)


@pytest.mark.parametrize(
    ("model", "head", "seq_len", "policy", "accumulation", "micro_batch"),
    [
        ("bert-tiny", "squad", 96, "none", 1, 8),
        ("bert-mini", "squad", 384, "full", 1, 4),
        ("bert-base", "classifier", 128, "none", 4, 1),
    ],
)
def test_the_margin_makes_up_for_the_largest_known_errors(
    model: str, head: str, seq_len: int, policy: str, accumulation: int, micro_batch: int
) -> None:
    """What a step needs by its trace, the pieces that memory is in included."""
    workload = published_workload(model, seq_len, head)
    levers = Levers(parse_checkpointing(policy), accumulation)
    needed_bytes = min_budget_bytes(Setup(workload, levers).step(micro_batch), "cpu")
    predicted_bytes = predict_footprint(Setup(workload, levers).step(micro_batch)).peak_bytes
    assert 1.14 * predicted_bytes < needed_bytes <= (1 + FORMULA_MARGIN) * predicted_bytes
    unknown = Setup(workload, dataclasses.replace(levers, precision="bf16"))
    predicted = predict_memory(unknown, Room("cpu", needed_bytes))
    assert predicted.margin == FORMULA_MARGIN
    assert predicted.usable_bytes == int(needed_bytes / (1 + FORMULA_MARGIN))


def test_a_prediction_takes_no_more_examples_than_fit() -> None:
    """With `nested` a micro-batch of 500 fits where the attention of 500 examples does not."""
    workload = published_workload("bert-mini", 512)
    levers = Levers(parse_checkpointing("nested"))
    budget_bytes = min_budget_bytes(Setup(workload, levers).step(128), "cpu")
    found = inference_batch(Setup(workload, levers), budget_bytes, 128)
    assert 1 < found < 128
    assert inference_bytes(Setup(workload, levers), found) < budget_bytes
    assert inference_bytes(Setup(workload, levers), 128) > budget_bytes / (1 + FORMULA_MARGIN)
    assert inference_batch(Setup(workload, levers), budget_bytes, 5) == 5
    assert inference_batch(Setup(workload, levers), 1, 8) == 1
