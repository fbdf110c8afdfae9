"""What `bertbench probe --gpu` shows: limits by the compiler of a device that need not be here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from bertbench.cli.views.probe_view import published_columns, results_table
from bertbench.core.terminal import terminal
from bertbench.core.units import format_bytes
from bertbench.core.workload import Levers
from bertbench.hardware.accelerators import Accelerator
from bertbench.probing.compiled.cell import CompiledCell
from bertbench.probing.compiled.claims import CompiledCheck


def show_compiled(
    accelerator: Accelerator, budget_bytes: int, levers: Levers, cells: Sequence[CompiledCell]
) -> None:
    """Show the finished cells."""
    console = terminal()
    where = f"{format_bytes(budget_bytes)} of {accelerator.name}"
    if accelerator.replicas > 1:
        size = format_bytes(budget_bytes)
        where = f"on each of the {accelerator.replicas} devices of {accelerator.name}, {size} each"
    console.print(
        f"largest batch, {where}, by its compiler and not by trials, "
        f"checkpointing {levers.describe()}",
        soft_wrap=True,
    )
    console.print(build_compiled_table(cells))
    if accelerator.kind == "gpu":
        console.print(
            "the numbers leave out what CUDA's libraries take beside TensorFlow's allocator; only "
            "a trial on the GPU proves a limit",
            soft_wrap=True,
        )


def show_compiled_checks(product: str, checks: Sequence[CompiledCheck]) -> None:
    """Show the limits that were checked."""
    table = Table(box=None, pad_edge=False)
    for title in ("model", "seq", "checkpointing", "max batch", f"limit on {product}"):
        table.add_column(title, justify="right" if title in ("seq", "max batch") else "left")
    words = {True: "holds", False: "does not hold", None: "not checked"}
    for check in checks:
        setup = check.claim.setup
        table.add_row(
            setup.workload.model,
            str(setup.workload.seq_len),
            setup.levers.describe(),
            str(check.claim.max_batch),
            words[check.confirmed],
        )
    terminal().print(table)


def build_compiled_table(cells: Sequence[CompiledCell]) -> Table:
    """Make the table of results."""
    table, published = results_table(
        [cell.setup.workload for cell in cells], ("needs", "one more", "compiled")
    )
    for cell in cells:
        workload = cell.setup.workload
        row = [workload.model, str(workload.seq_len), *_results(cell)]
        if published:
            row += published_columns(workload, cell.max_batch or 0)
        table.add_row(*row)
    return table


def _results(cell: CompiledCell) -> list[str]:
    if cell.max_batch is None:
        return ["-", "-", "-", str(cell.compiled), "failed"]
    needs, one_more = (
        format_bytes(one.memory.device_bytes) if one and one.memory else "-"
        for one in (cell.fits, cell.exceeds)
    )
    if cell.exceeds is None:
        return [f"≥ {cell.max_batch}", needs, "-", str(cell.compiled), "not the limit"]
    return [
        str(cell.max_batch),
        needs,
        one_more if cell.exceeds.memory else "refused",
        str(cell.compiled),
        "compiled",
    ]
