"""The pages say what is there: the list of modules, links, paths, and the README's test command."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from helpers.paths import REPOSITORY
from helpers.source_tree import SourceTree, write_source_tree
from helpers.wings import ROWS

README = REPOSITORY / "README.md"
MAX_README_LINES = 120
PAGES = sorted([*REPOSITORY.glob("*.md"), *(p for p in (REPOSITORY / "docs").rglob("*.md"))])
_FOLDER = re.compile(r"^### ([\w/]+)$", re.MULTILINE)
_MODULE = re.compile(r"^- `(\w+\.py)`: \S.*$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]+")
_PATH = re.compile(r"(?<![\w./-])(?:bertbench|finetune|reports|tests|benchmarks|docs)/[\w./-]*\w")


def listed_modules(page: str) -> list[str]:
    """Return the modules that the page lists under headings of folders."""
    parts = _FOLDER.split(page)
    return [
        f"{folder}/{name}"
        for folder, text in zip(parts[1::2], parts[2::2], strict=True)
        for name in _MODULE.findall(text)
    ]


def wrong_list(page: str, source: SourceTree) -> list[str]:
    """Name the modules that are missing in the list, not there, or listed twice."""
    listed = listed_modules(page)
    there = {
        module.path.relative_to(source.root).as_posix()
        for module in source.modules.values()
        if not module.is_package
    }
    return sorted(
        [f"{path} is not listed" for path in there - set(listed)]
        + [f"{path} is not there" for path in set(listed) - there]
        + [f"{path} is listed twice" for path in set(listed) if listed.count(path) > 1]
    )


def broken_links(page: Path) -> list[str]:
    """Name the links to files and headings that are not there; other sites are not asked."""
    broken = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        if "://" in link:
            continue
        if not target.exists() or (heading and heading not in _anchors(target)):
            broken.append(link)
    return broken


def missing_paths(page: Path, root: Path) -> list[str]:
    """Name the paths of the repository that a page writes and that are not there."""
    text = _LINK.sub("", page.read_text(encoding="utf-8"))
    return [path for path in _PATH.findall(text) if not (root / path).exists()]


def unknown_flags(page: Path, programs: Iterable[Path]) -> list[str]:
    """Name the flags on a page that no program has; dashes and underscores are alike."""
    known = {
        flag.replace("_", "-")
        for program in programs
        for flag in _FLAG.findall(program.read_text(encoding="utf-8"))
    }
    flags = sorted(set(_FLAG.findall(page.read_text(encoding="utf-8"))))
    return [flag for flag in flags if flag.replace("_", "-") not in known]


def _anchors(page: Path) -> Iterable[str]:
    """Return the anchors that a page's headings have on GitHub."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_architecture_lists_every_module(repository: SourceTree) -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert wrong_list(page, repository) == []


def test_the_picture_of_the_wings_is_that_of_the_rules() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.split("```")[1]
    rows = [
        re.findall(r"(?:bertbench|finetune)\.\w+|reports(?= )", line)
        for line in picture.splitlines()
    ]
    # The packages themselves, `bertbench` and `finetune`, are no wings.
    wings = [[wing for wing in row if "." in wing or wing == "reports"] for row in ROWS[1:]]
    assert [row for row in rows if row] == [row for row in wings if row]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_a_page_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []
    assert missing_paths(page, REPOSITORY) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_on_a_page_are_flags_of_a_program(page: Path) -> None:
    programs = [*REPOSITORY.glob("bertbench/cli/**/*.py"), *REPOSITORY.glob("benchmarks/**/*.py")]
    assert unknown_flags(page, programs) == []


def test_the_readme_ends_by_its_second_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_the_readmes_test_command_lints_and_checks_types_too() -> None:
    # As `.ci/run` finds it.
    (command,) = re.findall(r"^\$ (pip install .*\[test\].*)$", README.read_text(), re.MULTILINE)
    assert command.split(" && ")[1:] == ["ruff check .", "ruff format --check .", "mypy", "pytest"]


def test_a_wrong_list_of_modules_is_found(tmp_path: Path) -> None:
    source = write_source_tree(
        tmp_path, {"reports/page.py": "", "reports/text.py": "", "reports/pictures/page.py": ""}
    )
    page = """
### reports

- `page.py`: the page.
- `page.py`: again.
- `cells.py`: cells.
- `text.py`:

### reports/pictures

- `page.py`: another one.
"""
    assert wrong_list(page, source) == [
        "reports/cells.py is not there",
        "reports/page.py is listed twice",
        "reports/text.py is not listed",
    ]


def test_broken_links_and_missing_paths_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "plan.md").write_text("# The `plan`: what it is\n")
    page = tmp_path / "README.md"
    page.write_text(
        "[a](docs/plan.md) [b](docs/plan.md#the-plan-what-it-is) [c](https://example.org/x)\n"
        "[d](docs/plan.md#gone) [e](docs/gone.md) [f](#here)\n# Here\n"
        "`docs/plan.md`, `docs/more.md`, bertbench/core and your/docs/x.\n"
    )
    assert broken_links(page) == ["docs/plan.md#gone", "docs/gone.md"]
    assert missing_paths(page, tmp_path) == ["docs/more.md", "bertbench/core"]


def test_unknown_flags_are_found(tmp_path: Path) -> None:
    program, page = tmp_path / "plan.py", tmp_path / "plan.md"
    program.write_text('option("--target-batch")\noption("--gpu")\n')
    page.write_text("`--target_batch 32`, `--gpus all`, --gpu=x, a--b and `bertbench --target`")
    assert unknown_flags(page, [program]) == ["--gpus", "--target"]
