"""A ledger's trials as one flat table, and as files for other tools."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bertbench.core.terminal import clean_text
from bertbench.ledger.records import LedgerRow
from finetune.errors import InputError
from finetune.storage.files import write_atomically

_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")

FORMATS = (".csv", ".parquet", ".json")


def to_frame(rows: Sequence[LedgerRow]) -> pd.DataFrame:
    """Put trials in a table: a row for each, bytes as integers, levers and versions in columns.

    Integers that may be missing have pandas' nullable type, so that none becomes a fraction.
    """
    records = []
    own: set[str] = set()
    for row in rows:
        values = row.to_json()
        levers, versions = values.pop("levers"), values.pop("versions")
        versions = {f"{name}_version": version for name, version in versions.items()}
        own.update(values)
        # Levers of another version may have any name, and any kind of value.
        more = {name: value for name, value in {**levers, **versions}.items() if name not in own}
        both = {**values, **more}
        records.append({_written(name): _written(value) for name, value in both.items()})
    frame = pd.DataFrame(records)
    for name in frame.columns:
        if name in own and name.endswith("_bytes"):
            frame[name] = frame[name].astype("Int64")
        elif pd.api.types.infer_dtype(frame[name], skipna=True).startswith("mixed"):
            frame[name] = frame[name].map(str, na_action="ignore")
    return frame


def _written(value: Any) -> Any:
    """A text as every format can hold it: of half a surrogate pair its escape."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def export(rows: Sequence[LedgerRow], path: Path, *, overwrite: bool = False) -> None:
    """Write trials to a CSV, Parquet or JSON file, as its ending says; complete or not at all.

    Args:
        rows: what `bertbench.ledger.records.read_rows` returns.
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
    write_atomically(path, _content(to_frame(rows), path))


def neutralised(frame: pd.DataFrame) -> pd.DataFrame:
    """The same for CSV, where a spreadsheet would take some texts for formulas and run them.

    Those get an apostrophe in front, as OWASP advises ("CSV Injection"); numbers stay as they are.
    """

    def plain(value: Any) -> Any:
        text = isinstance(value, str) and value.startswith(_FORMULAS)
        return f"'{value}" if text else value

    texts = frame.select_dtypes(include=["object", "string"]).columns
    named = frame.assign(**{name: frame[name].map(plain) for name in texts})
    return named.rename(columns=plain)


def _content(frame: Any, path: Path) -> str | bytes:
    if path.suffix == ".csv":
        return clean_text(neutralised(frame).to_csv(index=False))
    if path.suffix == ".json":
        return str(frame.to_json(orient="records", indent=1)) + "\n"
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Parquet needs pyarrow", path=path, hint="pip install 'bertbench[parquet]'"
        ) from error
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, engine="pyarrow")
    return buffer.getvalue()
