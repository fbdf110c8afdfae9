"""The source files of the repository as syntax trees: what they import and what they define.

Nothing is imported, so that the checks of the architecture need no TensorFlow and can be tried on
small trees of files that break a rule.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

PACKAGES = ("bertbench", "finetune", "reports")
DOTTED_NAME = r"(?:bertbench|finetune|reports)(?:\.[A-Za-z_]\w*)+"
# What `importlib` is given: a module, or a module and a function of it behind a colon.
_IMPORT_TARGET = re.compile(rf"({DOTTED_NAME})(?::\w+)?")
When = Literal["start", "later", "types", "string"]


@dataclasses.dataclass(frozen=True)
class Import:
    """One module that another names in an import statement or in the string of an import.

    Attributes:
        module: the dotted name of the module, or of the package outside the repository.
        line: where in the importing file.
        when: "start" when the importing module is imported, "later" inside a function, "types"
            under `if TYPE_CHECKING:`, "string" where the name is a string for `importlib`.
    """

    module: str
    line: int
    when: When


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """One source file."""

    name: str
    path: Path
    tree: ast.Module
    is_package: bool


@dataclasses.dataclass(frozen=True)
class SourceTree:
    """All modules of the three packages below one folder, by their dotted names."""

    root: Path
    modules: dict[str, Module]

    @functools.cached_property
    def imports(self) -> dict[str, tuple[Import, ...]]:
        """What each module imports, its own parent packages not counted."""
        return {name: tuple(self._imports_of(module)) for name, module in self.modules.items()}

    def location(self, module: str, line: int) -> str:
        """Return `path:line` for a message."""
        return f"{self.modules[module].path.relative_to(self.root)}:{line}"

    def _imports_of(self, module: Module) -> Iterator[Import]:
        for node, when in _with_time_of_import(module.tree, "start"):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno, when)
            elif isinstance(node, ast.ImportFrom):
                base = absolute_module(module, node)
                for alias in node.names:
                    name = f"{base}.{alias.name}"
                    yield Import(name if name in self.modules else base, node.lineno, when)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                target = _IMPORT_TARGET.fullmatch(node.value)
                if target and target[1] in self.modules:
                    yield Import(target[1], node.lineno, "string")


def read_source_tree(root: Path) -> SourceTree:
    """Parse all modules of the three packages below `root`."""
    modules = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            modules[name] = Module(name, path, tree, is_package)
    return SourceTree(root, modules)


def write_source_tree(root: Path, files: dict[str, str]) -> SourceTree:
    """Write small modules below `root`, with the packages that they need, and parse them.

    Args:
        root: an empty folder.
        files: source text by path, such as `bertbench/core/units.py`.
    """
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
    return read_source_tree(root)


def absolute_module(module: Module, node: ast.ImportFrom) -> str:
    """Return the dotted name of the module that a `from` import names, also for a relative one."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parents = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _with_time_of_import(node: ast.AST, when: When) -> Iterator[tuple[ast.AST, When]]:
    """Walk all nodes below `node`, each with the time at which an import there happens."""
    yield node, when
    children: list[tuple[ast.AST, When]]
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = [*((child, "types") for child in node.body), *((c, when) for c in node.orelse)]
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and when == "start":
        children = [(child, "later") for child in ast.iter_child_nodes(node)]
    else:
        children = [(child, when) for child in ast.iter_child_nodes(node)]
    for child, time in children:
        yield from _with_time_of_import(child, time)
