"""Which TensorFlow checkpoints a folder holds; every reader asks this module.

A checkpoint is complete once its index and all of its data are there, because a training writes the
index last. The newest complete checkpoint counts.

The file `checkpoint` names a checkpoint too. But it is replaced after the index is written, so it
may name an older one after a kill or on a full disk. In a folder that was copied it may name a path
of another machine. So it decides only between checkpoints without a step in their names, and
nothing outside of the folder is opened because of it.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from finetune.errors import InputError

_logger = logging.getLogger(__name__)

STATE_FILE = "checkpoint"
PREFIX = "model.ckpt-"
INDEX = ".index"
DATA = ".data-00000-of-00001"

_FIRST_PART = re.compile(r"(.+)\.data-00000-of-([0-9]{5})")
_OWN = re.compile(rf"{re.escape(PREFIX)}([0-9]{{1,18}})")
_NUMBERED = re.compile(r"(.*?)-?([0-9]*)")
_NAMED = re.compile(rb'^\s*model_checkpoint_path\s*:\s*"((?:[^"\\\n]|\\.)+)"', re.MULTILINE)
_MAX_STATE_BYTES = 1 << 20
_MAX_SHOWN = 100


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the prefixes of the complete checkpoints of a training, the oldest step first."""
    steps = {int(match[1]): name for name in _whole(folder) if (match := _OWN.fullmatch(name))}
    return [folder / steps[step] for step in sorted(steps)]


def preferred_checkpoints(folder: Path) -> list[Path]:
    """Return the prefixes of a folder's checkpoints, in the order in which to try them.

    They are those of a training, from the newest to the oldest, or else the one that the file
    `checkpoint` names. There is a warning if that file names another one than the first.
    """
    whole = _whole(folder)
    steps = list_checkpoints(folder)
    found = [path.name for path in reversed(steps)]
    named = _read_state(folder)
    name = None if named is None else re.split(r"[/\\]", named)[-1]
    if not found and name in whole:
        found = [name]
    if named is not None and found and not _agrees(folder, named, found[0]):
        what = f"names {named[:_MAX_SHOWN]!r}" if named else "cannot be read"
        _logger.warning("%s %s: using %s", folder / STATE_FILE, what, found[0])
    return [folder / name for name in found]


def other_checkpoints(folder: Path) -> list[Path]:
    """Return the prefixes of checkpoints of other programs, newest first.

    Raises:
        InputError: they are not steps of one training, so it is unclear which one to use.
    """
    found = sorted(_whole(folder), key=lambda name: int(_number(name)[1] or 0), reverse=True)
    if len({_number(name)[0] for name in found}) > 1:
        raise InputError(
            f"several checkpoints are there ({', '.join(sorted(found)[:3])})",
            path=folder,
            hint="name one of them instead of the folder",
        )
    return [folder / name for name in found]


def remove_half_written(folder: Path) -> None:
    """Remove the files of checkpoints whose writing failed or was killed; each is a model's size.

    Args:
        folder: folder of a training, or of its best weights; it need not exist. Nobody else may
            write to it now.
    """
    for path in folder.glob(f".tmp-{PREFIX}*"):
        path.unlink(missing_ok=True)
    whole = _whole(folder)
    for suffix in (DATA, INDEX):
        for path in folder.glob(f"{PREFIX}*{suffix}"):
            name = path.name.removesuffix(suffix)
            if _OWN.fullmatch(name) and name not in whole and path.is_file():
                path.unlink(missing_ok=True)


def _whole(folder: Path) -> set[str]:
    """Return the names of the complete checkpoints of a folder."""
    try:
        files = {path.name for path in folder.iterdir() if path.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    found = set()
    for match in filter(None, map(_FIRST_PART.fullmatch, files)):
        name, count = match[1], match[2]
        needed = {f"{name}.data-{part:05}-of-{count}" for part in range(int(count))}
        if needed | {f"{name}{INDEX}"} <= files and not name.startswith("."):
            found.add(name)
    return found


def _number(name: str) -> tuple[str, str]:
    match = _NUMBERED.fullmatch(name)
    return (name, "") if match is None else (match[1], match[2])


def _read_state(folder: Path) -> str | None:
    """Return what the file `checkpoint` names; "" if it cannot be read, None without the file."""
    path = folder / STATE_FILE
    if not path.is_file():
        return "" if os.path.lexists(path) else None
    try:
        with path.open("rb") as file:
            match = _NAMED.search(file.read(_MAX_STATE_BYTES))
    except OSError:
        return ""
    return "" if match is None else match[1].decode("utf-8", "replace")


def _agrees(folder: Path, named: str, used: str) -> bool:
    """Return whether a state file names the checkpoint that is used, or an older step of it."""
    parent, _, name = named.rpartition("/")
    if parent and parent not in (os.path.abspath(folder), os.path.realpath(folder)):
        return False
    older, newest = _OWN.fullmatch(name), _OWN.fullmatch(used)
    if older is not None and newest is not None:
        return int(older[1]) <= int(newest[1])
    return name == used
