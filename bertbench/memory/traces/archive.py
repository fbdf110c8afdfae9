"""The archive of step traces that comes with the package, and its manifest.

The archive is a ZIP file with a JSON file for each trace, so that one is read without the others,
and with `manifest.json`. The manifest says under which TensorFlow the traces were recorded, and of
which sources. The minor version of TensorFlow decides whether a prediction needs a margin, see
`bertbench.memory.prediction.predict_memory`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from bertbench.hardware.tensorflow_support import tensorflow_version
from bertbench.memory.traces.trace import (
    Allocate,
    CandidatePeak,
    Free,
    Item,
    PerChunk,
    PerLayer,
    Size,
    StepTrace,
    Term,
)
from finetune.errors import InputError
from finetune.storage.json_files import build, json_text, parse_json

FORMAT = 2
"""Number of the format, raised by one with every change of it. The first format had no manifest."""

_FILE, _MANIFEST = "step_traces.zip", "manifest.json"
_DAMAGE = (
    OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, LookupError,
    TypeError, ValueError, OverflowError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""Errors that reading a damaged archive raises; which one depends on the damaged byte."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Where the traces of an archive come from.

    Attributes:
        format: number of the archive's format.
        tensorflow: version of TensorFlow that the steps were recorded with.
        recorded: day of the recordings, in ISO 8601.
        confirmed: day on which real steps were last compared with the traces.
        sources: hash of the sources that decide what a step allocates, see
            `bertbench.memory.traces.build.sources`.
    """

    format: int
    tensorflow: str
    recorded: str
    confirmed: str
    sources: str


def archive_path() -> Path:
    """The package's archive."""
    return Path(str(resources.files("bertbench.memory.traces").joinpath(_FILE)))


def write_archive(traces: Mapping[str, StepTrace], manifest: Manifest) -> bytes:
    """Make an archive of traces by their patterns."""
    values = {f"{name}.json": _trace_values(traces[name]) for name in sorted(traces)}
    values[_MANIFEST] = dataclasses.asdict(manifest)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, its_values in values.items():
            text = json_text(its_values, separators=(",", ":"))
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED, 9)
    return written.getvalue()


def read_archive(data: bytes) -> tuple[dict[str, StepTrace], Manifest]:
    """Read all that `write_archive` wrote.

    Raises:
        InputError: the archive is damaged, or has another format.
    """
    archive = Archive(data)
    traces = {name: archive.trace(name) for name in archive.patterns}
    return {name: trace for name, trace in traces.items() if trace is not None}, archive.manifest


class Archive:
    """An archive of traces, which are read one by one.

    Args:
        data: what `write_archive` made.

    Attributes:
        patterns: names of the traces.

    Raises:
        InputError: the archive is damaged.
    """

    def __init__(self, data: bytes) -> None:
        with _damage_explained():
            self._file = zipfile.ZipFile(io.BytesIO(data))
            names = self._file.namelist()
        self.patterns = [name.removesuffix(".json") for name in names if name != _MANIFEST]

    def trace(self, pattern: str) -> StepTrace | None:
        """Read a trace.

        Returns:
            None if the archive does not have it.

        Raises:
            InputError: the archive is damaged.
        """
        if pattern not in self.patterns:
            return None
        with _damage_explained():
            # The archive has a checksum of each file, so that a damaged one raises an error.
            return _trace(json.loads(self._file.read(f"{pattern}.json")))

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            InputError: the archive is damaged, or has another format.
        """
        with _damage_explained():
            manifest = build(Manifest, parse_json(self._file.read(_MANIFEST).decode()))
            if manifest.format != FORMAT:
                raise ValueError(f"format {manifest.format} instead of {FORMAT}")
            return manifest


@contextlib.contextmanager
def _damage_explained() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise InputError(
            f"damaged ({error})", path=str(archive_path()), hint="install bertbench again"
        ) from error


@functools.cache
def package_archive() -> Archive:
    """Open the archive that comes with the package; see `Archive` for errors."""
    return Archive(archive_path().read_bytes())


@functools.cache
def read_trace(pattern: str) -> StepTrace | None:
    """Read one of the package's traces, see `Archive.trace`.

    Args:
        pattern: its name, see `bertbench.memory.traces.step_requests.pattern_of`.
    """
    return package_archive().trace(pattern)


@functools.cache
def other_tensorflow(installed: str | None = None) -> str | None:
    """Version of TensorFlow that is used, if the traces were recorded with another one.

    Two versions count as the same if their major and minor numbers are the same. TensorFlow is not
    imported.

    Args:
        installed: version that is used; None takes that of the installed package.

    Returns:
        None if the versions are the same, or if no TensorFlow is installed.
    """
    installed = installed or tensorflow_version()
    if installed is None or _minor(installed) == _minor(package_archive().manifest.tensorflow):
        return None
    return installed


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _trace(values: Mapping[str, Any]) -> StepTrace:
    return StepTrace(
        tuple(Size(a, b, tuple(sorted(powers.items()))) for a, b, powers in values["sizes"]),
        tuple(values["free_order"]),
        tuple(_items(values["items"])),
        tuple(
            CandidatePeak(
                phase,
                tuple((kind, count) for kind, count in min_layers),
                None if chunk is None else (chunk[0], chunk[1]),
                tuple(
                    Term(size, policy, ((a, b), (c, d), (e, f)))
                    for size, policy, a, b, c, d, e, f in terms
                ),
            )
            for phase, min_layers, chunk, terms in values["peaks"]
        ),
    )


def _items(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, int):
            yield Free(value) if value >= 0 else Free(~value, True)
        elif isinstance(value, list):
            yield Allocate(*value)
        elif "policy" in value:
            yield PerChunk(value["policy"], tuple(_items(value["body"])))
        else:
            yield PerLayer(value["kind"], value["extra"], tuple(_items(value["body"])))


def _trace_values(trace: StepTrace) -> dict[str, Any]:
    return {
        "sizes": [[s.constant_bytes, s.factor, dict(s.powers)] for s in trace.sizes],
        "free_order": trace.free_order,
        "items": [_item_values(item) for item in trace.items],
        "peaks": [
            [
                peak.phase,
                peak.min_layers,
                peak.chunk,
                [[t.size, t.policy, *(n for pair in t.counts for n in pair)] for t in peak.terms],
            ]
            for peak in trace.peaks
        ],
    }


def _item_values(item: Item) -> Any:
    """[site, size] of an `Allocate`, site of a `Free`, ~site of a `Free` with `all_of_layer`."""
    if isinstance(item, Allocate):
        return [item.site, item.size]
    if isinstance(item, Free):
        return ~item.site if item.all_of_layer else item.site
    body = [_item_values(inner) for inner in item.body]
    if isinstance(item, PerChunk):
        return {"policy": item.policy, "body": body}
    return {"kind": item.kind, "extra": item.extra, "body": body}
