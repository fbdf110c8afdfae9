"""Imports run in one direction, without circles, and load TensorFlow only where it is used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pytest

from helpers.source_tree import Import, SourceTree, write_source_tree
from helpers.wings import ROWS

# These load TensorFlow when they are imported; importing anything else must not load it.
LOADS_TENSORFLOW = (
    "bertbench.memory.allocator.profiler",
    "bertbench.running.listeners",
    "bertbench.running.train",
    "bertbench.trials.worker",
    "finetune.export.export_weights",
    "finetune.export.saved_model",
    "finetune.model",
    "finetune.train",
)
# These load TensorFlow when one of their functions is called.
LOADS_TENSORFLOW_LATER = (
    "bertbench.cli.export",
    "bertbench.compiling.worker",
    "bertbench.hardware.tpu",
    "bertbench.memory.allocator.budget",
    "bertbench.memory.allocator.tensorflow_setup",
    "bertbench.running.bind_device",
    "bertbench.running.job",
    "bertbench.running.model",
    "bertbench.running.output.cloud_storage",
    "bertbench.running.predict",
    "finetune.spec.precisions",
)


def wrong_directions(source: SourceTree, rows: Sequence[Sequence[str]]) -> list[str]:
    """Name the imports of a wing in the same row or above, and modules of no wing."""
    row_of = {wing: row for row, wings in enumerate(rows) for wing in wings}
    wings = {module: _longest_prefix(module, row_of) for module in source.modules}
    wrong = [f"{module} is in no row" for module, wing in wings.items() if wing is None]
    for module, imports in source.imports.items():
        wing = wings[module]
        for found in imports:
            imported = wings.get(found.module)
            if wing is None or imported is None or imported == wing:
                continue
            if row_of[imported] <= row_of[wing]:
                wrong.append(f"{source.location(module, found.line)} imports {found.module}")
    return wrong


def circles(source: SourceTree) -> list[str]:
    """Name one circle of imports for each module that can reach itself."""
    below = {
        module: {found.module for found in imports if found.when != "string"} & set(source.modules)
        for module, imports in source.imports.items()
    }
    found: dict[frozenset[str], str] = {}
    for module in below:
        path = _shortest_path(below, below[module], module)
        if path:
            found.setdefault(frozenset(path), " > ".join([module, *path]))
    return list(found.values())


def loading_tensorflow(source: SourceTree) -> set[str]:
    """Return the modules that load TensorFlow when they are imported."""
    at_start = {
        module: _with_parents(module, (found for found in imports if found.when == "start"))
        for module, imports in source.imports.items()
    }
    loading = {module for module, names in at_start.items() if "tensorflow" in names}
    while True:
        more = {module for module, names in at_start.items() if names & loading} - loading
        if not more:
            return loading
        loading |= more


def loading_tensorflow_later(source: SourceTree) -> set[str]:
    """Return the modules that load TensorFlow in a function, and not when they are imported."""
    loading = loading_tensorflow(source)
    return {
        module
        for module, imports in source.imports.items()
        if module not in loading
        and _with_parents(module, (found for found in imports if found.when == "later"))
        & {*loading, "tensorflow"}
    }


def differences(modules: Collection[str], table: Collection[str]) -> list[str]:
    """Compare modules with a table that names each or a package around it."""
    covered = {module: _longest_prefix(module, table) for module in modules}
    unexpected = sorted(module for module, name in covered.items() if name is None)
    stale = sorted(set(table) - set(covered.values()))
    return [f"{name} is not in the table" for name in unexpected] + [
        f"{name} is in the table for nothing" for name in stale
    ]


def _longest_prefix(module: str, names: Collection[str]) -> str | None:
    parts = module.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    # A package that holds wings, such as `bertbench`, stands for itself alone.
    holders = {name.rpartition(".")[0] for name in names}
    return next((p for p in prefixes if p in names and (p == module or p not in holders)), None)


def _with_parents(module: str, imports: Iterable[Import]) -> set[str]:
    """Return the modules that are loaded: those named and all packages around them."""
    names = [module.rpartition(".")[0], *(found.module for found in imports)]
    split = [name.split(".") for name in names]
    return {".".join(parts[:count]) for parts in split for count in range(1, len(parts) + 1)}


def _shortest_path(below: dict[str, set[str]], starts: Iterable[str], goal: str) -> list[str]:
    paths = {start: [start] for start in sorted(starts)}
    waiting = list(paths)
    for module in waiting:
        if module == goal:
            return paths[module]
        for other in sorted(below[module] - set(paths)):
            paths[other] = [*paths[module], other]
            waiting.append(other)
    return []


def test_imports_run_in_one_direction(repository: SourceTree) -> None:
    assert wrong_directions(repository, ROWS) == []


def test_no_modules_import_each_other_in_a_circle(repository: SourceTree) -> None:
    assert circles(repository) == []


def test_tensorflow_is_loaded_where_the_table_says(repository: SourceTree) -> None:
    assert differences(loading_tensorflow(repository), LOADS_TENSORFLOW) == []


def test_tensorflow_is_loaded_later_where_the_table_says(repository: SourceTree) -> None:
    assert differences(loading_tensorflow_later(repository), LOADS_TENSORFLOW_LATER) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import bertbench.planning.planner",
        "from bertbench.planning import planner",
        "from bertbench.planning.planner import make_plan",
        "from ..planning.planner import make_plan",
        "def f():\n    from bertbench.planning import planner",
        "class C:\n    async def f(self):\n        import bertbench.planning.planner",
        "if TYPE_CHECKING:\n    from bertbench.planning.planner import make_plan",
        "TARGET = 'bertbench.planning.planner:make_plan'",
    ],
)
@pytest.mark.parametrize("wing", ["probing", "trials"])
def test_an_import_of_the_same_row_or_a_higher_one_is_found(
    tmp_path: Path, wing: str, statement: str
) -> None:
    source = write_source_tree(
        tmp_path, {"bertbench/planning/planner.py": "", f"bertbench/{wing}/a.py": statement}
    )
    (found,) = wrong_directions(source, ROWS)
    line = statement.count("\n") + 1
    assert found.startswith(f"bertbench/{wing}/a.py:{line} imports bertbench.planning.planner")


def test_finetune_imports_no_bertbench_and_reports_no_command_line(tmp_path: Path) -> None:
    source = write_source_tree(
        tmp_path,
        {
            "bertbench/core/units.py": "",
            "bertbench/cli/plan.py": "import reports.page",
            "finetune/spec/config.py": "import bertbench.core.units",
            "reports/page.py": "import finetune.spec.config\nimport bertbench.cli.plan",
        },
    )
    assert sorted(wrong_directions(source, ROWS)) == [
        "finetune/spec/config.py:1 imports bertbench.core.units",
        "reports/page.py:2 imports bertbench.cli.plan",
    ]


def test_a_module_of_no_wing_is_found(tmp_path: Path) -> None:
    source = write_source_tree(tmp_path, {"bertbench/new/a.py": "", "bertbench/b.py": ""})
    assert sorted(wrong_directions(source, ROWS)) == [
        "bertbench.b is in no row",
        "bertbench.new is in no row",
        "bertbench.new.a is in no row",
    ]


def test_a_circle_is_found_once(tmp_path: Path) -> None:
    source = write_source_tree(
        tmp_path,
        {
            "reports/a.py": "import reports.b",
            "reports/b.py": "def f():\n    from reports import c",
            "reports/c.py": "if TYPE_CHECKING:\n    import reports.a",
            "reports/d.py": "import reports.a",
        },
    )
    assert circles(source) == ["reports.a > reports.b > reports.c > reports.a"]


def test_a_path_to_tensorflow_is_found_also_through_packages(tmp_path: Path) -> None:
    source = write_source_tree(
        tmp_path,
        {
            "finetune/model/layers.py": "import numpy, tensorflow as tf",
            "finetune/spec/config.py": "from finetune.model import layers",
            "finetune/spec/later.py": "def f():\n    import finetune.spec.config",
            "finetune/spec/types.py": "if TYPE_CHECKING:\n    import tensorflow",
            "finetune/text/pieces.py": "",
            "finetune/text/__init__.py": "from tensorflow.python import pywrap",
            "reports/page.py": "import finetune.text.pieces",
        },
    )
    assert loading_tensorflow(source) == {
        "finetune.model.layers",
        "finetune.spec.config",
        "finetune.text",
        "finetune.text.pieces",
        "reports.page",
    }
    assert loading_tensorflow_later(source) == {"finetune.spec.later"}


def test_a_table_must_name_all_modules_and_no_others() -> None:
    modules = ["finetune.model.layers", "finetune.train.step"]
    assert differences(modules, ["finetune.model", "finetune.train.step"]) == []
    assert differences(modules, ["finetune.model", "finetune.text"]) == [
        "finetune.train.step is not in the table",
        "finetune.text is in the table for nothing",
    ]
