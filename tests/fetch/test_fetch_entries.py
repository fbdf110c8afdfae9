"""Tests of bertbench.fetch.fetch and its catalogue, against a server on this machine."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bertbench.core.errors import WorkError
from bertbench.fetch import download
from bertbench.fetch import fetch as fetch_module
from bertbench.fetch.catalogue import ENTRIES, GROUPS, Entry, Source, find_entries
from bertbench.fetch.fetch import fetch
from finetune.errors import InputError
from finetune.spec.config import PRESETS, preset
from helpers.file_server import MODEL, FileServer, Served, serving, sha256, zipped


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_PAUSES_SECONDS", ())
    with serving() as server:
        yield server


Make = Callable[..., Entry]


@pytest.fixture
def model(server: FileServer) -> Make:
    """An entry whose archive the server has."""

    def make(content: bytes | None = None, **changes: object) -> Entry:
        server.files["/m.zip"] = Served(zipped(MODEL) if content is None else content)
        values = {
            "name": "m",
            "what": "a model",
            "licence": "",
            "folder": "m",
            "sources": (Source(f"{server.url}/m.zip", "m.zip"),),
            "expected": tuple(MODEL),
        }
        return Entry(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def plain(server: FileServer) -> Entry:
    server.files["/a.json"] = Served(b"{}")
    source = Source(f"{server.url}/a.json", "data/a.json", 2, sha256(b"{}"))
    return Entry("a", "a file", "", "data", (source,), preparation="none")


def test_a_file_that_is_there_and_right_is_not_downloaded_again(
    plain: Entry, server: FileServer, tmp_path: Path
) -> None:
    first = fetch(plain, tmp_path)
    assert (first.was_there, first.files[0].downloaded) == (False, True)
    assert first.files[0].checked == "published SHA-256"
    assert tree(tmp_path) == {
        "data/a.json": "{}",
        "SHA256SUMS": f"{sha256(b'{}')}  data/a.json\n",
    }
    second = fetch(plain, tmp_path)
    assert (second.was_there, second.files[0].downloaded) == (True, False)
    assert len(server.requests) == 1


def test_a_file_put_there_by_hand_is_verified_and_used(
    plain: Entry, server: FileServer, tmp_path: Path
) -> None:
    path = tmp_path / "data" / "a.json"
    path.parent.mkdir()
    path.write_text("{}")
    assert fetch(plain, tmp_path).was_there
    path.write_text("[]")
    with pytest.raises(InputError) as failure:
        fetch(plain, tmp_path)
    assert str(failure.value) == (
        f"{path}: SHA-256 {sha256(b'[]')}, not the {sha256(b'{}')} that is published; delete the "
        "file, or --force replaces it"
    )
    assert (path.read_text(), server.requests) == ("[]", [])
    assert not fetch(plain, tmp_path, force=True).was_there
    assert path.read_text() == "{}"


def test_a_folder_of_files_that_may_not_be_written_to_is_enough(
    plain: Entry, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(plain, tmp_path)
    monkeypatch.setattr(fetch_module, "_workspace", None)
    assert fetch(plain, tmp_path).was_there


def test_an_archive_becomes_a_folder_and_goes(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    entry = model(zipped({f"inner/{name}": text for name, text in MODEL.items()}))
    server.files["/m.zip"].has_md5 = True
    result = fetch(entry, tmp_path)
    assert (result.was_there, result.folder) == (False, tmp_path / "m")
    assert result.files[0].checked == "server's MD5"
    archive_sum = sha256(server.files["/m.zip"].content)
    sums = "".join(f"{sha256(MODEL[name].encode())}  {name}\n" for name in sorted(MODEL))
    assert tree(tmp_path) == {
        "SHA256SUMS": f"{archive_sum}  m.zip\n",
        "m/SHA256SUMS": sums,
        **{f"m/{name}": text for name, text in MODEL.items()},
    }
    assert fetch(entry, tmp_path).was_there
    assert len(server.requests) == 1


@pytest.mark.parametrize("damage", ["changed", "deleted"])
def test_a_folder_that_is_not_as_unpacked_is_replaced_only_when_asked(
    model: Make, server: FileServer, tmp_path: Path, damage: str
) -> None:
    entry = model()
    fetch(entry, tmp_path)
    (tmp_path / "m" / "own.txt").write_text("the user's")
    assert fetch(entry, tmp_path).was_there
    vocabulary = tmp_path / "m" / "vocab.txt"
    vocabulary.write_text("x") if damage == "changed" else vocabulary.unlink()
    with pytest.raises(InputError, match=rf"{tmp_path}/m: vocab\.txt .*--force replaces it"):
        fetch(entry, tmp_path)
    assert (tmp_path / "m" / "own.txt").exists()
    assert len(server.requests) == 1
    fetch(entry, tmp_path, force=True)
    assert tree(tmp_path / "m").keys() == {*MODEL, "SHA256SUMS"}
    assert sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "m"]


def test_a_folder_of_something_else_is_left_alone(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="was not put there by `bertbench fetch`"):
        fetch(model(), tmp_path)
    assert tree(tmp_path) == {"m/thesis.txt": ""}
    assert server.requests == []


def test_files_in_an_archive_must_be_as_published(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    members = {name: sha256(text.encode()) for name, text in MODEL.items()}
    entry = model(members={**members, "vocab.txt": "0" * 64})
    with pytest.raises(WorkError, match=r"m\.zip from .*vocab\.txt does not have the SHA-256 000"):
        fetch(entry, tmp_path)
    assert tree(tmp_path) == {"SHA256SUMS": ""}
    assert fetch(model(members=members), tmp_path).members_checked


def test_a_folder_unpacked_by_hand_is_accepted_by_its_published_checksums(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    for name, text in MODEL.items():
        (tmp_path / "m" / name).write_text(text)
    entry = model(members={name: sha256(text.encode()) for name, text in MODEL.items()})
    assert fetch(entry, tmp_path).was_there
    (tmp_path / "m" / "vocab.txt").write_text("other")
    with pytest.raises(InputError, match="vocab"):
        fetch(entry, tmp_path)
    assert server.requests == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "cannot be unpacked"),
        (zipped({**MODEL, "../evil": ""}), "a path outside of the folder"),
        (zipped({"README": ""}), "does not hold m: bert_config.json is missing"),
    ],
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_an_archive_that_will_not_do_leaves_nothing(
    model: Make, server: FileServer, tmp_path: Path, content: bytes, words: str, by_hand: bool
) -> None:
    entry = model(content)
    root = tmp_path / "root"
    root.mkdir()
    if by_hand:
        (root / "m.zip").write_bytes(content)
    error = InputError if by_hand else WorkError
    with pytest.raises(error, match=re.escape(words)) as failure:
        fetch(entry, root)
    assert str(root / "m.zip" if by_hand else f"{server.url}/m.zip") in str(failure.value)
    assert not (tmp_path / "evil").exists()
    assert set(os.listdir(root)) == ({"m.zip"} if by_hand else {"SHA256SUMS"})
    # Neither the refused archive nor a note of its checksum stands in the way of a good one.
    (root / "m.zip").unlink(missing_ok=True)
    assert not fetch(model(), root).was_there


def test_an_archive_put_there_by_hand_is_used_and_stays(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "m.zip").write_bytes(zipped(MODEL))
    result = fetch(model(), tmp_path)
    assert (result.files[0].checked, result.files[0].downloaded) == ("nothing", False)
    assert (tmp_path / "m.zip").exists()
    assert server.requests == []
    assert f"{sha256(zipped(MODEL))}  m.zip" in (tmp_path / "SHA256SUMS").read_text()


def test_a_checksum_seen_before_binds_later_downloads(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    fetch(model(), tmp_path)
    changed = zipped({**MODEL, "vocab.txt": "other\n"})
    for path in (tmp_path / "m").iterdir():
        path.unlink()
    (tmp_path / "m").rmdir()
    with pytest.raises(WorkError, match=r"SHA256SUMS names \(--force accepts another\)"):
        fetch(model(changed), tmp_path)
    assert not (tmp_path / "m").exists()
    assert fetch(model(changed), tmp_path, force=True).files[0].checked == "length"
    assert (tmp_path / "m" / "vocab.txt").read_text() == "other\n"
    assert sha256(changed) in (tmp_path / "SHA256SUMS").read_text()


def test_a_failed_replacement_leaves_what_was_there(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    fetch(model(), tmp_path)
    (tmp_path / "m" / "vocab.txt").write_text("mine")
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(WorkError):
        fetch(model(b"<html>"), tmp_path, force=True)
    assert (tmp_path / "m" / "vocab.txt").read_text() == "mine"


def test_mrpc_becomes_a_folder_of_glue(server: FileServer, tmp_path: Path) -> None:
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    contents = {
        "train.txt": f"{header}1\t1\t2\tA\tB\n0\t3\t4\tC\tD\n".encode(),
        "test.txt": f"{header}1\t5\t6\tE\tF\n".encode(),
        "ids.tsv": b"3\t4\n",
    }
    sources = []
    for name, content in contents.items():
        server.files[f"/{name}"] = Served(content)
        sources.append(Source(f"{server.url}/{name}", name, len(content), sha256(content)))
    entry = Entry("mrpc", "", "", "glue/MRPC", tuple(sources), preparation="mrpc")
    fetch(entry, tmp_path)
    assert tree(tmp_path / "glue" / "MRPC").keys() == {
        "SHA256SUMS", "dev.tsv", "test.tsv", "train.tsv",
    }  # fmt: skip
    assert (tmp_path / "glue/MRPC/dev.tsv").read_text() == f"{header}0\t3\t4\tC\tD\n"
    assert sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "glue"]
    assert fetch(entry, tmp_path).was_there


def test_two_at_a_time_in_a_folder_are_refused(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(WorkError, match="another `bertbench fetch` is at work"):
            fetch(model(), tmp_path)
    finally:
        os.close(lock)
    assert server.requests == []


def test_what_a_killed_fetch_left_is_cleared_away(
    model: Make, server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / ".fetching" / "folder").mkdir(parents=True)
    (tmp_path / ".fetching" / "folder" / "vocab.txt").write_text("half")
    fetch(model(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "m"]
    assert (tmp_path / "m" / "vocab.txt").read_text() == MODEL["vocab.txt"]


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(model: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another with --to"):
        fetch(model(), tmp_path / "file" / "root")


def test_a_full_disk_is_one_line(
    model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch_module, "unpack", fail)
    with pytest.raises(WorkError, match=r"cannot fetch m \(No space left on device\)"):
        fetch(model(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "m.zip"]


def test_the_catalogue_is_sound() -> None:
    for entry in ENTRIES:
        for name in (entry.name, *entry.aliases):
            assert find_entries([name.upper()]) == (entry,)
        for source in entry.sources:
            assert re.fullmatch(r"https://[^ ]+/[^/ ]+", source.url)
            assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert all(re.fullmatch("[0-9a-f]{64}", value) for value in entry.members.values())
        assert entry.size_bytes or entry.approximate_bytes
    for attribute in ("url", "path"):
        values = [getattr(source, attribute) for entry in ENTRIES for source in entry.sources]
        assert len(values) == len(set(values))
    unpacked = [entry.folder for entry in ENTRIES if entry.preparation != "none"]
    assert len(unpacked) == len(set(unpacked))
    assert {len(find_entries([group])) for group in GROUPS} == {2, 10, 24}
    assert len(find_entries(["cola", "glue", "CoLA"])) == 10


def test_every_published_size_can_be_fetched_under_its_name() -> None:
    for name in PRESETS:
        (entry,) = find_entries([name])
        config = preset(name)
        cased = "cased" if name.endswith("-cased") else "uncased"
        assert entry.folder == (
            f"{cased}_L-{config.num_hidden_layers}_H-{config.hidden_size}"
            f"_A-{config.num_attention_heads}"
        )


def test_the_one_size_whose_published_bytes_are_known_is_estimated_well() -> None:
    (entry,) = find_entries(["bert-base"])
    assert entry.approximate_bytes == pytest.approx(407_727_028, rel=0.01)
