"""`bertbench fetch`: data sets and Google's BERT releases, by name."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from bertbench.cli.options.common import CONTEXT, PathName, json_option, write_json
from bertbench.core.errors import StoppedEarlyError
from bertbench.core.terminal import echo, terminal
from bertbench.core.units import MIB_BYTES
from bertbench.fetch.catalogue import ENTRIES, GROUPS, Entry, find_entries
from bertbench.fetch.fetch import Comparison, Fetched, fetch
from finetune.errors import InputError
from finetune.tasks.glue import find_task

_COMPARED: dict[Comparison, str] = {
    "published SHA-256": "as published",
    "SHA-256 seen before": "as in an earlier download",
    "SHA-256": "as expected",
    "server's MD5": "none is published; MD5 and length are as the server says",
    "length": "none is published; the length is as the server says",
    "nothing": "none is published",
}
"""What is printed about a file's checksum."""


@click.command(context_settings=CONTEXT)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--to",
    type=PathName(file_okay=False),
    default=Path("bert-data"),
    show_default=True,
    help="Folder for all files.",
)
@click.option(
    "--list",
    "only_list",
    is_flag=True,
    help="Show addresses and checksums of NAME..., and fetch nothing.",
)
@click.option("--force", is_flag=True, help="Replace other files that are in the way.")
@click.option(
    "--mirror",
    envvar="BERTBENCH_MIRROR",
    help="Address that has the files of all servers under HOST/PATH, to use instead of them "
    "[env: BERTBENCH_MIRROR].",
)
@json_option
def command(
    names: tuple[str, ...],
    to: Path,
    only_list: bool,
    force: bool,
    mirror: str | None,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Data sets and Google's BERT releases, by name.

    Without NAME it lists all names. An interrupted download continues. A file that
    exists already is verified and kept, also one that you have put there by hand.

    \b
    Example:
      bertbench fetch squad-v1.1 bert-base-uncased --to bert-data
    """
    entries = find_entries(names)
    if mirror is not None and not mirror.startswith(("http://", "https://")):
        raise InputError(f"--mirror {mirror!r} is not an address", hint="begin it with https://")
    if only_list or not entries:
        shown = entries or ENTRIES
        if json_file is not None:
            write_json(json_file, {"entries": [_entry_json(entry) for entry in shown]})
        if str(json_file) != "-":
            (_show_details if entries else _show_list)(shown, to)
        return
    results: list[Fetched] = []
    try:
        for entry in entries:
            results.append(fetch(entry, to, mirror, force))
            if str(json_file) != "-":
                _show_result(results[-1], to)
    except KeyboardInterrupt as error:
        raise StoppedEarlyError(
            "interrupted; the bytes that have arrived are kept, the same command continues"
        ) from error
    finally:
        if json_file is not None:
            fetched = [{**r.to_json(), "usage": _usage(r.entry, to)} for r in results]
            write_json(json_file, {"to": str(to), "fetched": fetched})


def _usage(entry: Entry, root: Path) -> str | None:
    """Return a command line that uses an entry; None if no verb does."""
    if not entry.verb:
        return None
    if "--task_name" in entry.flags:
        try:
            find_task(entry.flags.split()[-1])
        except InputError:
            return None
    words = ["bertbench", *entry.verb.split()]
    for flag, path in entry.path_flags:
        words += [flag, str(root / path)]
    return f"{shlex.join(words)} {entry.flags}".rstrip()


def _show_result(result: Fetched, root: Path) -> None:
    how = "was there already" if result.was_there else "fetched"
    echo(f"{result.entry.name}: {how}, in {result.folder}")
    for file in result.files:
        echo(f"  {file.path.name}: SHA-256 {file.sha256} ({_COMPARED[file.checked]})")
    if result.members_checked:
        echo("  the files in it have their published SHA-256")
    usage = _usage(result.entry, root)
    if usage is not None:
        echo(f"  use: {usage}")


def _size(entry: Entry) -> str:
    about = "" if entry.size_bytes is not None else "about "
    size = (entry.size_bytes or entry.approximate_bytes) / MIB_BYTES
    return f"{about}{size:.2g} MiB" if size < 10 else f"{about}{size:,.0f} MiB"


def _show_list(entries: Sequence[Entry], _: Path) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("name", "download", "checksum", "licence"):
        table.add_column(title, justify="right" if title == "download" else "left", no_wrap=True)
    for entry in entries:
        checksum = "published" if entry.has_published_checksums else "-"
        table.add_row(entry.name, _size(entry), checksum, entry.licence)
    terminal().print(table)
    for name, members in GROUPS.items():
        echo(f"{name}: {len(members)} of these")
    echo("`bertbench fetch --list NAME` shows addresses, checksums and other names.")


def _show_details(entries: Sequence[Entry], root: Path) -> None:
    for entry in entries:
        echo(f"{entry.name}: {entry.what}, licence: {entry.licence}")
        if entry.aliases:
            echo(f"  also: {', '.join(entry.aliases)}")
        echo(f"  ends up in {root / entry.folder}")
        for source in entry.sources:
            echo(f"  {source.url}")
            echo(f"    by hand: put it at {root / source.path}")
            size = "" if source.size_bytes is None else f", {source.size_bytes:,} bytes"
            echo(f"    SHA-256 {source.sha256 or 'not published'}{size}")
        for name, sha256 in entry.members.items():
            echo(f"  {sha256}  {name}")


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "what": entry.what,
        "licence": entry.licence,
        "folder": entry.folder,
        "size_bytes": entry.size_bytes,
        "approximate_bytes": entry.size_bytes or entry.approximate_bytes,
        "has_published_checksums": entry.has_published_checksums,
        "sources": [
            {
                "url": source.url,
                "path": source.path,
                "size_bytes": source.size_bytes,
                "sha256": source.sha256,
            }
            for source in entry.sources
        ],
        "members": dict(entry.members),
    }
