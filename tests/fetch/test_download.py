"""Tests of bertbench.fetch.download, against a server on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pooch.core
import pytest

from bertbench.core.errors import WorkError
from bertbench.fetch import download as download_module
from bertbench.fetch.download import Download, download
from helpers.file_server import FileServer, Served, serving, unused_url

CONTENT = bytes(range(256)) * 5000
OTHER = CONTENT[::-1]
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download_module, "_PAUSES_SECONDS", ())
    with serving() as server:
        yield server


class Target:
    """Downloads `/file` of a server into a folder."""

    def __init__(self, folder: Path, server: FileServer) -> None:
        self.folder, self.server = folder, server
        self.path = folder / "file"
        self.part = folder / "file.part"

    def get(self, sha256: str | None = SHA256) -> Download:
        workspace = self.folder / "workspace"
        workspace.mkdir(exist_ok=True)
        try:
            return download(f"{self.server.url}/file", self.path, workspace, sha256)
        finally:
            assert os.listdir(workspace) == []
            workspace.rmdir()

    def left(self) -> list[str]:
        return sorted(os.listdir(self.folder))


@pytest.fixture
def target(tmp_path: Path, server: FileServer) -> Target:
    return Target(tmp_path, server)


def cut_once(target: Target, served: Served, at: int = 300_000) -> None:
    served.cuts = [at]
    target.server.files["/file"] = served
    with pytest.raises(WorkError, match=r"the connection to .* failed") as failure:
        target.get()
    assert f"closed at {at:,} of {len(CONTENT):,} bytes" in str(failure.value)
    assert f"{at:,} bytes of file.part are kept" in str(failure.value)
    assert target.part.read_bytes() == served.content[:at]
    assert target.left() == ["file.part", "file.part.json"]


def test_downloads_and_leaves_nothing_else(target: Target) -> None:
    target.server.files["/file"] = Served(CONTENT)
    assert target.get() == Download(SHA256, "SHA-256")
    assert target.path.read_bytes() == CONTENT
    assert target.left() == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.path.stat().st_mode & 0o777 == 0o666 & ~umask
    (request,) = target.server.requests
    assert (request.range, request.if_range) == (None, None)


def test_after_a_cut_only_the_rest_is_requested(target: Target) -> None:
    cut_once(target, Served(CONTENT))
    target.get()
    assert target.path.read_bytes() == CONTENT
    assert target.left() == ["file"]
    rest = target.server.requests[1]
    assert (rest.range, rest.if_range, rest.status) == ("bytes=300000-", '"1"', 206)
    assert rest.sent_bytes == len(CONTENT) - 300_000


@pytest.mark.parametrize("date", [None, "Tue, 06 Nov 2018 11:20:58 GMT"])
def test_a_weak_etag_is_no_proof_but_a_date_is(target: Target, date: str | None) -> None:
    cut_once(target, Served(CONTENT, etag='W/"1"', last_modified=date))
    target.get()
    rest = target.server.requests[1]
    assert (rest.range, rest.if_range) == ("bytes=300000-" if date else None, date)
    assert rest.status == (206 if date else 200)
    assert len(target.server.requests) == 2
    assert target.path.read_bytes() == CONTENT


def test_continues_by_itself_as_long_as_something_arrives(
    target: Target, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download_module, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    target.server.files["/file"] = Served(CONTENT, cuts=[100_000, 200_000, 5])
    target.get()
    assert target.path.read_bytes() == CONTENT
    ranges = [request.range for request in target.server.requests]
    assert ranges == [None, "bytes=100000-", "bytes=300000-", "bytes=300005-"]
    assert "continuing in 0 s" in capfd.readouterr().err

    target.path.unlink()
    target.server.requests.clear()
    target.server.files["/file"].cuts = [100_000, 0]
    with pytest.raises(WorkError, match=r"100,000 bytes of file\.part are kept"):
        target.get()
    assert len(target.server.requests) == 2


def test_a_file_that_changed_starts_again(target: Target) -> None:
    cut_once(target, Served(CONTENT))
    target.server.files["/file"] = Served(OTHER, etag='"2"')
    target.get(hashlib.sha256(OTHER).hexdigest())
    assert target.server.requests[1].status == 200
    assert target.path.read_bytes() == OTHER


@pytest.mark.parametrize("changed", [Served(OTHER, '"2"'), Served(OTHER[:-1], None)])
def test_a_server_that_ignores_if_range_cannot_mix_versions(
    target: Target, changed: Served
) -> None:
    cut_once(target, Served(CONTENT))
    changed.honours_if_range = False
    target.server.files["/file"] = changed
    target.get(hashlib.sha256(changed.content).hexdigest())
    assert [request.status for request in target.server.requests[1:]] == [206, 200]
    assert target.path.read_bytes() == changed.content


def test_a_server_without_ranges_starts_again(target: Target) -> None:
    cut_once(target, Served(CONTENT, has_ranges=False))
    target.get()
    assert target.server.requests[1].range == "bytes=300000-"
    assert target.server.requests[1].sent_bytes == len(CONTENT)
    assert target.path.read_bytes() == CONTENT


def test_a_part_without_its_record_or_of_another_address_is_not_continued(
    target: Target,
) -> None:
    cut_once(target, Served(CONTENT))
    record = target.folder / "file.part.json"
    record.write_text(record.read_text().replace("/file", "/elsewhere"))
    target.get()
    target.path.unlink()
    target.part.write_bytes(OTHER[:1000])
    target.get()
    assert [request.range for request in target.server.requests] == [None, None, None]
    assert target.path.read_bytes() == CONTENT


def test_a_file_that_shrank_under_a_longer_part_starts_again(target: Target) -> None:
    cut_once(target, Served(CONTENT))
    shorter = CONTENT[:1000]
    target.server.files["/file"] = Served(shorter, honours_if_range=False)
    target.get(hashlib.sha256(shorter).hexdigest())
    assert [request.status for request in target.server.requests[1:]] == [416, 200]
    assert target.path.read_bytes() == shorter


def test_a_wrong_checksum_leaves_nothing_under_the_name(target: Target) -> None:
    target.server.files["/file"] = Served(OTHER)
    with pytest.raises(WorkError) as failure:
        target.get()
    for word in ("file came from 127.0.0.1", "another SHA-256", SHA256, "not kept"):
        assert word in str(failure.value)
    assert target.left() == []
    target.server.files["/file"] = Served(CONTENT)
    target.get()
    assert target.server.requests[1].range is None


def test_a_wrong_checksum_leaves_the_old_file(target: Target) -> None:
    target.path.write_bytes(b"old")
    target.server.files["/file"] = Served(OTHER)
    with pytest.raises(WorkError):
        target.get()
    assert target.path.read_bytes() == b"old"


def test_without_a_checksum_the_servers_md5_counts(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.server.files["/file"] = Served(CONTENT, has_md5=True)
    assert target.get(None) == Download(SHA256, "server's MD5")

    target.path.unlink()
    append = download_module._append

    def damage(response: object, part: Path, *rest: object) -> None:
        append(response, part, *rest)  # type: ignore[arg-type]
        part.write_bytes(OTHER)

    monkeypatch.setattr(download_module, "_append", damage)
    with pytest.raises(WorkError, match=f"MD5 {hashlib.md5(OTHER).hexdigest()}, not"):
        target.get(None)
    assert target.left() == []


def test_the_md5_of_the_first_answer_counts_for_the_rest(target: Target) -> None:
    cut_once(target, Served(CONTENT, has_md5=True))
    assert target.get(None) == Download(SHA256, "server's MD5")


def test_without_any_checksum_it_says_so(target: Target) -> None:
    target.server.files["/file"] = Served(CONTENT)
    assert target.get(None) == Download(SHA256, "length")
    target.path.unlink()
    target.server.files["/file"] = Served(CONTENT, has_length=False)
    assert target.get(None) == Download(SHA256, "nothing")
    assert target.path.read_bytes() == CONTENT


def test_an_interrupted_verification_needs_no_second_download(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.server.files["/file"] = Served(CONTENT)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pooch.core, "hash_matches", interrupt)
        with pytest.raises(KeyboardInterrupt):
            target.get()
    assert target.left() == ["file.part", "file.part.json"]
    target.get()
    assert target.path.read_bytes() == CONTENT
    assert len(target.server.requests) == 1


def test_an_interruption_keeps_what_has_arrived(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.server.files["/file"] = Served(CONTENT)
    calls = []

    @contextlib.contextmanager
    def interrupting(*_: object) -> Iterator[Callable[..., None]]:
        def advance(*_: object) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        yield advance

    with monkeypatch.context() as patch:
        patch.setattr(download_module, "progress", interrupting)
        patch.setattr(download_module, "_CHUNK_BYTES", 10_000)
        with pytest.raises(KeyboardInterrupt):
            target.get()
    kept = target.part.stat().st_size
    assert 0 < kept <= 30_000
    target.get()
    assert target.server.requests[1].range == f"bytes={kept}-"
    assert target.path.read_bytes() == CONTENT


def test_out_of_reach_says_what_to_do(target: Target) -> None:
    url = f"{unused_url()}/dataset/file"
    with pytest.raises(WorkError) as failure:
        download(url, target.path, target.folder, SHA256)
    host = url.split("/")[2]
    message = str(failure.value)
    assert message.startswith(f"cannot reach {host} (Connection refused); ")
    assert f"download {url} by hand to {target.path}" in message
    assert "\n" not in message
    assert target.left() == []


@pytest.mark.parametrize("status", [403, 404, 503])
def test_a_refusal_is_named(target: Target, status: int) -> None:
    target.server.files["/file"] = Served(CONTENT, status=status)
    with pytest.raises(WorkError, match=rf"answers {status} .* by hand to .*file"):
        target.get()
    assert target.left() == []


def test_a_refusal_keeps_an_earlier_part(target: Target) -> None:
    cut_once(target, Served(CONTENT))
    target.server.files["/file"].status = 503
    with pytest.raises(WorkError, match="503"):
        target.get()
    assert target.part.stat().st_size == 300_000


def test_a_mirror_has_the_host_in_its_path(target: Target) -> None:
    target.server.files["/copies/example.org/data/file"] = Served(CONTENT)
    mirror = f"{target.server.url}/copies/"
    download("https://example.org/data/file", target.path, target.folder, SHA256, mirror=mirror)
    assert target.path.read_bytes() == CONTENT
