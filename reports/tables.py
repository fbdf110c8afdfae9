"""Tables of limits: System x Seq Length x Max Batch Size, as the original release printed them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from bertbench.core.published import PAPER_MODELS, PUBLISHED_MAX_BATCH
from bertbench.core.terminal import clean_text
from bertbench.ledger.limit import AT_LEAST, BELOW, CERTIFIED
from bertbench.ledger.trial_table import neutralised
from finetune.storage.json_files import json_text
from reports.environments import Environment, name_environments
from reports.measured_cells import MeasuredCell, levers_order, model_order

SYSTEM = ("System", "Seq Length")
PUBLISHED = "published, Titan X 12 GB"
NOTE = (
    "* certified: this batch fits and the next one runs out of memory, each in a fresh process; "
    "without a mark, not both in fresh ones. 31-40: 31 fits, 41 does not, those between were not "
    "tried. >= no larger batch has a result. < no smaller batch has one."
)

FORMATS = {".md": "Markdown", ".csv": "CSV", ".tex": "LaTeX", ".json": "JSON"}


@dataclasses.dataclass(frozen=True)
class Table:
    """Limits measured in one environment, beside the published ones.

    Attributes:
        title: task and environment.
        frame: a row for each system and sequence length; all columns are text.
    """

    title: str
    frame: pd.DataFrame


def system_name(model: str) -> str:
    """Write the name of a published model as the original release does: `BERT-Base`."""
    if not model.startswith("bert-"):
        return model
    first, *others = model.removeprefix("bert-").split("-")
    return "-".join(["BERT", first.capitalize(), *others])


def count_cells(count: int) -> str:
    """Write a number of cells."""
    return f"{count:,} cell" + "s" * (count != 1)


def limit_text(cell: MeasuredCell) -> str:
    """Write a limit with its evidence.

    `31*` is certified, `31` measured. `31-39`: 31 fits and 40 runs out of memory. `>=31`: only
    batches that fit were tried. `<40`: only batches that run out of memory were. `-`: unknown.
    """
    if cell.evidence == BELOW:
        return f"<{cell.oom.batch}" if cell.oom else "-"
    if cell.max_batch is None:
        return "-"
    if cell.evidence == AT_LEAST:
        return f">={cell.max_batch}"
    if cell.oom is not None and cell.oom.batch > cell.max_batch + 1:
        return f"{cell.max_batch}-{cell.oom.batch - 1}"
    return f"{cell.max_batch}{'*' * (cell.evidence == CERTIFIED)}"


def published_tables(cells: Sequence[MeasuredCell]) -> list[Table]:
    """Make a table for every environment and task, with a column for all levers that were tried.

    Tables with the paper's systems come first, and have a column of published numbers. Trials that
    only verified a plan are left out.
    """
    names = name_environments(cell.environment for cell in cells)
    groups: dict[tuple[Environment, str], list[MeasuredCell]] = {}
    for cell in (cell for cell in cells if cell.is_of_search):
        groups.setdefault((cell.environment, cell.task), []).append(cell)
    tables = [
        _table(f"Max Batch Size, {task}, {names[environment]}", some)
        for (environment, task), some in groups.items()
    ]
    return sorted(tables, key=lambda table: PUBLISHED not in table.frame.columns)


def _table(title: str, cells: Sequence[MeasuredCell]) -> Table:
    settings = sorted({(levers_order(c.levers), c.levers_text) for c in cells})
    limits = {(c.model, c.newest.seq_len, c.levers_text): limit_text(c) for c in cells}
    systems = sorted({(model_order(c.model), c.newest.seq_len, c.model) for c in cells})
    with_published = any(model in PAPER_MODELS for _, _, model in systems)
    records: list[dict[str, str]] = []
    for _, seq_len, model in systems:
        record = dict(zip(SYSTEM, (system_name(model), str(seq_len)), strict=True))
        if with_published:
            published = PUBLISHED_MAX_BATCH.get((model, seq_len))
            record[PUBLISHED] = "-" if published is None else str(published)
        for _, setting in settings:
            record[setting] = limits.get((model, seq_len, setting), "")
        records.append(record)
    return Table(title, pd.DataFrame(records))


def cells_frame(cells: Iterable[MeasuredCell]) -> pd.DataFrame:
    """Return a row for each cell, with numbers as numbers and bytes as integers."""
    records = []
    for cell in cells:
        values = cell.to_json()
        versions = {f"{name}_version": text for name, text in values.pop("versions").items()}
        values["levers"] = cell.levers_text
        records.append({**values, **versions})
    frame = pd.DataFrame(records) if records else pd.DataFrame(columns=["model", "max_batch"])
    for name in frame.columns:
        if name.endswith(("_bytes", "max_batch")):
            frame[name] = frame[name].astype("Int64")
    return frame


def write_tables(cells: Sequence[MeasuredCell], suffix: str) -> str:
    """Write all limits as text.

    Args:
        cells: the cells.
        suffix: suffix of the file, one of `FORMATS`.
    """
    if suffix == ".json":
        return json_text({"cells": [cell.to_json() for cell in cells]}, indent=1) + "\n"
    if suffix == ".csv":
        return clean_text(neutralised(cells_frame(cells)).to_csv(index=False))
    tables = published_tables(cells)
    write = _markdown if suffix == ".md" else _latex
    if not tables:
        return "no limits: the trials only verified plans\n" if cells else "no trials\n"
    return clean_text("\n".join(map(write, tables)))


def _markdown(table: Table) -> str:
    frame = table.frame
    lines = [
        list(frame.columns),
        ["---", *["---:"] * (len(frame.columns) - 1)],
        *frame.itertuples(index=False),
    ]
    written = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
    return f"{_escaped(table.title)}\n\n{written}\n\n{NOTE.replace('*', chr(92) + '*')}\n"


# Characters of Markdown's tables, styles, code, links and HTML; an underscore in a word is not one.
_MARKDOWN = {ord(plain): f"\\{plain}" for plain in "\\|*`<["}


def _escaped(text: Any) -> str:
    return " ".join(str(text).translate(_MARKDOWN).split("\n"))


_LATEX: dict[str, str | int | None] = {
    **{plain: f"\\{plain}" for plain in "&%#_${}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "*": "$^*$",
    "[": "{[}",
    "\n": " ",
    "<": "$<$",
    ">": "$>$",
}


def _latex(table: Table) -> str:
    def written(text: str) -> str:
        marked = str(text).translate(str.maketrans(_LATEX))
        return marked.replace("$>$=", "$\\geq$")

    frame = table.frame.map(written)
    frame.columns = [written(name) for name in frame.columns]
    return str(
        frame.to_latex(
            index=False,
            escape=False,
            column_format="l" + "r" * (len(frame.columns) - 1),
            caption=f"{written(table.title)}. {written(NOTE)}",
            position="t",
        )
    )
