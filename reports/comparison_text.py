"""A comparison of two sets of measurements, printed in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bertbench.core.terminal import terminal
from reports.comparison import Comparison, Pair
from reports.environments import Environment, name_environments
from reports.tables import count_cells, limit_text, system_name


def show_comparison(before: str, after: str, comparison: Comparison) -> None:
    """Print each pair of cells in a line, and the ratios of all pairs.

    Args:
        before: name of the first file, which the table calls A.
        after: name of the second file, which the table calls B.
        comparison: the pairs.
    """
    console = terminal()
    _print_files(console, before, after, comparison)
    _print_pairs(console, comparison)
    for name, spread in comparison.spreads.items():
        if spread is not None:
            console.print(f"{name.replace('_', ' ')} B/A: {spread}", soft_wrap=True)
    differ = sum(pair.budgets_differ for pair in comparison.pairs)
    if differ:
        console.print(f"{count_cells(differ)} had another budget in B than in A")
    for count, file in ((comparison.only_before, "A"), (comparison.only_after, "B")):
        if count:
            console.print(f"{count_cells(count)} only in {file}")
    if not comparison.pairs:
        console.print("no cell is in both")


def _environment_names(comparison: Comparison) -> dict[Environment, str]:
    cells = [cell for pair in comparison.pairs for cell in (pair.before, pair.after)]
    return name_environments(cell.environment for cell in cells)


def _print_files(console: Console, before: str, after: str, comparison: Comparison) -> None:
    """Print which file is A and which is B, with the environment if a file has one or two."""
    names = _environment_names(comparison)
    for letter, path, cells in (
        ("A", before, [pair.before for pair in comparison.pairs]),
        ("B", after, [pair.after for pair in comparison.pairs]),
    ):
        environments = sorted({names[cell.environment] for cell in cells})
        where = f": {'; '.join(environments)}" if len(environments) in (1, 2) else ""
        console.print(f"{letter}: {path}{where}", soft_wrap=True)


def _print_pairs(console: Console, comparison: Comparison) -> None:
    """Print a table for each task and environment."""
    names = _environment_names(comparison)
    groups: dict[str, list[Pair]] = {}
    for pair in comparison.pairs:
        where, other = names[pair.before.environment], names[pair.after.environment]
        where = where if where == other else f"{where} in A and {other} in B"
        groups.setdefault(f"{pair.before.task}, {where}", []).append(pair)
    for title, pairs in groups.items():
        console.print(f"\n{title}", style="bold", soft_wrap=True)
        console.print(_table(pairs))


def _table(pairs: Sequence[Pair]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("model", "seq", "levers", "A", "B", "B/A", "peak", "speed"):
        left = title in ("model", "levers")
        table.add_column(title, justify="left" if left else "right", no_wrap=title != "levers")
    for pair in pairs:
        table.add_row(
            system_name(pair.before.model),
            str(pair.before.newest.seq_len),
            pair.before.levers_text,
            limit_text(pair.before),
            limit_text(pair.after),
            *(_ratio(ratio) for ratio in (pair.limit_ratio, pair.peak_ratio, pair.speed_ratio)),
        )
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
