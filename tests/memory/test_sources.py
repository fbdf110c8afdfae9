"""The hash of the sources that decide what a step allocates: of code, not of prose."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertbench.memory.traces.build.sources import (
    ROOTS,
    source_files,
    sources_hash,
    syntax_text,
)

CODE = """
'''A module.'''
import os
RATE = 0.5
'''A rate.'''

def scaled(value: float) -> float:
    '''Scale.'''
    return RATE * value  # half
"""


def test_prose_and_layout_do_not_count() -> None:
    rewritten = (
        CODE.replace("A module", "Another").replace("A rate", "B").replace("# half", "# 1/2")
    )
    rewritten = rewritten.replace("Scale.", "Multiply.").replace("RATE * value", "(RATE  *  value)")
    assert rewritten != CODE
    assert syntax_text(rewritten) == syntax_text(CODE)


@pytest.mark.parametrize(
    ("before", "after"),
    [("0.5", "0.25"), ("RATE * value", "value * RATE"), ("import os\n", ""), ("float)", "int)")],
)
def test_code_counts(before: str, after: str) -> None:
    assert before in CODE
    assert syntax_text(CODE.replace(before, after)) != syntax_text(CODE)


def test_texts_that_are_values_count() -> None:
    assert syntax_text("NAME = 'a'") != syntax_text("NAME = 'b'")
    assert syntax_text("print('a')") != syntax_text("print('b')")


def test_imported_modules_of_the_step_count(tmp_path: Path) -> None:
    """Also where the step is cut into more modules; but not what is outside of some folders."""
    files = dict.fromkeys(ROOTS, "") | {
        "finetune/train/step.py": "from finetune.train import loss_scaling\nimport finetune.errors",
        "finetune/train/loss_scaling.py": "from finetune.model import layers",
        "finetune/model/layers.py": "WIDTH = 1",
        "finetune/model/unused.py": "",
        "finetune/errors.py": "",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = source_files(tmp_path)
    assert set(found) == {*ROOTS, "finetune/train/loss_scaling.py", "finetune/model/layers.py"}
    before = sources_hash(tmp_path)
    (tmp_path / "finetune/model/unused.py").write_text("WIDTH = 2")
    (tmp_path / "finetune/errors.py").write_text("CODE = 2")
    assert sources_hash(tmp_path) == before
    (tmp_path / "finetune/model/layers.py").write_text("WIDTH = 2")
    assert sources_hash(tmp_path) != before


def test_the_model_and_the_step_are_among_the_sources() -> None:
    found = set(source_files())
    assert {"finetune/model/modeling.py", "finetune/spec/checkpointing.py", *ROOTS} <= found
