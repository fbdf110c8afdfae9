"""Folders, functions and parameter lists stay small enough to be read at one sitting."""

from __future__ import annotations

import ast
import collections
from collections.abc import Iterator, Mapping
from pathlib import Path

from helpers.source_tree import SourceTree, write_source_tree

MAX_MODULES = 12
MAX_LINES = 80
MAX_PARAMETERS = 7


def module_counts(source: SourceTree) -> dict[str, int]:
    """Count the modules of each folder, without its `__init__.py` and its folders."""
    folders = (module.path.parent for module in source.modules.values() if not module.is_package)
    return {
        str(folder.relative_to(source.root)): count
        for folder, count in collections.Counter(folders).items()
    }


def function_lines(source: SourceTree) -> dict[str, int]:
    """Count the lines of each function from `def` to its end: options above it are not counted."""
    return {
        name: (node.end_lineno or node.lineno) - node.lineno + 1
        for name, node in _functions(source)
    }


def parameter_counts(source: SourceTree) -> dict[str, int]:
    """Count the parameters of each function but `self` and `cls`.

    A verb of the command line takes all its flags, so functions in `bertbench.cli` are left out.
    """
    counts = {}
    for name, node in _functions(source):
        taken = node.args
        named = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg]
        if not name.startswith("bertbench.cli."):
            counts[name] = sum(a is not None and a.arg not in ("self", "cls") for a in named)
    return counts


def above(limit: int, counts: Mapping[str, int], exceptions: Mapping[str, int]) -> list[str]:
    """Name what is above the limit and its exception, and exceptions that are not needed."""
    return [
        f"{name}: {count}, at most {exceptions.get(name, limit)}"
        for name, count in counts.items()
        if count > exceptions.get(name, limit)
    ] + [f"{name} needs no exception" for name in exceptions if counts.get(name, 0) <= limit]


def _functions(source: SourceTree) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module in source.modules.values():
        yield from _functions_in(module.tree, module.name)


def _functions_in(
    node: ast.AST, name: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{name}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield inner, child
            yield from _functions_in(child, inner)
        else:
            yield from _functions_in(child, name)


def test_a_folder_holds_few_modules(repository: SourceTree) -> None:
    assert above(MAX_MODULES, module_counts(repository), {}) == []


def test_functions_are_short(repository: SourceTree) -> None:
    lines = function_lines(repository)
    assert above(MAX_LINES, lines, {}) == []


def test_functions_take_few_parameters(repository: SourceTree) -> None:
    counts = parameter_counts(repository)
    assert above(MAX_PARAMETERS, counts, {}) == []


def test_modules_are_counted_by_folder(tmp_path: Path) -> None:
    files = {f"reports/pictures/a{number}.py": "" for number in range(3)}
    source = write_source_tree(tmp_path, {**files, "reports/page.py": ""})
    assert module_counts(source) == {"reports": 1, "reports/pictures": 3}


def test_lines_of_functions_are_counted_without_decorators(tmp_path: Path) -> None:
    text = '''
class C:
    @option(
        "--a",
    )
    def method(self):
        """Long."""
        async def inner():
            return 1

        return inner
if True:
    def one(): ...
'''
    source = write_source_tree(tmp_path, {"reports/page.py": text})
    assert function_lines(source) == {
        "reports.page.C.method": 6,
        "reports.page.C.method.inner": 2,
        "reports.page.one": 1,
    }


def test_parameters_of_all_kinds_are_counted(tmp_path: Path) -> None:
    text = "class C:\n    def f(self, a, /, b, *c, d=1, **e): ...\n    def g(self): ..."
    source = write_source_tree(tmp_path, {"reports/page.py": text, "bertbench/cli/run.py": text})
    assert parameter_counts(source) == {"reports.page.C.f": 5, "reports.page.C.g": 0}


def test_an_exception_may_not_grow_and_must_be_needed() -> None:
    counts = {"a": 80, "b": 81, "c": 99, "d": 100, "e": 80}
    exceptions = {"c": 99, "d": 99, "e": 90, "gone": 90}
    assert above(80, counts, exceptions) == [
        "b: 81, at most 80",
        "d: 100, at most 99",
        "e needs no exception",
        "gone needs no exception",
    ]
