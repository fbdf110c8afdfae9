"""The folder of an export, which appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.errors import InputError
from finetune.storage.folders import held_folder, try_lock

_EXPORTED_NAMES = frozenset(
    {
        "assets",
        "assets.extra",
        "bert_config.json",
        "bert_model.ckpt.data-00000-of-00001",
        "bert_model.ckpt.index",
        "config.json",
        "fingerprint.pb",
        "model.safetensors",
        "saved_model.pb",
        "tokenizer_config.json",
        "variables",
        "vocab.txt",
    }
)


@contextlib.contextmanager
def new_folder(
    target: str | Path, *, force: bool = False, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """Make a folder that appears complete or not at all.

    Args:
        target: the folder; its parents are created too.
        force: replace an earlier export. A folder that holds anything else is refused even then,
            because replacing it would delete that.
        sources: files that are read meanwhile, which must not be in the folder.

    Yields:
        A folder beside the target, to be filled. At the end of the `with` statement it gets the
        target's name; if the statement raises, it is removed.

    Raises:
        InputError: the target cannot be created, or must not be replaced.
        OSError: the disk is full.
    """
    target = Path(target).resolve()
    if target.parent.is_dir():
        _clear_remains(target)
    _check_replaceable(target, force, sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(".tmp", f".{target.name}.", target.parent))
    except OSError as error:
        raise InputError(
            f"cannot make the folder ({error.strerror})", path=target, hint="choose another folder"
        ) from error
    aside = temporary.with_suffix(".old")
    stack = contextlib.ExitStack()
    try:
        # Tells other exports that this one is still running; see `_clear_remains`.
        try_lock(stack.enter_context(held_folder(temporary)).descriptor)
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        stack.close()


def _clear_remains(target: Path) -> None:
    """Remove the files of killed exports to a folder, and put back what they had moved away."""
    # The names end in the 8 characters of `mkdtemp`, or, in earlier versions, in the number of a
    # process. A user's folder with another name is kept.
    name = re.compile(rf"\.{re.escape(target.name)}\.([0-9]+|[0-9a-z_]{{8}})\.(tmp|old)")
    for path in target.parent.iterdir():
        if name.fullmatch(path.name) is None or path.is_symlink() or not path.is_dir():
            continue
        work = path.with_suffix(".tmp")
        with contextlib.suppress(FileNotFoundError), held_folder(work) as held:
            if not try_lock(held.descriptor):
                continue
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _check_replaceable(target: Path, force: bool, sources: Sequence[Path]) -> None:
    for source in sources:
        # The file, and the link by which it may be found.
        folder = source.parent.resolve()
        if target in (folder, *folder.parents, *source.resolve().parents):
            raise InputError(
                f"the folder to write holds what is read ({source.name})",
                path=target,
                hint="choose another folder",
            )
    if target.exists() and not target.is_dir():
        raise InputError("not a folder", path=target, hint="choose another name")
    found = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if found and not force:
        raise InputError(
            "the folder is not empty", path=target, hint="choose another one, or --force"
        )
    strange = sorted(found - _EXPORTED_NAMES)
    if strange:
        raise InputError(
            f"the folder holds {strange[0]}, which no export writes",
            path=target,
            hint="choose another one, or move that away",
        )
