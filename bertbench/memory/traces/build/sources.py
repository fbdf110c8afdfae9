"""Which sources decide what a training step allocates, and a hash of them.

A change of these sources may change what a step allocates, and then the traces have to be recorded
again, or confirmed (`benchmarks/record_step_traces.py`). The hash is that of the syntax trees, so
that docstrings, comments and layout do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOTS = (
    "bertbench/memory/allocator/budget.py",
    "bertbench/memory/allocator/tensorflow_setup.py",
    "bertbench/trials/worker.py",
    "finetune/train/optimization.py",
    "finetune/train/step.py",
)
"""Modules that set TensorFlow up, make the variables and the step, and run it."""

IMPORTED = ("finetune/model/", "finetune/spec/", "finetune/train/")
"""Folders of which those modules count too that a root imports, directly or not."""

_TREE = Path(__file__).resolve().parents[4]


def source_files(tree: Path = _TREE) -> list[str]:
    """Paths of the sources that count, relative to the source tree.

    Args:
        tree: folder of the packages `bertbench` and `finetune`.
    """
    found: set[str] = set()
    left = list(ROOTS)
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            names = _imported_names(ast.parse((tree / path).read_bytes()))
            modules = {f"{name.replace('.', '/')}.py" for name in names}
            left += [one for one in modules if one.startswith(IMPORTED) and (tree / one).is_file()]
    return sorted(found)


def sources_hash(tree: Path = _TREE) -> str:
    """Hash of the sources that count; of their names too."""
    result = hashlib.sha256()
    for path in source_files(tree):
        text = syntax_text((tree / path).read_text(encoding="utf-8"))
        result.update(f"{path}\n{text}\n".encode())
    return result.hexdigest()


def syntax_text(source: str) -> str:
    """Write the syntax tree of a module as text, the same under every version of Python.

    Docstrings are left out. So are empty fields, as newer versions of Python have more of them.
    """
    return _node_text(ast.parse(source))


def _node_text(node: object) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_node_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(body, list):
        # A string that is a statement is a docstring, also after an assignment.
        fields["body"] = [one for one in body if not _is_text(one)]
    written = (
        f"{name}={_node_text(value)}" for name, value in fields.items() if value not in (None, [])
    )
    return f"{type(node).__name__}({','.join(written)})"


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _imported_names(module: ast.Module) -> Iterator[str]:
    """Names of imported modules, and of what is imported from them, which may be modules too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
