"""The one reader of JSON from files: what it refuses, and what it passes over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.storage.files import read_bytes
from finetune.storage.json_files import (
    MAX_WHOLE,
    build,
    load_json,
    load_json_lines,
    load_object,
    parse_json,
)
from finetune.train import training_loop
from finetune.train.evaluation import read_eval_log, truncate_eval_log
from finetune.train.training_loop import StepRecord, read_log

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[" * 300 + "]" * 300, "nested too deeply"),
        ("1" + "0" * 400, "beyond 64 bits"),
        ("-" + "9" * 5000, "beyond 64 bits"),
        (str(MAX_WHOLE + 1), "beyond 64 bits"),
        ("[1e400]", "too large"),
        ("[NaN]", "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ("", "Expecting value"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_json(path)
    assert str(path) in str(caught.value)


def test_numbers_without_bounds_where_they_may_be(tmp_path: Path) -> None:
    assert parse_json("[NaN, 1e400]", finite=False)[1] == float("inf")
    assert parse_json(f"[{MAX_WHOLE}, -{MAX_WHOLE}]") == [MAX_WHOLE, -MAX_WHOLE]
    assert parse_json("1" + "0" * 30, large_integers="float") == 1e30
    assert parse_json(str(2**64), large_integers="keep") == 2**64
    with pytest.raises(ValueError, match="more than 1,000 digits"):
        parse_json("9" * 5000, large_integers="keep")
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_object(path, what="it") == {"a": 1}
    path.write_bytes(b'{"a":\n "\xff"}')
    with pytest.raises(InputError, match=r"a\.json:2: not UTF-8 text"):
        load_object(path, what="it")


@given(JSON_VALUES)
def test_json_is_what_python_reads_or_is_refused(value: Any) -> None:
    text = json.dumps(value)
    try:
        # Compared as text: NaN is not equal to itself.
        assert json.dumps(parse_json(text, finite=False)) == text
    except ValueError as error:
        assert "beyond 64 bits" in str(error)  # noqa: PT017


@given(st.text())
def test_any_text_is_read_or_refused_with_a_value_error(text: str) -> None:
    try:
        parse_json(text)
    except ValueError:
        return
    json.loads(text)


def test_files_that_never_end_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="larger than 3,000 bytes"):
        read_bytes("/dev/zero", limit_bytes=3000)
    path = tmp_path / "exact"
    path.write_bytes(b"x" * 3000)
    assert len(read_bytes(path, limit_bytes=3000)) == 3000


def line(step: int) -> bytes:
    values = dataclasses.asdict(StepRecord(step, 1.5, 0.1, 2.0, 0.01))
    return json.dumps(values).encode() + b"\n"


@pytest.mark.parametrize(
    "damage",
    [b"\n", b"{\n", b"\xff\xfe\n", b"[1]\n", b'{"step": "2"}\n', b"[" * 5000 + b"\n",
     b'{"step": 1' + b"0" * 5000 + b"}\n", line(2).replace(b"1.5", b'"high"')],
)  # fmt: skip
def test_a_damaged_line_costs_just_that_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "train_log.jsonl"
    path.write_bytes(line(1) + damage + line(3) + line(4)[:-9])
    assert [record.step for record in read_log(path)] == [1, 3]


def test_damaged_lines_are_counted_and_one_cut_short_is_none(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\n\xff\n{\n{"a": 2}\n{"a": 3')
    lines = load_json_lines(path)
    assert lines.values == ({"a": 1}, {"a": 2})
    assert lines.damaged == 2
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert load_json_lines(path).values == ({"a": 1}, {"a": 2})


@dataclasses.dataclass(frozen=True)
class Example:
    count: int
    share: float = 0.5
    kind: Literal["a", "b"] = "a"
    name: str | None = None
    sure: bool = False


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "no 'count'"),
        ({"count": True}, "'count'"),
        ({"count": 1.0}, "'count'"),
        ({"count": "1"}, "'count'"),
        ({"count": 2**63}, "'count'"),
        ({"count": 1, "share": None}, "'share'"),
        ({"count": 1, "kind": "c"}, "'kind'"),
        ({"count": 1, "kind": ["a"]}, "'kind'"),
        ({"count": 1, "name": 3}, "'name'"),
        ({"count": 1, "sure": 1}, "'sure'"),
        ([1], "a list instead of an object"),
    ],
)
def test_fields_of_another_type_are_refused(values: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(Example, values)


def test_fields_are_taken_and_unknown_ones_left_out() -> None:
    values = {"count": 1, "share": 2, "kind": "b", "name": None, "sure": True, "more": {}}
    assert build(Example, values) == Example(1, 2, "b", None, True)


def test_resuming_says_how_many_lines_it_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_loop, "restore_state", lambda *arguments: 4)
    log, evaluations = tmp_path / training_loop.LOG_NAME, tmp_path / "eval_log.jsonl"
    log.write_bytes(line(1) + b"\xff\n" + line(3) + b"{}\n" + line(4) + line(5))
    evaluations.write_text('{"step": 2, "f1": 1.5}\n[\n{"step": 4, "f1": null}\n')
    assert training_loop.resume(SimpleNamespace(variables={}, state=None), tmp_path) == 4
    assert [record.step for record in read_log(log)] == [1, 3, 4]
    assert log.read_bytes() == line(1) + line(3) + line(4)
    assert [record.step for record in read_eval_log(tmp_path)] == [2, 4]
    assert [record.message for record in caplog.records] == [
        f"{log}: passed over 2 damaged lines",
        f"{evaluations}: passed over a damaged line",
    ]


def test_damaged_lines_of_evaluations_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "eval_log.jsonl").write_text("x\n")
    truncate_eval_log(tmp_path, 2)
    assert "eval_log.jsonl: passed over a damaged line" in caplog.text
    caplog.clear()
    truncate_eval_log(tmp_path, 2)
    assert caplog.text == ""
