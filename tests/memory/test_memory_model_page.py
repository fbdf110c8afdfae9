"""The worked example of the page about the memory model is what its program prints."""

from __future__ import annotations

import contextlib
import io
import re

from helpers.paths import REPOSITORY


def test_the_worked_example_is_what_its_program_prints() -> None:
    page = (REPOSITORY / "docs" / "memory-model.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert found is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(found[1], {})
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    assert lines == found[2].splitlines()
