"""A server of files on this machine that can break off, change its files, or ignore ranges."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import io
import re
import socket
import threading
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = {"bert_config.json": "{}", "vocab.txt": "[PAD]\n", "bert_model.ckpt.index": "index"}


@dataclasses.dataclass
class Served:
    """A file; `cuts` holds how many bytes each answer to come sends, None for all of them."""

    content: bytes
    etag: str | None = '"1"'
    last_modified: str | None = None
    has_md5: bool = False
    has_ranges: bool = True
    honours_if_range: bool = True
    has_length: bool = True
    status: int = 200
    cuts: list[int | None] = dataclasses.field(default_factory=list)
    stalls: threading.Event | None = None


@dataclasses.dataclass
class Request:
    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    sent_bytes: int = 0


class FileServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Served] = {}
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        request = Request(self.path, self.headers["Range"], self.headers["If-Range"])
        self.server.requests.append(request)
        file = self.server.files.get(self.path)
        if file is None or file.status != 200:
            request.status = 404 if file is None else file.status
            self.send_error(request.status)
            return
        body, status, start = file.content, 200, 0
        match = re.fullmatch(r"bytes=(\d+)-", request.range or "")
        if file.honours_if_range and request.if_range not in (None, file.etag, file.last_modified):
            match = None
        if match and file.has_ranges:
            status, start = 206, int(match[1])
            if start >= len(file.content):
                request.status = 416
                self.send_error(416)
                return
            body = file.content[start:]
        request.status = status
        self.send_response(status)
        if status == 206:
            total = len(file.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if file.has_length:
            self.send_header("Content-Length", str(len(body)))
        if file.etag is not None:
            self.send_header("ETag", file.etag)
        if file.last_modified is not None:
            self.send_header("Last-Modified", file.last_modified)
        if file.has_md5:
            md5 = base64.b64encode(hashlib.md5(file.content).digest()).decode()
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={md5}")
        self.end_headers()
        cut = file.cuts.pop(0) if file.cuts else None
        sent = body[:cut]
        self.wfile.write(sent)
        request.sent_bytes = len(sent)
        if file.stalls is not None and cut is not None:
            self.wfile.flush()
            file.stalls.wait(30)
        self.close_connection = True


@contextlib.contextmanager
def serving() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def unused_url() -> str:
    """An address on this machine where nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zipped(files: Mapping[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return file.getvalue()
