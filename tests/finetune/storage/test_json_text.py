"""Tests of finetune.storage.json_files.json_text: what is written is JSON to every reader."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.storage.json_files import json_text
from helpers.paths import REPOSITORY

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)


def refuse(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


@given(VALUES)
def test_numbers_that_are_not_finite_are_null(values: Any) -> None:
    def expected(value: Any) -> Any:
        if isinstance(value, float) and not abs(value) < float("inf"):
            return None
        if isinstance(value, dict):
            return {key: expected(inner) for key, inner in value.items()}
        return [expected(inner) for inner in value] if isinstance(value, list) else value

    assert json.loads(json_text(values), parse_constant=refuse) == expected(values)


def test_style_is_that_of_json_dumps() -> None:
    values = {"b": (1.5, float("nan")), "a": {"c": True}}
    plain = {"b": [1.5, None], "a": {"c": True}}
    for style in ({}, {"indent": 1}, {"sort_keys": True}, {"separators": (",", ":")}):
        assert json_text(values, **style) == json.dumps(plain, **style)


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError):
        json_text({"a": object()})


@pytest.mark.parametrize("package", ["bertbench", "finetune", "reports", "benchmarks"])
def test_nothing_else_writes_json(package: str) -> None:
    """A writer of its own would write NaN, which is not JSON."""
    writers = []
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps", "JSONEncoder"):
                if isinstance(node.value, ast.Name) and node.value.id == "json":
                    writers.append(str(path.relative_to(REPOSITORY)))
            elif isinstance(node, ast.ImportFrom) and node.module == "json":
                writers.append(str(path.relative_to(REPOSITORY)))
    assert set(writers) <= {"finetune/storage/json_files.py"}
