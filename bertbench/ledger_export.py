"""A ledger's trials as one flat table, and as files for other tools."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bertbench.ledger import LedgerRow
from finetune.errors import InputError

FORMATS = (".csv", ".parquet", ".json")


def to_frame(rows: Sequence[LedgerRow]) -> pd.DataFrame:
    """Put trials in a table: a row for each, bytes as integers, levers and versions in columns.

    Integers that may be missing have pandas' nullable type, so that none becomes a fraction.
    """
    records = [
        {
            "id": row.id,
            "time_utc": row.time_utc,
            "device": row.device,
            "budget_bytes": row.budget_bytes,
            "model": row.model,
            "head": row.head,
            "seq_len": row.seq_len,
            **row.levers,
            **row.trial.to_json(),
            **{f"{name}_version": version for name, version in row.versions.items()},
        }
        for row in rows
    ]
    frame = pd.DataFrame(records)
    for name in frame.columns:
        if name.endswith("_bytes"):
            frame[name] = frame[name].astype("Int64")
    return frame


def export(rows: Sequence[LedgerRow], path: Path, *, overwrite: bool = False) -> None:
    """Write trials to a CSV, Parquet or JSON file, as its ending says; complete or not at all.

    Args:
        rows: what `bertbench.ledger.read_rows` returns.
        path: file to write.
        overwrite: replace a file that is there.

    Raises:
        InputError: unknown ending, the file is there, or pyarrow is missing for Parquet.
    """
    if path.suffix not in FORMATS:
        raise InputError(
            f"unknown format {path.suffix!r}", path=path, hint=f"end it in {', '.join(FORMATS)}"
        )
    if path.exists() and not overwrite:
        raise InputError("is there already", path=path, hint="choose another name, or use --force")
    frame = to_frame(rows)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(number)
    temporary = Path(name)
    try:
        _write(frame, temporary, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(frame: Any, temporary: Path, path: Path) -> None:
    if path.suffix == ".csv":
        frame.to_csv(temporary, index=False)
    elif path.suffix == ".json":
        frame.to_json(temporary, orient="records", indent=1)
    else:
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise InputError(
                "Parquet needs pyarrow", path=path, hint="pip install 'bertbench[parquet]'"
            ) from error
        frame.to_parquet(temporary, index=False, engine="pyarrow")
