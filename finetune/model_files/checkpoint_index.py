"""The index of a TensorFlow checkpoint, checked before TensorFlow reads it.

TensorFlow trusts the index: a damaged offset or shape crashes the process. The index is a table in
LevelDB's format (`table_format.md` of LevelDB). Its values are the protocol buffers of TensorFlow's
`tensor_bundle.proto`.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import DamagedFileError, InputError
from finetune.storage.files import read_bytes

_LIMIT_BYTES = 64 << 20
_FOOTER_BYTES = 48
_MAGIC = 0xDB4775248B80FB57
_TRAILER_BYTES = 5  # kind of compression, and the checksum
_MAX_SHARDS = 10_000
_MAX_DIMENSIONS = 254

# Bytes of one number of each type, by the type's number in TensorFlow's `types.proto`. A text has
# no fixed size.
_TEXT = 7
_NUMBER_BYTES = {1: 4, 2: 8, 3: 4, 4: 1, 5: 2, 6: 1, 8: 8, 9: 8, 10: 1, 14: 2, 17: 2, 18: 16,
                 19: 2, 22: 4, 23: 8}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What an index says about a tensor."""

    kind: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size_bytes: int


class _DamageError(ValueError):
    """An index is damaged; the message says how."""


def check_index(prefix: Path, *, hint: str) -> frozenset[str]:
    """Check a checkpoint's index: its checksums, and each tensor's place in the data files.

    Args:
        prefix: name of the checkpoint's files without `.index`.
        hint: what the user should do if the index is damaged.

    Returns:
        Names of the tensors of numbers, without those of texts.

    Raises:
        DamagedFileError: the index is damaged, cannot be read, or does not belong to the data
            files.
    """
    path = Path(f"{prefix}.index")
    try:
        return _numbers(prefix, read_bytes(path, limit_bytes=_LIMIT_BYTES))
    except _DamageError as error:
        raise DamagedFileError(
            f"cannot read the TensorFlow checkpoint ({error})", path=prefix, hint=hint
        ) from error
    except OSError as error:
        raise DamagedFileError(
            f"cannot read the TensorFlow checkpoint ({error.strerror})", path=prefix, hint=hint
        ) from error
    except InputError as error:  # far too large
        raise DamagedFileError(str(error), hint=hint) from error


def _numbers(prefix: Path, data: bytes) -> frozenset[str]:
    entries = list(_table(data))
    if not entries or entries[0][0]:
        raise _DamageError("the index has no header")
    shards = _shards(entries[0][1])
    sizes = [_data_size(prefix, shard, shards) for shard in range(shards)]
    found = set()
    for key, value in entries[1:]:
        try:
            name = key.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamageError("the index has a name that is not UTF-8") from error
        entry = _entry(value)
        if entry.shard >= shards or entry.offset + entry.size_bytes > sizes[entry.shard]:
            raise _DamageError(f"{name} lies beyond the end of the data file")
        if entry.kind == _TEXT:
            continue
        if entry.kind not in _NUMBER_BYTES:
            raise _DamageError(f"{name} is of the unknown type {entry.kind}")
        if math.prod(entry.shape) * _NUMBER_BYTES[entry.kind] != entry.size_bytes:
            raise _DamageError(f"the size of {name} does not match its shape")
        found.add(name)
    return frozenset(found)


def _data_size(prefix: Path, shard: int, shards: int) -> int:
    return Path(f"{prefix}.data-{shard:05}-of-{shards:05}").stat().st_size


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table; check that the keys are in order."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise _DamageError("the index has no end mark")
    place = 0
    handles = []
    for _ in range(2):
        offset, place = _varint(footer, place)
        size, place = _varint(footer, place)
        handles.append((offset, size))
    end = len(data) - _FOOTER_BYTES
    _block(data, end, *handles[0])
    last: bytes | None = None
    for _, handle in _entries(_block(data, end, *handles[1])):
        offset, place = _varint(handle, 0)
        size, _ = _varint(handle, place)
        for key, value in _entries(_block(data, end, offset, size)):
            if last is not None and key <= last:
                raise _DamageError("the names in the index are not in order")
            last = key
            yield key, value


def _block(data: bytes, end: int, offset: int, size: int) -> bytes:
    """Return the content of a block of the table, after checking its checksum."""
    if offset + size + _TRAILER_BYTES > end:
        raise _DamageError("a block of the index lies beyond its end")
    stored = data[offset : offset + size + _TRAILER_BYTES]
    checked, checksum = stored[:-4], int.from_bytes(stored[-4:], "little")
    if _masked_checksum(checked) != checksum:
        raise _DamageError("a checksum of the index is wrong")
    if checked[-1]:
        raise _DamageError("the index is compressed, which no checkpoint of BERT is")
    return stored[:size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block, which stores only how a key differs from the last."""
    if len(block) < 4:
        raise _DamageError("a block of the index is too short")
    (count,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 - 4 * count
    if end < 0:
        raise _DamageError("a block of the index is too short")
    restarts = set(struct.unpack(f"<{count}I", block[end:-4]))
    key, place = b"", 0
    while place < end:
        whole = place in restarts
        restarts.discard(place)
        shared, place = _varint(block, place)
        own, place = _varint(block, place)
        size, place = _varint(block, place)
        if shared > len(key) or place + own + size > end or (whole and shared):
            raise _DamageError("an entry of the index is too long")
        key = key[:shared] + block[place : place + own]
        yield key, block[place + own : place + own + size]
        place += own + size
    # An empty block has a restart point at 0.
    if restarts - {0}:
        raise _DamageError("a block of the index has wrong restart points")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return an integer stored in groups of seven bits, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise _DamageError("the index has a number without an end")


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the numbers and values of a protocol buffer's fields."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, place = _varint(message, place)
        if size is None or place + size > len(message):
            raise _DamageError("the index has a damaged entry")
        yield tag >> 3, message[place : place + size]
        place += size


def _shards(header: bytes) -> int:
    """Return the number of data files, from `BundleHeaderProto`."""
    shards = 0
    for field, value in _fields(header):
        if field == 1:
            shards = _whole(value)
        elif field == 2 and value:
            raise _DamageError("the checkpoint is of a machine with another order of bytes")
    if not 1 <= shards <= _MAX_SHARDS:
        raise _DamageError(f"the index names {shards} data files")
    return shards


def _entry(message: bytes) -> _Entry:
    """Read a tensor's `BundleEntryProto`."""
    numbers = dict.fromkeys((1, 3, 4, 5), 0)
    shape: tuple[int, ...] = ()
    for field, value in _fields(message):
        if field in numbers:
            numbers[field] = _whole(value)
        elif field == 2:
            shape = _shape(value)
        elif field == 7:
            raise _DamageError("a tensor is stored in parts")
    kind, shard, offset, size = numbers.values()
    if max(offset, size) >= 1 << 63:
        raise _DamageError("a tensor has a negative place")
    return _Entry(kind, shape, shard, offset, size)


def _shape(message: int | bytes) -> tuple[int, ...]:
    """Read a `TensorShapeProto`."""
    sizes = []
    for field, value in _fields(_message(message)):
        if field == 3 and value:
            raise _DamageError("a tensor has no shape")
        if field == 2:
            size = 0
            for inner, number in _fields(_message(value)):
                size = _whole(number) if inner == 1 else size
            sizes.append(size)
    if len(sizes) > _MAX_DIMENSIONS or any(size >= 1 << 63 for size in sizes):
        raise _DamageError("a tensor has a shape that none can have")
    return tuple(sizes)


def _whole(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise _DamageError("the index has a damaged entry")
    return value


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _DamageError("the index has a damaged entry")
    return value


def _checksum_table() -> tuple[int, ...]:
    """Remainders of all bytes by the polynomial of CRC-32C (RFC 3720, appendix B.4)."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CHECKSUMS = _checksum_table()


def _masked_checksum(data: bytes) -> int:
    """CRC-32C, changed as LevelDB stores it."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = _CHECKSUMS[(checksum ^ byte) & 0xFF] ^ checksum >> 8
    checksum ^= 0xFFFFFFFF
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
