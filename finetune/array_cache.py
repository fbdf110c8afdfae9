"""Arrays that took time to make, kept on disk under a hash of what they were made from.

An entry is a folder with one file per array and `entry.json`. It appears whole or not at all, so
processes may share a cache, and it is read through memory maps, so that an array larger than
memory can be made (piece by piece) and used.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.json_files import json_text, parse_json

_logger = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 8 << 30
_ENTRY = "entry.json"
_KEY = re.compile("[0-9a-f]{64}")
_TEMPORARY = ".making-"
_ABANDONED_SECONDS = 24 * 3600.0

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class CacheEntry:
    """Arrays and what belongs to them.

    Attributes:
        arrays: by name; memory maps that cannot be written to, or arrays in memory if the cache
            could not be used.
        extra: whatever else was stored, as JSON.
        was_there: whether nothing had to be made.
    """

    arrays: dict[str, np.ndarray] = field(repr=False)
    extra: dict[str, Any]
    was_there: bool


def hash_key(**parts: Any) -> str:
    """SHA-256 of JSON-able parts, as a cache key."""
    return hashlib.sha256(json_text(parts, sort_keys=True).encode()).hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
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
    """Takes arrays from the cache, or makes and stores them.

    A cache that cannot be written to (a full disk, a read-only home) costs a warning, nothing else.

    Args:
        folder: of the cache; made if missing. None keeps everything in memory.
        key: from `hash_key`: everything that the arrays depend on.
        make: gives the arrays as pieces, one or more, to be joined along the first axis, and what
            else to store, JSON-able.
        limit_bytes: entries that were not used for longest are removed until the others need no
            more than this.
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
    try:
        described = parse_json((entry / _ENTRY).read_text(encoding="utf-8"), finite=False)
        extra = dict(described["extra"])
        arrays: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in dict(described["arrays"]).items():
            path = entry / name
            size = math.prod(shape) * np.dtype(dtype).itemsize
            # What is no plain file of numbers would be taken for addresses in memory.
            plain = path.parent == entry and not np.dtype(dtype).hasobject and min(shape) >= 0
            if not plain or path.stat().st_size != size:
                return None
            # An empty file cannot be mapped.
            arrays[name] = (
                np.memmap(path, dtype, "r", shape=tuple(shape)) if size else np.empty(shape, dtype)
            )
        # The time of the last use, by which entries are removed.
        os.utime(entry)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return CacheEntry(arrays, extra, True)


def _store(folder: Path, key: str, pieces: Iterable[Arrays], extra: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
    try:
        described: dict[str, tuple[str, list[int]]] = {}
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for piece in pieces:
                for name, array in piece.items():
                    if name not in files:
                        files[name] = stack.enter_context((temporary / name).open("wb"))
                        described[name] = (array.dtype.str, [0, *array.shape[1:]])
                    files[name].write(np.ascontiguousarray(array).data)
                    described[name][1][0] += len(array)
        content = {"arrays": described, "extra": extra}
        (temporary / _ENTRY).write_text(json_text(content), encoding="utf-8")
        # An entry that is there is damaged, or another process has just made the same.
        shutil.rmtree(folder / key, ignore_errors=True)
        os.replace(temporary, folder / key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _evict(folder: Path, newest: str, limit_bytes: int) -> None:
    """Remove the entries not used for longest, and what processes that were killed have left."""
    used = 0
    for path in folder.glob(f"{_TEMPORARY}*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    # Only what has the form of an entry: the user may keep other things in the folder.
    described = [path.parent for path in folder.glob(f"*/{_ENTRY}")]
    entries = [entry for entry in described if _KEY.fullmatch(entry.name)]
    entries.sort(key=lambda path: (path.name == newest, path.stat().st_mtime), reverse=True)
    for entry in entries:
        used += sum(file.stat().st_size for file in entry.iterdir())
        if used > limit_bytes and entry.name != newest:
            shutil.rmtree(entry, ignore_errors=True)
