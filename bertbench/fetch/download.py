"""Downloads over HTTP that continue after an interruption, and are verified.

pooch downloads a file, verifies it and gives it its name, but it always starts at the first byte.
The downloader that is passed to it here keeps the bytes that have arrived in `NAME.part`. It keeps
what the server said about the file in `NAME.part.json`, so that no rest of another version of the
file is appended.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import http.client
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import AbstractContextManager
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import pooch

from bertbench.core.errors import WorkError
from bertbench.core.progress import Advance, progress
from bertbench.core.terminal import say
from bertbench.core.units import MIB_BYTES
from finetune.errors import InputError
from finetune.storage.files import write_atomically
from finetune.storage.json_files import build, json_text, load_object

Checked = Literal["SHA-256", "server's MD5", "length", "nothing"]
"""What a downloaded file was compared with."""

_TIMEOUT_SECONDS = 30.0
_PAUSES_SECONDS = (1.0, 5.0, 15.0)
_CHUNK_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class Download:
    """A downloaded file.

    Attributes:
        sha256: its checksum.
        checked: what the file was compared with.
    """

    sha256: str
    checked: Checked


@dataclasses.dataclass(frozen=True)
class _Remote:
    """A file as its server describes it.

    Attributes:
        url: its address.
        total_bytes: its size; None if the server does not send it.
        validator: the strong ETag, or else the date, that identifies this version of the file.
        md5: its MD5 in hexadecimal, if the server sends it.
    """

    url: str
    total_bytes: int | None
    validator: str | None
    md5: str | None


class _ConnectionError(Exception):
    """The connection failed; the bytes that have arrived are kept."""


def download(
    url: str,
    path: Path,
    workspace: Path,
    sha256: str | None = None,
    named_by: str = "is published",
    mirror: str | None = None,
) -> Download:
    """Download a file, or the rest of it.

    Args:
        url: its address.
        path: where to put it; an existing file is replaced once the new one is verified.
        workspace: an empty folder on the same file system.
        sha256: its checksum; None compares the file with the server's MD5 and length instead.
        named_by: where that checksum comes from, as the end of a sentence.
        mirror: an address that has the files of all servers under `HOST/PATH`.

    Raises:
        WorkError: the server cannot be reached or the connection fails (the bytes that have
            arrived are kept), the server refuses, or the file has another checksum (nothing is
            kept).
    """
    location = url if mirror is None else f"{mirror.rstrip('/')}/{url.partition('://')[2]}"
    part = path.with_name(f"{path.name}.part")
    remotes: list[_Remote] = []

    def fetch_rest(_url: str, temporary: str, _pooch: Any) -> None:
        remote = _complete(location, part, by_hand=f"download {url} by hand to {path}")
        remotes.append(remote)
        if sha256 is None and remote.md5 is not None:
            found = pooch.file_hash(str(part), alg="md5")
            if found != remote.md5:
                raise ValueError(f"MD5 {found}, not the {remote.md5} that the server names")
        _link_or_move(part, Path(temporary))

    path.parent.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    try:
        verified = pooch.retrieve(
            location,
            None if sha256 is None else f"sha256:{sha256}",
            fname="verified",
            path=workspace.resolve(),
            downloader=fetch_rest,
        )
    except ValueError as error:
        _discard(part)
        host = urllib.parse.urlsplit(location).netloc
        found = str(error)
        if sha256 is not None:
            found = f"another SHA-256 than the {sha256} that {named_by}"
        raise WorkError(
            f"{path.name} came from {host} with {found}; it was not kept, try again later"
        ) from error
    os.replace(verified, path)
    _discard(part)
    if sha256 is not None:
        return Download(sha256, "SHA-256")
    return _without_checksum(path, remotes[-1])


def _link_or_move(part: Path, target: Path) -> None:
    """Give a complete file a second name, so that an interrupted verification does not lose it."""
    target.unlink()
    try:
        os.link(part, target)
    except OSError:  # a file system without links
        os.replace(part, target)


def _without_checksum(path: Path, remote: _Remote) -> Download:
    """Describe a downloaded file whose checksum was not known."""
    digest: str = pooch.file_hash(str(path), alg="sha256")
    if remote.md5 is not None:
        return Download(digest, "server's MD5")
    return Download(digest, "nothing" if remote.total_bytes is None else "length")


def _complete(url: str, part: Path, by_hand: str) -> _Remote:
    """Complete a partial file; try again after a failure, as long as more bytes arrive."""
    host = urllib.parse.urlsplit(url).netloc
    for pause_seconds in (*_PAUSES_SECONDS, None):
        before = _size(part)
        try:
            return _receive(url, part)
        except urllib.error.HTTPError as error:
            raise WorkError(
                f"{host} answers {error.code} {error.reason} for {url}; try again later, or "
                f"{by_hand} and run the same command again"
            ) from error
        except _ConnectionError as error:
            arrived = _size(part)
            if pause_seconds is not None and arrived > before:
                say(f"{part.name}: {error}; continuing in {pause_seconds:.0f} s")
                time.sleep(pause_seconds)
                continue
            if arrived:
                raise WorkError(
                    f"the connection to {host} failed ({error}); {arrived:,} bytes of {part.name} "
                    f"are kept, the same command continues, or {by_hand}"
                ) from error
            raise WorkError(
                f"cannot reach {host} ({error}); {by_hand} and run the same command again"
            ) from error
    raise AssertionError("the last try returns or raises")


def _receive(url: str, part: Path) -> _Remote:
    """Request the missing bytes of a partial file, and append them."""
    remote = _read_state(part, url)
    offset = 0 if remote is None or remote.validator is None else _size(part)
    if remote is not None and remote.total_bytes is not None:
        if offset and offset == remote.total_bytes:
            return remote
        if offset > remote.total_bytes:
            offset = 0
    headers = {"User-Agent": "bertbench", "Accept-Encoding": "identity"}
    if offset and remote is not None and remote.validator is not None:
        headers |= {"Range": f"bytes={offset}-", "If-Range": remote.validator}
    try:
        response = _open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not offset:
            raise
        _discard(part)
        return _receive(url, part)
    with contextlib.closing(response):
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            # Some servers ignore If-Range, and send a range of another version.
            if remote is None or not _is_continuation(response.headers, remote, offset):
                _discard(part)
                return _receive(url, part)
        else:
            offset = 0
            remote = _describe(url, response.headers)
            _discard(part)
            write_atomically(_state_path(part), json_text(dataclasses.asdict(remote)) + "\n")
        _append(response, part, remote, offset)
    return remote


def _append(response: http.client.HTTPResponse, part: Path, remote: _Remote, offset: int) -> None:
    total = remote.total_bytes
    size = offset
    began = time.monotonic()
    shown: AbstractContextManager[Advance] = contextlib.nullcontext(lambda done, note: None)
    if total is not None:
        label = part.name.removesuffix(".part")
        shown = progress(label, math.ceil(total / MIB_BYTES), "MiB", offset // MIB_BYTES)
    with shown as advance, part.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        while True:
            try:
                chunk = response.read1(_CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _ConnectionError(_reason(error)) from error
            if not chunk:
                break
            file.write(chunk)
            size += len(chunk)
            rate = (size - offset) / MIB_BYTES / max(time.monotonic() - began, 1e-3)
            rounded = math.ceil if size == total else math.floor
            advance(rounded(size / MIB_BYTES), f"{rate:.1f} MiB/s")
        file.flush()
        os.fsync(file.fileno())
    if total is not None and size != total:
        raise _ConnectionError(f"closed at {size:,} of {total:,} bytes")


def _open(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers=dict(headers))
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(
            request, timeout=_TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionError(_reason(error)) from error
    return response


def _describe(url: str, headers: Message) -> _Remote:
    etag = headers.get("ETag")
    # A weak ETag stands for the same content, but not for the same bytes.
    validator = headers.get("Last-Modified") if etag is None or etag.startswith("W/") else etag
    length = headers.get("Content-Length")
    md5 = None
    for value in headers.get_all("x-goog-hash", []):
        match = re.search(r"md5=([A-Za-z0-9+/]+=*)", value)
        if match is not None:
            with contextlib.suppress(binascii.Error):
                md5 = base64.b64decode(match[1]).hex()
    return _Remote(url, _size_or_none(length), validator, md5)


def _size_or_none(text: str | None) -> int | None:
    """Read a number of bytes from a header; None if it is not one."""
    return int(text) if text and text.isdecimal() and len(text) < 19 else None


def _is_continuation(headers: Message, remote: _Remote, offset: int) -> bool:
    match = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", headers.get("Content-Range", ""))
    if match is None or int(match[1]) != offset:
        return False
    if match[2] != "*" and remote.total_bytes not in (None, int(match[2])):
        return False
    etag = headers.get("ETag", "W/")
    return etag.startswith("W/") or etag == remote.validator


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_state(part: Path, url: str) -> _Remote | None:
    try:
        remote = build(_Remote, load_object(_state_path(part), what="the state of a download"))
    except InputError:
        return None
    return remote if remote.url == url else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)
