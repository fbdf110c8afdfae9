"""`bertbench report`: tables, pictures and a page from a ledger and from runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bertbench.cli.options.common import (
    BATCH,
    CONTEXT,
    PathName,
    given_flags,
    json_option,
    ledger_option,
    write_json,
)
from bertbench.core.progress import progress
from bertbench.core.terminal import say
from bertbench.ledger.compiled_limits import CompiledLimit, read_compiled_limits
from bertbench.ledger.database import default_ledger_path, ledger_exists, read_ledger
from bertbench.ledger.records import LedgerRow, read_rows
from finetune.errors import InputError
from finetune.storage.files import write_atomically

if TYPE_CHECKING:
    from reports.report import Report

_PAGE = ".html"


@click.command(context_settings=CONTEXT)
@ledger_option
@click.option(
    "--run",
    "run_dirs",
    multiple=True,
    type=PathName(file_okay=False),
    help="An --output_dir of `bertbench run`; may be given several times.",
)
@click.option(
    "--out",
    type=PathName(),
    help="Write the report as a page (.html), the limits as a table (.md, .csv, .tex, .json), or "
    "everything with the pictures (PNG and SVG) into a folder.",
)
@click.option("--text", is_flag=True, help="Show the report in the terminal, even with --out.")
@click.option(
    "--compare",
    nargs=2,
    type=PathName(dir_okay=False),
    metavar="A B",
    help="Compare B with A; each is a ledger, or a file of `bertbench probe --json`.",
)
@click.option(
    "--target-batch",
    type=BATCH,
    default=32,
    show_default=True,
    help="Effective batch to plan for.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace the file at --out, or the report in that folder; other files stay.",
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    ledger_file: Path | None,
    run_dirs: tuple[Path, ...],
    out: Path | None,
    text: bool,
    compare: tuple[Path, Path] | None,
    target_batch: int,
    force: bool,
    json_file: Path | None,
) -> None:
    """Show what was measured, beside the published table: in the terminal, or as files.

    \b
    Example:
      bertbench report
      bertbench report --out report.html
      bertbench report --compare before.json after.json
    """
    if compare is not None:
        _nothing_else(context)
        _compare(*compare, json_file)
        return
    suffix = None if out is None else _check_out(out, force)
    report = _read(ledger_file, run_dirs, target_batch)
    if json_file is not None:
        write_json(
            json_file,
            {
                "ledger": str(report.ledger),
                "cells": [cell.to_json() for cell in report.cells],
                "compiled": [limit.to_json() for limit in report.compiled],
                "runs": [run.summary() for run in report.runs],
            },
        )
    if str(json_file) != "-" and (text or out is None):
        from reports.text import show_report

        show_report(report)
    if out is not None and suffix is not None:
        _write(report, out, suffix)


def _read(ledger_file: Path | None, run_dirs: Sequence[Path], target_batch: int) -> Report:
    """Read what the report is made from.

    Args:
        ledger_file: a ledger; None takes the user's, which may be missing.
        run_dirs: output folders of runs.
        target_batch: effective batch to plan for.

    Raises:
        InputError: the ledger that was named is missing, or there is no run in a folder.
    """
    from reports.report import Report
    from reports.runs import read_run

    path = ledger_file or default_ledger_path()
    rows: list[LedgerRow] = []
    compiled: list[CompiledLimit] = []
    if ledger_exists(path):
        with read_ledger(path) as ledger:
            rows, compiled = read_rows(ledger), read_compiled_limits(ledger)
    elif ledger_file is not None:
        raise InputError("no such ledger", path=path, hint="`bertbench probe` makes one")
    else:
        say(f"no ledger at {path} yet")
    runs = [read_run(folder) for folder in run_dirs]
    return Report(path, rows, runs, target_batch, datetime.now().astimezone(), compiled)


def _nothing_else(context: click.Context) -> None:
    """Refuse flags that a comparison does not use."""
    for flag in given_flags(context, ("compare", "json_file")):
        raise InputError(
            f"--compare does not go with {flag}",
            hint=f"leave {flag} out; --json FILE keeps a comparison",
        )


def _check_out(out: Path, force: bool) -> str:
    """Check where the report is to be written; return the suffix, "" for a folder.

    Raises:
        InputError: the file exists already, or its suffix is unknown.
    """
    from reports.tables import FORMATS

    suffix = "" if out.is_dir() else out.suffix.lower()
    if suffix not in ("", _PAGE, *FORMATS):
        raise InputError(
            f"unknown kind of file {suffix!r}",
            path=out,
            hint=f"end it in {', '.join((_PAGE, *FORMATS))}, or name a folder",
        )
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not force:
        raise InputError("exists already", path=out, hint="choose another name, or use --force")
    if not suffix and out.exists() and not out.is_dir():
        raise InputError("is a file", path=out, hint="choose another name")
    return suffix


def _write(report: Report, out: Path, suffix: str) -> None:
    """Write the report to a file of a kind, or into a folder if the suffix is empty."""
    from reports.page import build_page
    from reports.tables import FORMATS, write_tables

    out.parent.mkdir(parents=True, exist_ok=True)
    if not suffix:
        _write_folder(report, out)
    elif suffix in FORMATS:
        write_atomically(out, write_tables(report.cells, suffix))
        say(f"wrote {out}")
    else:
        with progress("page", len(report.pictures), "pictures") as advance:
            write_atomically(out, build_page(report, advance))
        say(f"wrote {out}")


def _write_folder(report: Report, folder: Path) -> None:
    """Write the page, the tables and the pictures; other files in the folder stay."""
    from reports.page import build_page
    from reports.tables import FORMATS, write_tables

    folder.mkdir(exist_ok=True)
    written: set[Path] = set()

    def write(name: str, content: str | bytes) -> None:
        write_atomically(folder / name, content)
        written.add(folder / name)

    for kind in FORMATS:
        write(f"limits{kind}", write_tables(report.cells, kind))
    pictures = report.pictures
    with progress("pictures", len(pictures), "pictures") as advance:
        for number, picture in enumerate(pictures):
            write(f"{picture.name}.png", picture.png())
            write(f"{picture.name}.svg", picture.svg())
            advance(number + 1, picture.name)
    write("report.html", build_page(report))
    others = len(set(folder.iterdir()) - written)
    if others:
        say(f"left {others} other file{'s' * (others != 1)} in {folder} as they were")
    say(f"wrote {folder / 'report.html'}, and more beside it")


def _compare(before: Path, after: Path, json_file: Path | None) -> None:
    from reports.comparison import compare_cells, read_either
    from reports.comparison_text import show_comparison

    comparison = compare_cells(read_either(before), read_either(after))
    if json_file is not None:
        write_json(json_file, comparison.to_json())
    if str(json_file) != "-":
        show_comparison(str(before), str(after), comparison)
