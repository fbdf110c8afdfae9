"""One probe of a device at a time, and one run in a folder.

Two probes would meet each other's memory, and repeat each other; two runs would write the same
files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bertbench.devices import Device
from bertbench.ledger_file import default_ledger_path
from finetune.errors import InputError

_ASK_EVERY_SECONDS = 0.2


def lock_path(device: Device) -> Path:
    """File of this user that is locked while a device is probed, whatever the ledger."""
    name = re.sub(r"[^\w.:-]", "_", device.uuid or device.label)
    return default_ledger_path().with_name(f"{name}.lock")


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock in the block; the system releases it when the process ends, however it does.

    Args:
        path: a file, made if it does not exist and left there empty: were it deleted, another
            process could hold a lock on the deleted file while a third makes a new one.
        on_wait: called once if another process holds it.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise InputError(
            f"cannot lock the device ({error.strerror})",
            path=path,
            hint="choose another folder with BERTBENCH_LEDGER",
        ) from error
    with file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                # A folder on a network may know no locks; nothing is lost there but this.
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    break
            if not waiting:
                waiting = True
                on_wait()
            time.sleep(_ASK_EVERY_SECONDS)
        yield


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder in the block, which is made if it is not there; no file is left in it.

    Raises:
        InputError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot use the output folder ({error})", path=folder) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "another run is writing to this folder",
                path=folder,
                hint="wait for its end, or choose another --output_dir",
            ) from error
        except OSError:
            pass  # A file system without locks: as if nobody else were there.
        yield
    finally:
        os.close(descriptor)
