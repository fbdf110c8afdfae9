"""Archives: unpacking them safely, and checking the unpacked files by their checksums."""

from __future__ import annotations

import bz2
import errno
import functools
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pooch

from bertbench.core.progress import progress
from bertbench.core.units import MIB_BYTES
from finetune.errors import InputError
from finetune.storage.files import decode_utf8, read_bytes

SUMS_FILE = "SHA256SUMS"
"""Name of the files that hold checksums, in the format of `sha256sum`."""

_CHUNK_BYTES = 1 << 20

_MAX_RATIO = 100
_ALWAYS_BYTES = 64 * MIB_BYTES
"""An archive may unpack to this many times its size, and always to this many bytes. Text is
compressed to a fifth of its size; an archive of zeros, made to fill a disk, to a thousandth."""

_HEADER_BYTES = 512
"""Bytes that each file counts in addition to its content, so that empty files are limited too."""

_MAX_READ_BYTES = 16 * MIB_BYTES

_COMPRESSIONS: Mapping[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
"""Readers of compressed files, by the bytes that such a file begins with."""

# Python's readers of archives raise many kinds of errors for damaged files.
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    # For a name that cannot be decoded or has a zero byte, and for a negative offset.
    ValueError,
    OverflowError,
    LookupError,
    MemoryError,
    # From zipfile, for an encrypted file and for an unknown compression.
    RuntimeError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)

# Errors for a name that no file can have. Without a number the error is from the decompressor.
_DAMAGED_NUMBERS = (None, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EILSEQ)

_Opener = Callable[[], IO[bytes]]


class ArchiveError(Exception):
    """An archive is damaged, has a path outside of its folder, or has other files than expected."""


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive.

    If the archive holds a single folder, its content is unpacked without that folder. Files that
    macOS adds to archives are left out. A name that exists gets the archive's name in front.

    Args:
        archive: a zip archive if its name ends in `.zip`, else a tar archive, compressed or not.
        folder: where to put the files; it is made if it is missing.

    Raises:
        ArchiveError: the archive is damaged, is far larger unpacked than its size suggests, or has
            a path outside of the folder, a link or a device.
    """
    size_bytes = archive.stat().st_size
    left_bytes = max(_ALWAYS_BYTES, _MAX_RATIO * size_bytes)
    inner = folder.with_name(f"{folder.name}-{archive.stem}")
    inner.mkdir()
    try:
        with (
            archive.open("rb") as file,
            progress(f"unpack {archive.name}", _mib(size_bytes), "MiB") as advance,
        ):
            read = _zip_members if archive.suffix == ".zip" else _tar_members
            for name, opener in read(file, inner):
                left_bytes = _write(name, opener, inner, left_bytes)
                advance(file.tell() // MIB_BYTES, "")
            advance(_mib(size_bytes), "")
    except _DAMAGED as error:
        raise ArchiveError(f"cannot be unpacked ({error or type(error).__name__})") from error
    except OSError as error:
        if error.errno not in _DAMAGED_NUMBERS:  # as of a full disk
            raise
        raise ArchiveError(f"cannot be unpacked ({error})") from error
    top = sorted(inner.iterdir())
    if not top:
        raise ArchiveError("holds no files")
    if len(top) == 1 and top[0].is_dir():
        top = sorted(top[0].iterdir())
    folder.mkdir(exist_ok=True)
    for child in top:
        target = folder / child.name
        if target.exists():
            target = folder / f"{archive.stem}-{child.name}"
        child.rename(target)
    shutil.rmtree(inner)


def split_mrpc(train: Path, test: Path, dev_ids: Path, folder: Path) -> None:
    r"""Split the files of MRPC as GLUE does, byte for byte like `download_glue_data.py`.

    Args:
        train: `msr_paraphrase_train.txt`: a header, then `label \t id \t id \t text \t text`.
        test: `msr_paraphrase_test.txt`, with the same columns.
        dev_ids: the pairs of ids that belong to the development split.
        folder: where to write `train.tsv`, `dev.tsv` and `test.tsv`; it is made if it is missing.

    Raises:
        InputError: a line has another number of columns, or is not UTF-8.
    """
    folder.mkdir(exist_ok=True)
    # As in the original script: universal line ends, `strip`, and a byte order mark that is kept.
    pairs = {tuple(line.strip().split("\t")) for line in _lines(dev_ids)}
    header, rows = _read_mrpc(train)
    splits = {"train": [header], "dev": [header]}
    for row in rows:
        splits["dev" if tuple(row[1:3]) in pairs else "train"].append("\t".join(row) + "\n")
    splits["test"] = ["index\t#1 ID\t#2 ID\t#1 String\t#2 String\n"]
    for index, row in enumerate(_read_mrpc(test)[1]):
        splits["test"].append("\t".join((str(index), *row[1:])) + "\n")
    for name, lines in splits.items():
        (folder / f"{name}.tsv").write_bytes("".join(lines).encode())


def check_members(
    folder: Path, members: Mapping[str, str], expected: Sequence[str] = ()
) -> str | None:
    """Compare the files of a folder with their checksums.

    Args:
        folder: where the files are; it may hold other files too.
        members: SHA-256 of files by path.
        expected: further paths that must exist.

    Returns:
        The first problem in words; None if there is none.
    """
    for name in (*members, *expected):
        if not (folder / name).exists():
            return f"{name} is missing"
    for name, sha256 in members.items():
        if (folder / name).is_dir() or hash_file(folder / name) != sha256:
            return f"{name} does not have the SHA-256 {sha256}"
    return None


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest: str = pooch.file_hash(str(path), alg="sha256")
    return digest


def hash_folder(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder by path, in the order of the paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def format_sums(sums: Mapping[str, str]) -> str:
    """Write checksums as text that `sha256sum --check` reads."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())


def read_sums(path: Path) -> dict[str, str]:
    """Read a file of checksums; a missing file has none.

    Raises:
        InputError: a line is not a checksum and a name.
    """
    try:
        text = read_bytes(path).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return {}
    sums = {}
    for number, line in enumerate(text.split("\n"), 1):
        sha256, _, name = line.partition("  ")
        if line and (len(sha256) != 64 or not name):
            raise InputError(
                "not a line of sha256sum", path=path, line=number, hint="delete the line"
            )
        if line:
            sums[name] = sha256
    return sums


def _mib(size_bytes: int) -> int:
    return -(-size_bytes // MIB_BYTES)


def _zip_members(file: IO[bytes], _: Path) -> Iterator[tuple[str, _Opener | None]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(f"holds {info.filename!r}, which is neither file nor folder")
            yield info.filename, None if info.is_dir() else functools.partial(archive.open, info)


def _tar_members(file: IO[bytes], folder: Path) -> Iterator[tuple[str, _Opener | None]]:
    begin = file.read(8)
    file.seek(0)
    plain = next((o(file) for b, o in _COMPRESSIONS.items() if begin.startswith(b)), file)
    bounded: Any = _BoundedReader(plain)
    with tarfile.open(fileobj=bounded, mode="r:") as archive:
        for member in archive:
            if not (member.isreg() or member.isdir()):
                raise ArchiveError(f"holds {member.name!r}, which is neither file nor folder")
            opener = functools.partial(_extract, archive, member, folder)
            yield member.name, None if member.isdir() else opener
        # gzip compares its checksum only when it comes to its end.
        while bounded.read(_CHUNK_BYTES):
            pass


class _BoundedReader:
    """A file with a limit on each read, because a damaged header may ask for any size."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise ArchiveError(f"has a damaged header, which asks for {size:,} bytes")
        return self._file.read(size)


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> IO[bytes]:
    # Python before 3.10.12 and 3.11.4 has no filters; `_write` checks each path too.
    if hasattr(tarfile, "data_filter"):
        tarfile.data_filter(member, str(folder))
    file = archive.extractfile(member)
    if file is None:
        raise ArchiveError(f"holds {member.name!r}, which has no content")
    return file


def _write(name: str, opener: _Opener | None, folder: Path, left_bytes: int) -> int:
    """Write a file of the archive; return how many bytes may still be written."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\n" in name:
        raise ArchiveError(f"holds {name!r}, a path outside of the folder")
    left_bytes -= _HEADER_BYTES
    if left_bytes < 0:
        raise _too_much()
    if path.parts[:1] == ("__MACOSX",) or path.name == ".DS_Store":
        return left_bytes
    target = folder.joinpath(*path.parts)
    if opener is None:
        target.mkdir(parents=True, exist_ok=True)
        return left_bytes
    target.parent.mkdir(parents=True, exist_ok=True)
    with opener() as source, target.open("wb") as copy:
        while block := source.read(_CHUNK_BYTES):
            left_bytes -= len(block)
            if left_bytes < 0:
                raise _too_much()
            copy.write(block)
    return left_bytes


def _too_much() -> ArchiveError:
    return ArchiveError(f"unpacks to more than {_MAX_RATIO} times its own size")


def _lines(path: Path) -> list[str]:
    text = decode_utf8(read_bytes(path), path, hint="download the file again")
    return io.StringIO(text, newline=None).readlines()


def _read_mrpc(path: Path) -> tuple[str, list[list[str]]]:
    header, *lines = _lines(path) or [""]
    rows = [line.strip().split("\t") for line in lines]
    for number, row in enumerate(rows, 2):
        if len(row) != 5:
            raise InputError(
                f"{len(row)} columns instead of 5",
                path=path,
                line=number,
                hint="download the file again",
            )
    return header, rows
