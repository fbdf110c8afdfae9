"""A cache on disk for arrays that take time to make, under a hash of their sources.

An entry is a folder with one file for each array and `entry.json`. An entry appears complete or not
at all, so processes may share a cache. It is made piece by piece and read through memory maps, so
an array may be larger than memory. Each array is compared with the SHA-256 of what was written, and
made again if it differs: a wrong bit from a disk must not change a training.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.storage.json_files import json_text, parse_json

_logger = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 8 << 30
_ENTRY = "entry.json"
_DIGEST = "sha256"
_KEY = re.compile("[0-9a-f]{64}")
_TEMPORARY = ".making-"
_ABANDONED_SECONDS = 24 * 3600.0

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class CacheEntry:
    """Arrays, and what was stored with them.

    Attributes:
        arrays: arrays by name: read-only memory maps, or arrays in memory if the cache could not
            be used.
        extra: further values, as JSON has them.
        was_there: whether the entry was in the cache, so that nothing had to be made.
    """

    arrays: dict[str, np.ndarray] = field(repr=False)
    extra: dict[str, Any]
    was_there: bool


def hash_key(**parts: Any) -> str:
    """Return the SHA-256 of values that JSON can hold, as the key of an entry."""
    return hashlib.sha256(json_text(parts, sort_keys=True).encode()).hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_or_make(
    folder: Path | None,
    key: str,
    make: Callable[[], tuple[Iterable[Arrays], dict[str, Any]]],
    *,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> CacheEntry:
    """Take arrays from the cache, or make and store them.

    If the cache cannot be written to (a full disk, a read-only home), there is a warning, and the
    arrays are made in memory.

    Example:
        >>> key = hash_key(source=hash_file("train.tsv"), version=1)
        >>> entry = load_or_make(folder, key, lambda: ([{"ids": ids}], {"examples": len(ids)}))
        >>> entry.arrays["ids"]

    Args:
        folder: folder of the cache, created if missing. None keeps everything in memory.
        key: result of `hash_key` for everything that the arrays depend on.
        make: returns one or more pieces of the arrays, to be joined along the first axis, and
            further values to be stored, which JSON can hold.
        limit_bytes: most bytes of the cache. Entries that have not been used for the longest time
            are removed until the others fit.
    """
    if folder is not None:
        found = _load(folder / key)
        if found is not None:
            return found
        problem: OSError | None = None
        try:
            _store(folder, key, *make())
            _evict(folder, key, limit_bytes)
        except OSError as error:
            problem = error
        # Also after an error: another process may have stored the same, or removed old entries.
        found = _load(folder / key)
        if found is not None:
            return CacheEntry(found.arrays, found.extra, False)
        if problem is not None:
            _logger.warning("not caching in %s (%s)", folder, problem.strerror or problem)
    pieces, extra = make()
    parts = list(pieces)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return CacheEntry(joined, extra, False)


def _load(entry: Path) -> CacheEntry | None:
    """Return an entry; None if there is none or, with a warning, if it is damaged."""
    try:
        text = (entry / _ENTRY).read_bytes()
    except OSError:
        return None
    try:
        described = parse_json(text.decode("utf-8"), finite=False)
        if _DIGEST not in described:
            return None  # An earlier version wrote no digest.
        arrays, extra = described["arrays"], described["extra"]
        whole = described[_DIGEST] == hash_key(key=entry.name, arrays=arrays, extra=extra)
        whole = whole and all((entry / name).parent == entry for name in arrays)
        found = {name: _map(entry / name, *how) for name, how in arrays.items()} if whole else {}
    except (OSError, ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        _logger.warning("the cached arrays in %s are damaged: making them again", entry)
        return None
    # The folder's time is that of its last use, see `_evict`.
    with contextlib.suppress(OSError):
        os.utime(entry)
    return CacheEntry(found, extra, True)


def _map(path: Path, dtype: str, shape: list[int], digest: str) -> np.ndarray:
    """Map the file of an array, after comparing it with its digest.

    Raises:
        OSError: the file is missing.
        ValueError: the file is not as it was written.
    """
    # The bytes of Python objects would be read as addresses in memory.
    if np.dtype(dtype).hasobject or min(shape) < 0:
        raise ValueError("no array of numbers")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError("another size")
    # An empty file cannot be mapped.
    array = np.memmap(path, dtype, "r", shape=tuple(shape)) if size else np.empty(shape, dtype)
    if hashlib.sha256(array.data.cast("B") if size else b"").hexdigest() != digest:
        raise ValueError("another content")
    return array


def _store(folder: Path, key: str, pieces: Iterable[Arrays], extra: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
    try:
        described: dict[str, tuple[str, list[int]]] = {}
        digests: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for piece in pieces:
                for name, array in piece.items():
                    if name not in files:
                        files[name] = stack.enter_context((temporary / name).open("wb"))
                        described[name] = (array.dtype.str, [0, *array.shape[1:]])
                        digests[name] = hashlib.sha256()
                    data = array.tobytes()
                    files[name].write(data)
                    digests[name].update(data)
                    described[name][1][0] += len(array)
        arrays = {name: [*how, digests[name].hexdigest()] for name, how in described.items()}
        digest = hash_key(key=key, arrays=arrays, extra=extra)
        content = {"arrays": arrays, "extra": extra, _DIGEST: digest}
        (temporary / _ENTRY).write_text(json_text(content), encoding="utf-8")
        # If the entry exists, it is damaged, or another process has just made the same.
        shutil.rmtree(folder / key, ignore_errors=True)
        os.replace(temporary, folder / key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _evict(folder: Path, newest: str, limit_bytes: int) -> None:
    """Remove the entries not used for the longest time, and unfinished ones of killed processes."""
    used = 0
    for path in folder.glob(f"{_TEMPORARY}*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    # Only folders with the name of an entry: the user may keep other things here.
    described = [path.parent for path in folder.glob(f"*/{_ENTRY}")]
    entries = [entry for entry in described if _KEY.fullmatch(entry.name)]
    entries.sort(key=lambda path: (path.name == newest, path.stat().st_mtime), reverse=True)
    for entry in entries:
        used += sum(file.stat().st_size for file in entry.iterdir())
        if used > limit_bytes and entry.name != newest:
            shutil.rmtree(entry, ignore_errors=True)
