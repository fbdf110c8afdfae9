"""How many modules a reader enters who follows a function to its end.

    python benchmarks/source_walk.py MODULE:FUNCTION [MODULE:FUNCTION ...] [--tree FOLDER]
        [--below PACKAGE]

The reader follows each call in the order of the source, each function once, and comes back after
it. Counted are the modules that are entered, and how often the reader comes back from one module
to another. Calls are followed where the source alone says what is called: functions by their
imported names, constructors, and methods of `self`; a method of another value if only one class
has a method of this name and the module imports from where that class is. `--below` stops at
modules of other packages.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = ("bertbench", "finetune", "reports")


@dataclasses.dataclass(frozen=True)
class Source:
    """The functions of a tree by module and name, and what the modules import.

    Attributes:
        functions: by module, then by name; methods as `Class.method`.
        imports: by module: local name to (module, name in it), or (module, "") for a module.
        methods: by name: where a method of this name is.
    """

    functions: dict[str, dict[str, ast.FunctionDef]]
    imports: dict[str, dict[str, tuple[str, str]]]
    methods: dict[str, list[tuple[str, str]]]


def read_source(tree: Path) -> Source:
    """Read all modules of the packages below a folder."""
    source = Source({}, {}, {})
    files = [path for package in _PACKAGES for path in sorted((tree / package).rglob("*.py"))]
    names = {_module_name(path.relative_to(tree)): path for path in files}
    for module, path in names.items():
        body = ast.parse(path.read_text(encoding="utf-8"))
        functions = source.functions.setdefault(module, {})
        for node in body.body:
            if isinstance(node, ast.FunctionDef):
                functions[node.name] = node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        functions[f"{node.name}.{inner.name}"] = inner
                        source.methods.setdefault(inner.name, []).append(
                            (module, f"{node.name}.{inner.name}")
                        )
        imports = source.imports.setdefault(module, {})
        for statement in ast.walk(body):
            if isinstance(statement, ast.ImportFrom) and statement.module:
                for alias in statement.names:
                    whole = f"{statement.module}.{alias.name}"
                    target = (whole, "") if whole in names else (statement.module, alias.name)
                    imports[alias.asname or alias.name] = target
    return source


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Walk:
    """A reader's way through the functions that a function calls."""

    def __init__(self, source: Source, below: tuple[str, ...]) -> None:
        self.source = source
        self.below = below
        self.read: set[tuple[str, str]] = set()
        self.modules: list[str] = []
        self.returns = 0

    def follow(self, module: str, name: str) -> None:
        """Read a function, and what it calls that was not read before."""
        self.read.add((module, name))
        if module not in self.modules:
            self.modules.append(module)
        for target in self._calls(module, name):
            if target in self.read or not target[0].startswith(self.below):
                continue
            self.follow(*target)
            self.returns += target[0] != module

    def _calls(self, module: str, name: str) -> Iterator[tuple[str, str]]:
        node = self.source.functions[module][name]
        owner = name.rpartition(".")[0]
        # What is passed on as a function is read where it is named.
        for inner in _in_order(node):
            if isinstance(inner, ast.Name):
                yield from self._named(module, inner.id)
            elif isinstance(inner, ast.Attribute):
                yield from self._attribute(module, owner, inner)

    def _named(self, module: str, name: str) -> Iterator[tuple[str, str]]:
        origin, original = self.source.imports[module].get(name, (module, name))
        functions = self.source.functions.get(origin, {})
        if original in functions:
            yield origin, original
        for constructor in ("__init__", "__post_init__"):
            if f"{original}.{constructor}" in functions:
                yield origin, f"{original}.{constructor}"

    def _attribute(self, module: str, owner: str, node: ast.Attribute) -> Iterator[tuple[str, str]]:
        if isinstance(node.value, ast.Name):
            if node.value.id == "self":
                if f"{owner}.{node.attr}" in self.source.functions[module]:
                    yield module, f"{owner}.{node.attr}"
                return
            origin, original = self.source.imports[module].get(node.value.id, ("", ""))
            if origin and not original:
                if node.attr in self.source.functions.get(origin, {}):
                    yield origin, node.attr
                return
        imported = {module, *(origin for origin, _ in self.source.imports[module].values())}
        found = self.source.methods.get(node.attr, [])
        if len(found) == 1 and found[0][0] in imported and not node.attr.startswith("__"):
            yield found[0]


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        yield from _in_order(child)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("functions", nargs="+", metavar="MODULE:FUNCTION")
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--below", nargs="+", default=["bertbench"], help="packages to follow")
    parser.add_argument("--list", action="store_true", help="show the modules too")
    arguments = parser.parse_args()
    source = read_source(arguments.tree)
    for text in arguments.functions:
        module, _, name = text.partition(":")
        if name not in source.functions.get(module, {}):
            parser.error(f"{text}: no such function below {arguments.tree}")
        walk = Walk(source, tuple(arguments.below))
        walk.follow(module, name)
        print(
            f"{text}: {len(walk.modules)} modules, {walk.returns} returns, "
            f"{len(walk.read)} functions"
        )
        if arguments.list:
            print("   ", ", ".join(walk.modules))


if __name__ == "__main__":
    main()
