"""Dotted names in docstrings, comments, strings and pages are of modules and what is in them."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import REPOSITORY
from helpers.source_tree import (
    DOTTED_NAME,
    PACKAGES,
    Module,
    SourceTree,
    absolute_module,
    write_source_tree,
)

HERE = Path(__file__).resolve().parent
FOLDERS = ("bertbench", "finetune", "reports", "tests", "benchmarks")
# Not behind a folder, another name or an option, and not in front of a folder. A function that is
# called in another process stands behind a colon.
_NAME = re.compile(rf"(?<![\w./$-])({DOTTED_NAME}(?::[A-Za-z_]\w*)?)(?![\w/-])")
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Files and attributes that only look like modules.
_ENDINGS = frozenset(("html", "json", "log", "md", "sqlite", "toml", "zip", "csv", "parquet"))


def unresolved_names(source: SourceTree, files: list[Path]) -> list[str]:
    """Name the dotted names in text that are of nothing in the tree."""
    return [
        f"{path.relative_to(source.root)}:{line}: {name}"
        for path in files
        for line, name in _names(path)
        if name.rpartition(".")[2] not in _ENDINGS and not _resolves(source, name)
    ]


def _names(path: Path) -> Iterator[tuple[int, str]]:
    for first_line, text in _texts(path):
        for match in _NAME.finditer(text):
            yield first_line + text[: match.start()].count("\n"), match[1].replace(":", ".")


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield strings and comments of a Python file, or lines of a page, with their lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _resolves(source: SourceTree, name: str) -> bool:
    """Return whether the name is of a module, or of something that a module defines."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:  # of another distribution
        return True
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if module in source.modules:
            return _resolves_in(source, module, parts[count:])
    return False


def _resolves_in(source: SourceTree, module: str, parts: list[str]) -> bool:
    if not parts:
        return True
    found = _definitions(source.modules[module]).get(parts[0])
    if isinstance(found, str):
        return _resolves(source, ".".join([found, *parts[1:]]))
    if isinstance(found, ast.ClassDef) and len(parts) == 2:
        return _has_attribute(source, source.modules[module], found, parts[1])
    return found is not None and len(parts) == 1


@functools.cache
def _definitions(module: Module) -> dict[str, ast.AST | str]:
    """Return what a module defines by name; for what it imports, the dotted name of that."""
    found: dict[str, ast.AST | str] = {}
    for node in _statements(module.tree.body):
        if isinstance(node, _DEFINITIONS):
            found[node.name] = node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            base = absolute_module(module, node)
            found |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
        else:
            found |= dict.fromkeys(_assigned(node), node)
    return found


def _has_attribute(source: SourceTree, module: Module, found: ast.ClassDef, name: str) -> bool:
    """Return whether a class, or one that it is derived from, has a field, method or attribute."""
    members = {node.name for node in found.body if isinstance(node, _DEFINITIONS)}
    members |= {member for node in found.body for member in _assigned(node)}
    members |= {
        node.attr
        for node in ast.walk(found)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    if name in members:
        return True
    for base in map(ast.unparse, found.bases):
        derived = _definitions(module).get(base)
        if isinstance(derived, ast.ClassDef) and _has_attribute(source, module, derived, name):
            return True
        ours = isinstance(derived, str) and derived.split(".")[0] in PACKAGES
        if ours and _resolves(source, f"{derived}.{name}"):
            return True
    return False


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those in `if`, `try` and `with` too."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _statements(getattr(node, inner, []))


def _assigned(node: ast.AST) -> set[str]:
    """Return the names that a statement outside of functions binds."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For)):
        return set()
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    }


def test_every_dotted_name_is_of_something(repository: SourceTree) -> None:
    files = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    pages = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
    # The tests of the architecture name what must not be there.
    files = [path for path in files if path.parent != HERE]
    assert unresolved_names(repository, [*files, *pages]) == []


UNITS = """
from __future__ import annotations
import numpy as np
from finetune.errors import InputError as Wrong
GIB: int = 1 << 30
SMALL, LARGE = 1, 2
def show(): ...
class Size(Base):
    bytes: int
    def __init__(self):
        self.text = ""
    def half(self): ...
"""
FILES = {
    "bertbench/core/base.py": "class Root:\n    depth = 1",
    "bertbench/core/units.py": f"from bertbench.core.base import Root as Base\n{UNITS}",
    "finetune/errors.py": "class InputError(Exception):\n    path: str",
}


@pytest.mark.parametrize(
    "name",
    [
        "bertbench.core",
        "bertbench.core.units",
        "bertbench.core.units.GIB",
        "bertbench.core.units.LARGE",
        "bertbench.core.units.show",
        "bertbench.core.units.Size",
        "bertbench.core.units:show",
        "bertbench.core.units.Size.bytes",
        "bertbench.core.units.Size.text",
        "bertbench.core.units.Size.half",
        "bertbench.core.units.Size.depth",
        "bertbench.core.units.Wrong.path",
        "bertbench.core.units.np.float32",
    ],
)
def test_a_name_of_something_is_resolved(tmp_path: Path, name: str) -> None:
    source = write_source_tree(tmp_path, {**FILES, "reports/page.py": f'"""See `{name}`."""'})
    assert unresolved_names(source, [tmp_path / "reports/page.py"]) == []


@pytest.mark.parametrize(
    "text",
    [
        '"""See `{}`."""',
        "def f():\n    '''As {} does.'''",
        "x = 1  # as `{}` says",
        "patch('{}', 1)",
        "x = f'{{x}} {}'",
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "bertbench.units",
        "bertbench.core.units.MIB",
        "bertbench.core.units.show.text",
        "bertbench.core.units.Size.double",
        "bertbench.core.units.Wrong.line",
        "finetune.errors.InputError.line",
    ],
)
def test_a_name_of_nothing_is_found(tmp_path: Path, text: str, name: str) -> None:
    source = write_source_tree(tmp_path, {**FILES, "reports/page.py": text.format(name)})
    (found,) = unresolved_names(source, [tmp_path / "reports/page.py"])
    assert found.endswith(f": {name}")


def test_a_function_behind_a_colon_must_be_there(tmp_path: Path) -> None:
    text = "TARGET = 'bertbench.core.units:hide'"
    source = write_source_tree(tmp_path, {**FILES, "reports/page.py": text})
    (found,) = unresolved_names(source, [tmp_path / "reports/page.py"])
    assert found == "reports/page.py:1: bertbench.core.units.hide"


def test_a_name_of_nothing_is_found_in_a_page(tmp_path: Path) -> None:
    source = write_source_tree(tmp_path, FILES)
    page = tmp_path / "README.md"
    page.write_text("Run `bertbench.sqlite`.\nSee `bertbench.core.weights` in bertbench/core.\n")
    assert unresolved_names(source, [page]) == ["README.md:2: bertbench.core.weights"]
