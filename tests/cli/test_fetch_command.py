"""Tests of `bertbench fetch`, in processes of its own, against a server on this machine."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bertbench.fetch.catalogue import ENTRIES
from helpers.file_server import MODEL, FileServer, Served, serving, sha256, unused_url, zipped

TINY_ZIP = "uncased_L-2_H-128_A-2.zip"
TINY_PATH = f"/storage.googleapis.com/bert_models/2020_02_20/{TINY_ZIP}"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as server:
        yield server


def bertbench(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bertbench", "fetch", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "no_proxy": "*", **more},
    )


def test_help_has_an_example() -> None:
    result = bertbench("--help")
    assert "bertbench fetch squad-v1.1" in result.stdout.partition("Usage")[2]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_list_and_its_json(tmp_path: Path) -> None:
    result = bertbench("--json", tmp_path / "list.json")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    (base,) = (line.split() for line in lines if line.startswith("bert-base-uncased "))
    assert base == ["bert-base-uncased", "about", "391", "MiB", "published", "Apache-2.0"]
    (tiny,) = (line.split() for line in lines if line.startswith("bert-tiny "))
    assert tiny[4:] == ["-", "Apache-2.0"]
    entries = json.loads((tmp_path / "list.json").read_text())["entries"]
    assert [entry["name"] for entry in entries] == [entry.name for entry in ENTRIES]
    squad = entries[0]
    assert (squad["size_bytes"], squad["licence"]) == (35142551, "CC BY-SA 4.0")

    result = bertbench("--list", "squad-v1.1", "--to", tmp_path / "to")
    for word in (squad["sources"][0]["url"], squad["sources"][0]["sha256"],
                 f"{tmp_path}/to/squad/train-v1.1.json"):  # fmt: skip
        assert word in result.stdout
    assert not (tmp_path / "to").exists()


def test_the_verb_fetches_and_says_how_to_use_it(server: FileServer, tmp_path: Path) -> None:
    server.files[f"/copies{TINY_PATH}"] = Served(zipped(MODEL), has_md5=True)
    arguments = ("bert-tiny", "--to", tmp_path / "my data", "--json", tmp_path / "result.json")
    result = bertbench(*arguments, BERTBENCH_MIRROR=f"{server.url}/copies")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "my data" / TINY_ZIP.removesuffix(".zip")
    digest = sha256(zipped(MODEL))
    assert f"SHA-256 {digest} (none is published; MD5 and length" in result.stdout
    assert f"use: bertbench run squad --model '{folder}'\n" in result.stdout
    (fetched,) = json.loads((tmp_path / "result.json").read_text())["fetched"]
    assert fetched["files"][0]["sha256"] == digest
    assert (fetched["name"], fetched["was_there"]) == ("bert-tiny", False)
    again = bertbench(*arguments)
    assert "bert-tiny: was there already" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bert-bse"], ["bert-bse", "did you mean bert-base?"]),
        (["squad-v1.1", "--mirror", "/mnt"], ["/mnt", "https://"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    result = bertbench(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line


def test_without_network_one_line_says_what_to_do(tmp_path: Path) -> None:
    mirror = unused_url()
    result = bertbench("squad-v1.1", "--to", tmp_path, "--mirror", mirror)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    url = "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json"
    assert line.startswith(f"bertbench: cannot reach {mirror.removeprefix('http://')} (")
    assert f"download {url} by hand to {tmp_path}/squad/train-v1.1.json" in line


def test_ctrl_c_keeps_what_arrived_and_the_same_command_continues(
    server: FileServer, tmp_path: Path
) -> None:
    content = zipped({**MODEL, "bert_model.ckpt.data-00000-of-00001": "x" * 3_000_000})
    stalled = Served(content, cuts=[2_000_000], stalls=threading.Event())
    server.files[TINY_PATH] = stalled
    arguments = ["bert-tiny", "--to", str(tmp_path), "--mirror", server.url]
    process = subprocess.Popen(
        [sys.executable, "-m", "bertbench", "fetch", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "no_proxy": "*"},
        # A shell's background jobs ignore Ctrl-C, and so would their children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    part = tmp_path / f"{TINY_ZIP}.part"
    deadline = time.monotonic() + 60
    while not (server.requests and server.requests[0].sent_bytes):
        assert time.monotonic() < deadline, "the download does not begin"
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert stalled.stalls is not None
    stalled.stalls.set()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == (
        "bertbench: interrupted; the bytes that have arrived are kept, the same command continues"
    )
    kept = part.stat().st_size
    assert kept > 1_000_000
    assert bertbench(*arguments).returncode == 0
    assert server.requests[1].range == f"bytes={kept}-"
    assert server.requests[1].sent_bytes == len(content) - kept
    assert not part.exists()
