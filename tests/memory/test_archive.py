"""The archive of step traces: what is written is read, damage is noticed, the manifest is true."""

from __future__ import annotations

import dataclasses
import io
import random
import zipfile

import pytest

from bertbench.memory.traces.archive import (
    FORMAT,
    Archive,
    archive_path,
    other_tensorflow,
    package_archive,
    read_archive,
    read_trace,
    write_archive,
)
from bertbench.memory.traces.build.sources import sources_hash
from finetune.errors import InputError

PATTERN = "squad nested at once"


def test_what_is_written_is_read() -> None:
    trace, manifest = read_trace(PATTERN), package_archive().manifest
    assert trace is not None
    traces = {PATTERN: trace, "other": dataclasses.replace(trace, peaks=())}
    assert read_archive(write_archive(traces, manifest)) == (traces, manifest)


def test_the_packages_archive_is_what_the_code_writes() -> None:
    data = archive_path().read_bytes()
    assert write_archive(*read_archive(data)) == data


def test_another_format_is_refused() -> None:
    manifest = dataclasses.replace(package_archive().manifest, format=FORMAT + 1)
    with pytest.raises(InputError, match=f"format {FORMAT + 1} instead of {FORMAT}"):
        read_archive(write_archive({}, manifest))
    assert read_trace("telepathic") is None


def test_no_flipped_bit_in_the_packages_archive_is_believed() -> None:
    whole = archive_path().read_bytes()
    expected = read_trace(PATTERN)
    assert expected is not None
    refused: list[str] = []
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entry = archive.getinfo(f"{PATTERN}.json")
    first, size = entry.header_offset, entry.compress_size
    rng = random.Random(1)
    places = [first + rng.randrange(40 + len(entry.filename), size) for _ in range(20)]
    places += [len(whole) - 1 - rng.randrange(22) for _ in range(10)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        try:
            assert Archive(bytes(damaged)).trace(PATTERN) in (expected, None)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) >= 20
    assert all("install bertbench again" in message for message in refused)


def test_the_traces_are_of_these_sources() -> None:
    assert package_archive().manifest.sources == sources_hash(), (
        "what a step allocates may have changed: run `benchmarks/record_step_traces.py --confirm`, "
        "and record the traces again if it finds a difference (docs/recording-traces.md)"
    )


def test_another_minor_version_of_tensorflow_is_noticed() -> None:
    recorded = package_archive().manifest.tensorflow
    major, minor, *_ = recorded.split(".")
    assert other_tensorflow(recorded) is None
    assert other_tensorflow(f"{major}.{minor}.99") is None
    later = f"{major}.{int(minor) + 1}.0"
    assert other_tensorflow(later) == later
    assert other_tensorflow(f"{int(major) + 1}.{minor}.0") is not None
