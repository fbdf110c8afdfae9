"""Tests of bertbench.fetch.archives."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from bertbench.fetch.archives import (
    ArchiveError,
    check_members,
    format_sums,
    hash_folder,
    read_sums,
    split_mrpc,
    unpack,
)
from finetune.errors import InputError
from finetune.tasks.glue import find_task, read_examples

HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


def make_zip(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def make_tar(path: Path, *members: tarfile.TarInfo, text: bytes = b"text") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            member.size = len(text) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(text) if member.isreg() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("prefix", ["", "release/"])
def test_a_single_folder_around_everything_is_left_out(tmp_path: Path, prefix: str) -> None:
    files = {f"{prefix}{name}": name for name in ("vocab.txt", "a/b.txt")}
    if prefix:
        files = {prefix: "", **files}
    make_zip(tmp_path / "x.zip", {**files, "__MACOSX/._vocab.txt": "", f"{prefix}.DS_Store": ""})
    unpack(tmp_path / "x.zip", tmp_path / "out")
    assert tree(tmp_path / "out") == {"a/b.txt": "a/b.txt", "vocab.txt": "vocab.txt"}
    assert sorted(os.listdir(tmp_path)) == ["out", "x.zip"]


def test_a_tar_archive(tmp_path: Path) -> None:
    members = (member("./", tarfile.DIRTYPE), member("./qa/a.json"), member("evidence/b.txt"))
    unpack(make_tar(tmp_path / "x.tar.gz", *members), tmp_path / "out")
    assert tree(tmp_path / "out") == {"evidence/b.txt": "text", "qa/a.json": "text"}


def test_files_get_the_mode_that_new_files_get(tmp_path: Path) -> None:
    info = member("a/run.sh")
    info.mode = 0o6777
    unpack(make_tar(tmp_path / "x.tar.gz", info, member("b")), tmp_path / "out")
    (tmp_path / "new").write_text("")
    assert (tmp_path / "out/a/run.sh").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_second_archive_does_not_hide_files_of_the_first(tmp_path: Path) -> None:
    unpack(make_zip(tmp_path / "A-1.0.zip", {"A/README": "a", "A/x": "a"}), tmp_path / "out")
    unpack(make_zip(tmp_path / "B-1.0.zip", {"B/README": "b", "B/y/z": "b"}), tmp_path / "out")
    assert tree(tmp_path / "out") == {"README": "a", "x": "a", "B-1.0-README": "b", "y/z": "b"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "{}/evil", "a\n/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_outside_of_the_folder_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    name = name.format(tmp_path)
    if kind == "zip":
        archive = make_zip(tmp_path / "x.zip", {"good": "", name: "evil"})
    else:
        archive = make_tar(tmp_path / "x.tar.gz", member("good"), member(name))
    (tmp_path / "work").mkdir()
    with pytest.raises(ArchiveError) as failure:
        unpack(archive, tmp_path / "work" / "out")
    assert f"holds {name!r}, a path outside of the folder" in str(failure.value)
    assert list(tmp_path.rglob("evil")) == []
    assert not (tmp_path / "work" / "out").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    archive = make_tar(tmp_path / "x.tar.gz", member("a"), member("b", kind, "a"))
    with pytest.raises(ArchiveError, match="'b', which is neither file nor folder"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_in_zip_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="'link', which is neither file nor folder"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    good = make_zip(tmp_path / "good.zip", {"a": "content " * 1000}).read_bytes()
    good_tar = make_tar(tmp_path / "good.tar.gz", member("a"), text=os.urandom(9000)).read_bytes()
    tampered = bytearray(good)
    tampered[60] ^= 255
    for name, content in {
        "page.zip": b"<html>",
        "empty.zip": b"",
        "short.zip": good[:-10],
        "tampered.zip": bytes(tampered),
        "page.tar.gz": b"<html>",
        "short.tar.gz": good_tar[:-2000],
        "tampered.tar.gz": good_tar[:-5] + bytes(5),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArchiveError):
            unpack(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists(), name
    with pytest.raises(ArchiveError, match="no files"):
        unpack(make_zip(tmp_path / "nothing.zip", {}), tmp_path / "out")
    with pytest.raises(ArchiveError, match="cannot be unpacked"):
        unpack(make_zip(tmp_path / "both.zip", {"a": "", "a/b": ""}), tmp_path / "out")


def test_checksums_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "ö 1.txt").write_text("one")
    (folder / "b").write_text("two")
    sums = hash_folder(folder)
    assert sums == {
        "a/ö 1.txt": hashlib.sha256(b"one").hexdigest(),
        "b": hashlib.sha256(b"two").hexdigest(),
    }
    (folder / "SHA256SUMS").write_text(format_sums(sums))
    assert read_sums(folder / "SHA256SUMS") == sums
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, check=True)
    (folder / "more").write_text("")
    assert check_members(folder, sums, ["a"]) is None
    assert check_members(folder, sums, ["c"]) == "c is missing"
    (folder / "b").write_text("2wo")
    assert check_members(folder, sums) == f"b does not have the SHA-256 {sums['b']}"


def test_a_broken_list_of_checksums_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "SHA256SUMS"
    assert read_sums(path) == {}
    path.write_text(f"{'0' * 64}  a\nnonsense\n")
    with pytest.raises(InputError, match=f"{path}:2: not a line"):
        read_sums(path)


def test_mrpc_is_split_as_the_published_script_does(tmp_path: Path) -> None:
    train, test, ids = (tmp_path / name for name in ("train.txt", "test.txt", "ids.tsv"))
    bom = "\ufeff"
    train.write_bytes(
        f'{bom}{HEADER}1\t10\t11\tA "quoted\t B.\n0\t20\t21\tÉ\x85 one.\tTwo. \n'
        "1\t11\t10\tNot a pair of ids.\tSwapped.\n".replace("\n", "\r\n").encode()
    )
    test.write_bytes(f"{bom}{HEADER}1\t30\t31\tC\tD\n0\t10\t11\tE\tF".encode())
    ids.write_text("10\t11\n30\t31\n")
    split_mrpc(train, test, ids, tmp_path / "MRPC")
    made = {path.name: path.read_bytes().decode() for path in (tmp_path / "MRPC").iterdir()}
    assert made == {
        "train.tsv": f"{bom}{HEADER}0\t20\t21\tÉ\x85 one.\tTwo.\n"
        "1\t11\t10\tNot a pair of ids.\tSwapped.\n",
        "dev.tsv": f'{bom}{HEADER}1\t10\t11\tA "quoted\t B.\n',
        "test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t30\t31\tC\tD\n1\t10\t11\tE\tF\n",
    }
    task = find_task("MRPC")
    counts = [
        len(read_examples(task, tmp_path / "MRPC", split)) for split in ("train", "dev", "test")
    ]
    assert counts == [2, 1, 2]

    train.write_text(f"{HEADER}1\t10\t11\tA\tB\n1\t10\t11\tA\n")
    with pytest.raises(InputError, match=f"{train}:3: 4 columns instead of 5"):
        split_mrpc(train, test, ids, tmp_path / "MRPC")


def test_mrpc_itself_comes_out_byte_for_byte(tmp_path: Path, shared_dir: Path) -> None:
    """The published files, put together again, are split into what they were."""
    source = shared_dir / "data" / "glue" / "MRPC"
    # Not `splitlines`: sentences hold characters that it takes for line ends.
    lines = {
        split: (source / f"{split}.tsv").read_bytes().decode().split("\n")
        for split in ("train", "dev", "test")
    }
    lines = {split: [f"{line}\n" for line in text[:-1]] for split, text in lines.items()}
    train_rows, dev_rows = lines["train"][1:], lines["dev"][1:]
    merged = [row for pair in zip(train_rows, dev_rows, strict=False) for row in pair]
    merged += train_rows[len(dev_rows) :]
    train, test, ids = (tmp_path / name for name in ("train.txt", "test.txt", "ids.tsv"))
    train.write_text(HEADER + "".join(merged), encoding="utf-8")
    ids.write_text("".join("\t".join(row.split("\t")[1:3]) + "\n" for row in dev_rows))
    rows = ("\t".join(["1", *row.split("\t")[1:]]) for row in lines["test"][1:])
    test.write_text(HEADER + "".join(rows), encoding="utf-8")
    split_mrpc(train, test, ids, tmp_path / "MRPC")
    for split in lines:
        made = (tmp_path / "MRPC" / f"{split}.tsv").read_bytes()
        assert made == (source / f"{split}.tsv").read_bytes(), split


def test_an_archive_of_far_more_than_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = "\0" * 3_000_000
    fits = make_zip(tmp_path / "fits.zip", {"a": zeros})
    unpack(fits, tmp_path / "fits")
    assert (tmp_path / "fits" / "a").stat().st_size == len(zeros)
    monkeypatch.setattr("bertbench.fetch.archives._ALWAYS_BYTES", 2_900_000)
    assert 100 * fits.stat().st_size < 2_900_000
    tar = make_tar(tmp_path / "x.tar.gz", member("a"), text=zeros.encode())
    for archive in (fits, tar):
        with pytest.raises(ArchiveError, match="more than 100 times its own size"):
            unpack(archive, tmp_path / "out")
    monkeypatch.setattr("bertbench.fetch.archives._MAX_RATIO", 10)
    names = make_tar(tmp_path / "y.tar.gz", *(member(str(n)) for n in range(9000)), text=b"")
    with pytest.raises(ArchiveError, match="more than 10 times its own size"):
        unpack(names, tmp_path / "out2")


def test_a_header_of_any_size_is_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.XHDTYPE, 200_000_000
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(9000))
    with pytest.raises(ArchiveError, match=r"asks for 200,000,\d+ bytes"):
        unpack(tmp_path / "x.tar", tmp_path / "out")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_all_compressions_of_tar(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.tar.{kind}"
    with tarfile.open(path, f"w:{kind}") as archive:
        info = member("a")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"text"))
    unpack(path, tmp_path / "out")
    assert tree(tmp_path / "out") == {"a": "text"}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArchiveError, match="cannot be unpacked"):
        unpack(path, tmp_path / "again")


def test_files_of_mrpc_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("train", "test", "ids"):
        (tmp_path / name).write_text(HEADER + "1\t2\t3\tone\ttwo\n")
    split_mrpc(tmp_path / "train", tmp_path / "test", tmp_path / "ids", tmp_path / "out")
    for name in ("train", "test", "ids"):
        (tmp_path / name).write_bytes(b"a\tb\tc\td\te\n1\t2\t3\tcaf\xe9\ttwo\n")
        with pytest.raises(InputError, match=rf"{name}:2: not UTF-8"):
            split_mrpc(tmp_path / "train", tmp_path / "test", tmp_path / "ids", tmp_path / "out")
        (tmp_path / name).write_text(HEADER)
