"""Recordings as text: what is written is read again, and nothing else is taken for one."""

from __future__ import annotations

import base64
import json
import zlib

import pytest

from bertbench.memory.allocator.recording import (
    Recording,
    recording_from_text,
    recording_to_text,
)

RECORDING = Recording((0, 1, ~0, 2, ~1, ~2), (300, 98, 700), ("a", "b", "c"))


def test_text_of_a_recording() -> None:
    text = recording_to_text(RECORDING)
    assert recording_from_text(text) == RECORDING
    for wrong in ("", "abc", text[:-9]):
        with pytest.raises(ValueError, match=r"recording|base85|JSON|Expecting"):
            recording_from_text(wrong)


def packed(values: object, cut: int | None = None) -> str:
    return base64.b85encode(zlib.compress(json.dumps(values).encode())[:cut]).decode()


@pytest.mark.parametrize(
    "text",
    [
        packed([[0, 1, ~1, ~1], [4, 4], [""], [0, 0]]),  # ends twice
        packed([[~0], [], [""], []]),
        packed([[1], [4], [""], [0]]),
        packed([[0], [4, 4], [""], [0, 0]]),
        packed([[0], [-4], [""], [0]]),
        packed([["a"], [4], [""], [0]]),
        packed([[0], [4], [""], [7]]),
        packed([[0], [4], [""], [0]], cut=-3),
        packed("text"),
        packed([1, 2, 3, 4]),
        "no base 85",
    ],
)
def test_what_no_allocator_was_asked_is_no_recording(text: str) -> None:
    with pytest.raises(ValueError, match="not a recording of allocations"):
        recording_from_text(text)


def test_a_recording_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    text = recording_to_text(Recording((0, 1, ~0), (8, 9), ("", "a")))
    assert recording_from_text(text).sizes == (8, 9)
    monkeypatch.setattr("bertbench.memory.allocator.recording._RECORDING_BYTES", 10)
    with pytest.raises(ValueError, match="too large"):
        recording_from_text(text)
