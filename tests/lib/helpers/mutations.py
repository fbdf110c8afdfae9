"""Damaged and forged content for the tests that no file ends in a traceback; seeded."""

from __future__ import annotations

import random
import re

NUMBERS = [
    b"1" + b"0" * 400, b"9" * 5000, b"1e400", b"-1", b"0", b"NaN", b"-Infinity", b"1e308",
    b"9223372036854775808", b"1000000000000", b"1.5", b"true", b"null", b'"x"', b"[]", b"{}",
]  # fmt: skip
TEXTS = [b'""', b'"\\ud800"', b'"\\u001b[31m"', b'"=1+1"', b"[[1]]", b"{}", b"3", b"null"]
BYTES = [b"\xff", b"\x00", b"\x1b]0;x\x07", b"\xe2\x80\xae", b"\n", b"[" * 5000, b'{"a":' * 3000]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Changes content in one to three ways."""
    for _ in range(draw.randint(1, 3)):
        data = draw.choice(_WAYS)(data, draw)
    return data


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randint(0, len(data))]


def _splice(data: bytes, draw: random.Random) -> bytes:
    """Takes a piece away, or puts one elsewhere."""
    begin = draw.randint(0, len(data))
    piece = data[begin : begin + draw.randint(1, 40)]
    place = draw.randint(0, len(data))
    if draw.random() < 0.5:
        return data[:begin] + data[begin + len(piece) :]
    return data[:place] + piece + data[place:]


def _insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randint(0, len(data))
    return data[:place] + draw.choice(BYTES) + data[place:]


def _number(data: bytes, draw: random.Random) -> bytes:
    """Puts something else in the place of a number, as in JSON."""
    return _replace(rb"-?\d+(?:\.\d+)?(?:e-?\d+)?", NUMBERS, data, draw)


def _text(data: bytes, draw: random.Random) -> bytes:
    """Puts something else in the place of a text, which may be a key."""
    return _replace(rb'"[^"\n]*"', TEXTS, data, draw)


def _replace(pattern: bytes, others: list[bytes], data: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(pattern, data[:100_000]))
    if not found:
        return data
    one = draw.choice(found)
    return data[: one.start()] + draw.choice(others) + data[one.end() :]


_WAYS = [_flip, _cut, _splice, _insert, _number, _number, _text]
