"""Files in cloud storage (`gs://…`): copied here before a run, and results copied back.

All other modules work on local files. The copies keep the names of their folders, because
`do_lower_case` may be guessed from them. TensorFlow's `tf.io.gfile` does the transport.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertbench.core.errors import WorkError
from bertbench.core.quiet import muted_stderr
from bertbench.core.terminal import say
from finetune.errors import InputError

_COPY_BYTES = 16 << 20
_URL = re.compile(r"[a-z][a-z0-9+.-]+://")


def is_url(text: str) -> bool:
    """Whether a path names a file of a storage service, as `gs://bucket/file`."""
    return _URL.match(text) is not None


@dataclass(frozen=True)
class RemoteFolder:
    """A folder in cloud storage and its local copy, in which a run works.

    Attributes:
        url: the folder.
        path: its copy.
        _pushed: modification time and size of the files that are alike in both, by name.
    """

    url: str
    path: Path
    _pushed: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.url

    def push(self) -> None:
        """Copy what has changed since the last time; remove there what is gone here.

        The file `checkpoint` names the newest checkpoint, and is copied last: if copying is cut
        off, the checkpoint that it names is complete.

        Raises:
            WorkError: the storage refuses or cannot be reached.
        """
        there = {path.relative_to(self.path).as_posix(): path for path in _visible(self.path)}
        for name in sorted(there, key=lambda name: (name.endswith("checkpoint"), name)):
            stat = there[name].stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if self._pushed.get(name) != version:
                _copy(str(there[name]), posixpath.join(self.url, name))
                self._pushed[name] = version
        for name in [name for name in self._pushed if name not in there]:
            url = posixpath.join(self.url, name)
            if _attempt(lambda tf, url: tf.io.gfile.exists(url), url):
                _attempt(lambda tf, url: tf.io.gfile.remove(url), url)
            del self._pushed[name]


class ResultsKeptError(WorkError):
    """Results could not be copied back; their local copy is kept."""


@contextlib.contextmanager
def staging_folder() -> Iterator[Path]:
    """Make a temporary folder for local copies, and remove it after the block.

    It stays if the block ends with `ResultsKeptError`.
    """
    folder = Path(tempfile.mkdtemp(prefix="bertbench-"))
    try:
        yield folder
    except ResultsKeptError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def push_or_keep(remote: RemoteFolder) -> None:
    """Copy the last results to cloud storage.

    Raises:
        ResultsKeptError: it is not possible, or the user interrupted; says where the results are.
    """
    try:
        remote.push()
    except (WorkError, OSError, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        raise ResultsKeptError(
            f"{reason}; the results are kept in {remote.path}: copy them to {remote.url} yourself"
        ) from error


def fetch_file(url: str, staging: Path) -> Path:
    """Copy one file.

    Raises:
        InputError: there is none.
        WorkError: the storage cannot be reached.
    """
    target = _local(url, staging)
    if not _attempt(lambda tf, url: tf.io.gfile.exists(url), url):
        raise InputError("no such file", path=url)
    _copy(url, str(target))
    return target


def fetch_folder(url: str, staging: Path) -> Path:
    """Copy a folder with all that is in it.

    Raises:
        InputError: there is none.
        WorkError: the storage cannot be reached.
    """
    if not _attempt(lambda tf, url: tf.io.gfile.isdir(url), url):
        raise InputError("no such folder", path=url)
    root = _local(url, staging)
    root.mkdir(parents=True, exist_ok=True)
    for folder, _, names in _attempt(lambda tf, url: list(tf.io.gfile.walk(url)), url):
        for name in names:
            source = posixpath.join(folder, name)
            _copy(source, str(_local(source, staging)))
    return root


def fetch_weights(url: str, staging: Path) -> Path:
    """Copy what `--init_checkpoint` may name: a file, a folder, or a checkpoint's prefix.

    Raises:
        InputError: there is nothing of that name.
        WorkError: the storage cannot be reached.
    """
    if _attempt(lambda tf, url: tf.io.gfile.isdir(url), url):
        return fetch_folder(url, staging)
    if _attempt(lambda tf, url: tf.io.gfile.exists(url), url):
        return fetch_file(url, staging)
    parts = _attempt(lambda tf, url: tf.io.gfile.glob([f"{url}.index", f"{url}.data-*-of-*"]), url)
    if not parts:
        raise InputError("no such checkpoint", path=url)
    for part in parts:
        _copy(part, str(_local(part, staging)))
    return _local(url, staging)


def fetch_beside(url: str, names: Iterable[str], staging: Path) -> None:
    """Copy those files of a folder that have one of several names.

    Args:
        url: of a file in the folder, or a checkpoint's prefix.
        names: which files, if they are there.
        staging: the folder for local copies.

    Raises:
        WorkError: the storage cannot be reached.
    """
    folder = url.rpartition("/")[0]
    for name in names:
        beside = f"{folder}/{name}"
        if _attempt(lambda tf, url: tf.io.gfile.exists(url), beside):
            _copy(beside, str(_local(beside, staging)))


def open_remote_folder(url: str, staging: Path) -> RemoteFolder:
    """Make a local copy of a folder for results, with what an earlier run has left in it.

    Raises:
        WorkError: the storage cannot be reached.
    """
    url = url.rstrip("/")
    if not _attempt(lambda tf, url: tf.io.gfile.isdir(url), url):
        path = _local(url, staging)
        path.mkdir(parents=True)
        _attempt(lambda tf, url: tf.io.gfile.makedirs(url), url)
        return RemoteFolder(url, path)
    say(f"copying {url}")
    remote = RemoteFolder(url, fetch_folder(url, staging))
    for path in _visible(remote.path):
        stat = path.stat()
        name = path.relative_to(remote.path).as_posix()
        remote._pushed[name] = (stat.st_mtime_ns, stat.st_size)
    return remote


def _visible(folder: Path) -> list[Path]:
    """The files of the results. Hidden ones are half written, or not a run's."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _local(url: str, staging: Path) -> Path:
    parts = [part for part in url.partition("://")[2].split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise InputError("not a plain address", path=url)
    target = staging.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _copy(source: str, target: str) -> None:
    """Copy a file piece by piece, so that it need not fit into memory."""

    def work(tf: Any, _: str) -> None:
        with tf.io.gfile.GFile(source, "rb") as read, tf.io.gfile.GFile(target, "wb") as written:
            while piece := read.read(_COPY_BYTES):
                written.write(piece)

    if is_url(target):
        folder = posixpath.dirname(target)
        _attempt(lambda tf, url: tf.io.gfile.makedirs(url), folder)
    _attempt(work, source if is_url(source) else target)


def _attempt(work: Any, url: str) -> Any:
    with muted_stderr():
        import tensorflow as tf
    try:
        return work(tf, url)
    except tf.errors.OpError as error:
        message = str(error.message).splitlines()[0] if error.message else type(error).__name__
        raise WorkError(f"{url}: cloud storage fails ({message}); try again later") from error
