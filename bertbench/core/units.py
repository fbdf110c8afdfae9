"""Memory sizes: reading them from text, and writing them."""

from __future__ import annotations

import re

from finetune.errors import InputError

KIB_BYTES = 1 << 10
MIB_BYTES = 1 << 20
GIB_BYTES = 1 << 30

_UNITS = {
    "": 1, "b": 1,
    "k": KIB_BYTES, "kib": KIB_BYTES, "kb": 10**3,
    "m": MIB_BYTES, "mib": MIB_BYTES, "mb": 10**6,
    "g": GIB_BYTES, "gib": GIB_BYTES, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip

_MAX_BYTES = 1 << 60


def parse_bytes(text: str) -> int:
    """Read `12GiB`, `11430 MiB`, `8g`, `1.5GB` or a plain number of bytes.

    Raises:
        InputError: the text is not a size, or the size is below 1 MiB.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise InputError(f"{text!r} is not a memory size", hint="write it like 12GiB or 11430MiB")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size > _MAX_BYTES:
        raise InputError(f"{text[:40]!r} is more than any memory", hint="write it like 12GiB")
    size_bytes = int(size)
    if size_bytes < MIB_BYTES:
        raise InputError(f"a memory size of {text!r} is below 1 MiB", hint="write it like 12GiB")
    return size_bytes


def format_bytes(size_bytes: int) -> str:
    """Write a size in MiB below 10 GiB and in GiB from there, as in `437 MiB`, `11.2 GiB`."""
    if size_bytes < 10 * GIB_BYTES:
        return f"{size_bytes / MIB_BYTES:,.0f} MiB"
    return f"{size_bytes / GIB_BYTES:,.1f} GiB"
