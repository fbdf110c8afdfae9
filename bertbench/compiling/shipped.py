"""What compilers have said of published models on common products, shipped with the package.

The table is made by `benchmarks/ship_compiled.py` of files of `bertbench probe --gpu --json`. It
lets a plan know what a product's compiler says on a machine without that compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from bertbench.core.workload import Setup, Workload, levers_from_json, published_workload
from bertbench.memory.compiled import CompiledMemory, CompiledSteps, compiled_memory_from_json
from finetune.storage.json_files import parse_json

TABLE = "compiled_steps.json"


@functools.cache
def read_table() -> dict[str, Any]:
    """Read the table: `versions` of the software that made it, and `steps`, a list of rows.

    A row has the keys `product`, `replicas`, `model`, `seq_len`, `head`, `levers`, `micro_batch`
    and `memory`, which is null where the compiler refused the step.
    """
    text = resources.files("bertbench.compiling").joinpath(TABLE).read_text(encoding="utf-8")
    return parse_json(text)


def shipped_steps(product: str, replicas: int, workload: Workload) -> CompiledSteps:
    """Find what the table knows of a workload on a product.

    Example:
        >>> steps = shipped_steps("titan-x", 1, published_workload("bert-base", 128))

    Args:
        product: its name in the catalogue.
        replicas: devices that share the effective batch.
        workload: any; only published models are in the table.
    """
    rows = [
        row
        for row in read_table()["steps"]
        if row["product"] == product
        and row["replicas"] == replicas
        and row["seq_len"] == workload.seq_len
        and row["head"] == workload.head
    ]
    known = steps_of_rows(row for row in rows if _workload_of(row).key() == workload.key())
    # The model may have another name, as in bert-base-uncased.
    return {Setup(workload, setup.levers): memories for setup, memories in known.items()}


def steps_of_rows(rows: Iterable[Mapping[str, Any]]) -> CompiledSteps:
    """Put rows of the table together by setup and micro-batch."""
    steps: dict[Setup, dict[int, CompiledMemory | None]] = {}
    for row in rows:
        memory = row["memory"]
        setup = Setup(_workload_of(row), levers_from_json(row["levers"]))
        steps.setdefault(setup, {})[row["micro_batch"]] = (
            None if memory is None else compiled_memory_from_json(memory)
        )
    return steps


def _workload_of(row: Mapping[str, Any]) -> Workload:
    return published_workload(row["model"], row["seq_len"], row["head"])
