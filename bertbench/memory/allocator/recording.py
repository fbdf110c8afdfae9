"""Recordings: what a process asked of TensorFlow's allocator, and how a ledger keeps that."""

from __future__ import annotations

import base64
import dataclasses
import zlib

from bertbench.core.units import MIB_BYTES
from finetune.storage.json_files import json_text, parse_json

_RECORDING_BYTES = 256 * MIB_BYTES
"""Largest text that is taken for a recording; that of a BERT-Large step is below 3 MiB."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a process asked of an allocator, from its first request to its last.

    Attributes:
        events: in order: n for the n-th allocation, ~n for the release of it.
        sizes: requested bytes of each allocation.
        operations: name of the operation that made each allocation, or "".
    """

    events: tuple[int, ...]
    sizes: tuple[int, ...]
    operations: tuple[str, ...]


def recording_to_text(recording: Recording) -> str:
    """Write a recording as compressed text, to send it to another process or to keep it."""
    names = sorted(set(recording.operations))
    index = {name: number for number, name in enumerate(names)}
    values = [
        recording.events,
        recording.sizes,
        names,
        [index[name] for name in recording.operations],
    ]
    return base64.b85encode(zlib.compress(json_text(values).encode(), 6)).decode()


def recording_from_text(text: str) -> Recording:
    """Read what `recording_to_text` wrote.

    Raises:
        ValueError: the text is no recording, or too long for one.
    """
    try:
        decompress = zlib.decompressobj()
        data = decompress.decompress(base64.b85decode(text), _RECORDING_BYTES)
        if not decompress.eof:
            raise ValueError("cut short, or too large")
        events, sizes, names, numbers = parse_json(data.decode())
        operations = tuple(str(names[number]) for number in numbers)
        recording = Recording(tuple(events), tuple(sizes), operations)
        _check_recording(recording)
    except (zlib.error, TypeError, LookupError, ValueError) as error:
        raise ValueError(f"not a recording of allocations ({error})") from error
    return recording


def _check_recording(recording: Recording) -> None:
    """Refuse what no allocator can have been asked, such as the release of nothing."""
    begun, live = 0, set()
    for event in recording.events:
        if event == begun:
            live.add(event)
            begun += 1
        elif ~event in live:
            live.remove(~event)
        else:
            raise ValueError(f"event {event} out of order")
    if not begun == len(recording.sizes) == len(recording.operations):
        raise ValueError("the numbers of sizes and of allocations differ")
    if any(type(size) is not int or size < 0 for size in recording.sizes):
        raise ValueError("a size that is no number of bytes")
