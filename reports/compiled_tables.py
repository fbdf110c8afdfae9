"""Tables of limits by compilers, which are no measurements, beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bertbench.core.published import PAPER_MODELS, PUBLISHED_MAX_BATCH
from bertbench.core.units import format_bytes
from bertbench.ledger.compiled_limits import CompiledLimit
from reports.tables import PUBLISHED, SYSTEM, Table, system_name

COMPILED_NOTE = (
    "By the compiler of each product, with XLA: nothing was run there. 31: 31 fits in the usable "
    "memory and 32 does not."
)


def compiled_tables(limits: Sequence[CompiledLimit]) -> list[Table]:
    """Make a table for each task and levers, with a column for each product."""
    groups: dict[tuple[str, str], list[CompiledLimit]] = {}
    for limit in limits:
        groups.setdefault((limit.workload.head, limit.levers.describe_fully()), []).append(limit)
    return [_table(head, levers, some) for (head, levers), some in groups.items()]


def _table(head: str, levers: str, limits: Sequence[CompiledLimit]) -> Table:
    products = {limit.target.name: _product(limit) for limit in limits}
    of_product = {(*_system(limit), limit.target.name): limit.text for limit in limits}
    systems = dict.fromkeys(map(_system, limits))
    with_published = any(model in PAPER_MODELS for model, _ in systems)
    records = []
    for model, seq_len in systems:
        record = dict(zip(SYSTEM, (system_name(model), str(seq_len)), strict=True))
        if with_published:
            published = PUBLISHED_MAX_BATCH.get((model, seq_len))
            record[PUBLISHED] = "-" if published is None else str(published)
        for name, title in products.items():
            record[title] = of_product.get((model, seq_len, name), "")
        records.append(record)
    return Table(f"Max Batch Size by compilers, {head}, {levers}", pd.DataFrame(records))


def _product(limit: CompiledLimit) -> str:
    return f"{limit.target.name}, {format_bytes(limit.budget_bytes)}"


def _system(limit: CompiledLimit) -> tuple[str, int]:
    return limit.workload.model, limit.workload.seq_len
