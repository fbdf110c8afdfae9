"""Fetch entries of the catalogue into a folder: download, verify and unpack them.

A folder gets its name only when all its files are verified. An entry that is in place already is
verified and left as it is, without network. Other files in its place are replaced only on request.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bertbench.core.errors import WorkError
from bertbench.fetch.archives import (
    SUMS_FILE,
    ArchiveError,
    check_members,
    format_sums,
    hash_file,
    hash_folder,
    read_sums,
    split_mrpc,
    unpack,
)
from bertbench.fetch.catalogue import Entry, Source
from bertbench.fetch.download import Checked, download
from finetune.errors import InputError
from finetune.storage.files import write_atomically
from finetune.storage.folders import try_lock

Comparison = Checked | Literal["published SHA-256", "SHA-256 seen before"]
"""What a file was compared with."""

_WORKSPACE = ".fetching"


@dataclass(frozen=True)
class FetchedFile:
    """A file that an entry was made from.

    Attributes:
        path: where it is; a downloaded archive is deleted after unpacking.
        url: the address that it comes from.
        sha256: its checksum.
        checked: what it was compared with.
        downloaded: whether it was downloaded now.
    """

    path: Path
    url: str
    sha256: str
    checked: Comparison
    downloaded: bool

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "path": str(self.path),
            "url": self.url,
            "sha256": self.sha256,
            "checked": self.checked,
            "downloaded": self.downloaded,
        }


@dataclass(frozen=True)
class Fetched:
    """An entry that is in place.

    Attributes:
        entry: its row of the catalogue.
        folder: where it is.
        was_there: whether it was in place before.
        files: the files that it was made from; empty if its folder existed before.
        members_checked: whether the files in its folder have their published checksums.
    """

    entry: Entry
    folder: Path
    was_there: bool
    files: tuple[FetchedFile, ...]
    members_checked: bool

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "name": self.entry.name,
            "folder": str(self.folder),
            "was_there": self.was_there,
            "members_checked": self.members_checked,
            "files": [file.to_json() for file in self.files],
        }


def fetch(entry: Entry, root: Path, mirror: str | None = None, force: bool = False) -> Fetched:
    """Fetch an entry into a folder, and verify it.

    Args:
        entry: a row of the catalogue.
        root: the folder for all entries; it is made if it is missing.
        mirror: an address that has the files of all servers under `HOST/PATH`.
        force: replace other files that are in the entry's place.

    Raises:
        InputError: there are other files in the entry's place, or a file that the user put there
            has another checksum.
        WorkError: the download or the unpacking failed; existing files have not changed.
    """
    try:
        found = _find(entry, root, force)
        if found is not None:
            return found
        with _workspace(root) as workspace:
            files = tuple(
                _obtain(source, root, workspace, mirror, force) for source in entry.sources
            )
            if entry.preparation == "none":
                return Fetched(entry, root / entry.folder, False, files, False)
            _build(entry, root, workspace, files)
            for source, file in zip(entry.sources, files, strict=True):
                _remember(root, source.path, file.sha256)
                if file.downloaded:
                    file.path.unlink()
        return Fetched(entry, root / entry.folder, False, files, bool(entry.members))
    except OSError as error:
        place = root if error.filename is None else error.filename
        raise WorkError(
            f"{place}: cannot fetch {entry.name} ({error.strerror or error})"
        ) from error


def _find(entry: Entry, root: Path, force: bool) -> Fetched | None:
    """Return the entry if it is in place; None if its place is free."""
    folder = root / entry.folder
    if entry.preparation == "none":
        files = []
        for source in entry.sources:
            path = root / source.path
            if not path.is_file() or hash_file(path) != source.sha256:
                return None
            files.append(
                FetchedFile(path, source.url, source.sha256, "published SHA-256", downloaded=False)
            )
        return Fetched(entry, folder, True, tuple(files), False)
    if not os.path.lexists(folder):
        return None
    sums = read_sums(folder / SUMS_FILE) if folder.is_dir() else {}
    if sums or (entry.members and folder.is_dir()):
        problem = check_members(folder, {**sums, **entry.members}, entry.expected)
        if problem is None:
            return Fetched(entry, folder, True, (), bool(entry.members))
    else:
        problem = "was not put there by `bertbench fetch`"
    if not force:
        raise InputError(problem, path=folder, hint="--force replaces it, or use another --to")
    return None


def _obtain(
    source: Source, root: Path, workspace: Path, mirror: str | None, force: bool
) -> FetchedFile:
    """Return the existing file if its checksum is right, or else download it."""
    path = root / source.path
    wanted, named_by = source.sha256, "is published"
    origin: Comparison = "published SHA-256"
    if wanted is None:
        wanted = read_sums(root / SUMS_FILE).get(source.path)
        origin, named_by = "SHA-256 seen before", f"{root / SUMS_FILE} names"
    if path.is_file():
        found = hash_file(path)
        if wanted in (None, found):
            origin = "nothing" if wanted is None else origin
            return FetchedFile(path, source.url, found, origin, downloaded=False)
        if not force:
            raise InputError(
                f"SHA-256 {found}, not the {wanted} that {named_by}",
                path=path,
                hint="delete the file, or --force replaces it",
            )
    if source.sha256 is None:
        # The server may have a new version, which only the user may accept.
        wanted, named_by = None if force else wanted, f"{named_by} (--force accepts another)"
    arrived = download(source.url, path, workspace, wanted, named_by, mirror)
    _remember(root, source.path, arrived.sha256)
    checked = origin if arrived.checked == "SHA-256" else arrived.checked
    return FetchedFile(path, source.url, arrived.sha256, checked, downloaded=True)


def _remember(root: Path, name: str, sha256: str | None) -> None:
    """Record a file's checksum for later fetches; None deletes the record."""
    sums = read_sums(root / SUMS_FILE)
    changed = {key: value for key, value in sums.items() if key != name}
    if sha256 is not None:
        changed[name] = sha256
    if changed != sums:
        write_atomically(root / SUMS_FILE, format_sums(changed))


def _build(entry: Entry, root: Path, workspace: Path, files: tuple[FetchedFile, ...]) -> None:
    """Make the entry's folder from its files, and move it to its place."""
    built = workspace / "folder"
    if entry.preparation == "mrpc":
        train, test, dev_ids = (file.path for file in files)
        split_mrpc(train, test, dev_ids, built)
    else:
        for file in files:
            try:
                unpack(file.path, built)
            except ArchiveError as error:
                raise _refused(file, str(error), root) from error
        problem = check_members(built, entry.members, entry.expected)
        if problem is not None:
            raise _refused(files[-1], f"does not hold {entry.name}: {problem}", root)
    sums = format_sums(hash_folder(built))
    (built / SUMS_FILE).write_bytes(sums.encode("utf-8", "surrogateescape"))
    # The content must be on the disk before the name, in case of a power failure.
    os.sync()
    target = root / entry.folder
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        target.rename(workspace / "replaced")
    built.rename(target)


def _refused(file: FetchedFile, problem: str, root: Path) -> Exception:
    if not file.downloaded:
        return InputError(problem, path=file.path, hint="delete the file, so that it is downloaded")
    # The server has this very file. If it were kept, it would be refused each time.
    file.path.unlink()
    _remember(root, file.path.relative_to(root).as_posix(), None)
    return WorkError(f"{file.path.name} from {file.url} {problem}; it was not kept")


@contextlib.contextmanager
def _workspace(root: Path) -> Iterator[Path]:
    """Make an empty hidden folder that no other fetch uses; delete it afterwards."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot use the folder ({error.strerror})", path=root, hint="name another with --to"
        ) from error
    lock = os.open(root, os.O_RDONLY)
    try:
        if not try_lock(lock):
            raise WorkError(
                f"another `bertbench fetch` is at work in {root}; wait for it, or use another --to"
            )
        workspace = root / _WORKSPACE
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir()
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    finally:
        os.close(lock)
