"""The folders of tests are those of the wings, so that a module's tests are found at once."""

from __future__ import annotations

from pathlib import Path

from helpers.paths import REPOSITORY
from helpers.wings import ROWS

# What is tested in them is no wing: the house itself, programs, and damage done to all of it.
OTHERS = ("architecture", "benchmarks", "faults", "lib/helpers")


def folders_without_a_wing(tests: Path) -> list[str]:
    """Name the folders of tests that mirror no wing and are none of the others."""
    wings = {wing.removeprefix("bertbench.").replace(".", "/") for row in ROWS for wing in row}
    holding = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("*.py")}
    return sorted(holding - wings - {*OTHERS, "."})


def test_folders_of_tests_mirror_the_wings() -> None:
    assert folders_without_a_wing(REPOSITORY / "tests") == []


def test_a_folder_that_mirrors_nothing_is_found(tmp_path: Path) -> None:
    for folder in (
        "planning",
        "finetune/model",
        "reports",
        "lib/helpers",
        "plans",
        "finetune/deep",
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "test_a.py").touch()
    assert folders_without_a_wing(tmp_path) == ["finetune/deep", "plans"]
