"""Locks that allow one probe of a device at a time.

Two probes would measure each other's memory, and repeat each other's trials.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bertbench.core.private_folders import is_private, state_folder, user_temporary_folder
from bertbench.core.terminal import say
from bertbench.hardware.device import Device
from finetune.errors import InputError
from finetune.storage.folders import try_lock

LOCKS_VARIABLE = "BERTBENCH_LOCKS"
"""Environment variable that names another folder for the locks, as tests do."""

_ASK_EVERY_SECONDS = 0.2


@contextlib.contextmanager
def devices_held(devices: Sequence[Device]) -> Iterator[None]:
    """Hold the locks of devices in the block, so that other probes of this user wait.

    Probes of other users do not wait: they could hold a lock that they can open for ever. Their use
    of a device is found by `bertbench.hardware.device.check_free` and `check_alone`.
    """
    folder = _lock_folder()
    if folder is None:
        say(
            "warning: no folder for locks can be used; run only one probe of a device at a time, "
            f"or name a folder with {LOCKS_VARIABLE}"
        )
        yield
        return
    labels = ", ".join(device.label for device in devices)
    with contextlib.ExitStack() as held:
        # Always in the same order, so that no two probes wait for each other.
        for path in sorted({folder / _lock_name(device) for device in devices}):

            def on_wait(path: Path = path) -> None:
                say(f"waiting for another probe of {labels} to end ({_holder(path)})")

            held.enter_context(locked(path, on_wait))
        yield


def _lock_folder() -> Path | None:
    """Return the private folder for this user's locks on this machine, if there is one.

    It does not depend on `TMPDIR` or `XDG_RUNTIME_DIR`, whose values differ between shells.
    """
    chosen = os.environ.get(LOCKS_VARIABLE)
    if chosen:
        candidates = [Path(chosen)]
    else:
        candidates = [user_temporary_folder()]
        state = state_folder()
        if state is not None:
            # Several machines may share the state folder.
            candidates.append(state / f"locks-{socket.gethostname()}")
    return next((folder for folder in candidates if is_private(folder)), None)


def _lock_name(device: Device) -> str:
    return re.sub(r"[^\w.:-]", "_", device.uuid or device.label) + ".lock"


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        text = ""
    return f"process {text}" if text.isdecimal() else "of this user"


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock in the block; the system releases it when the process ends for any reason.

    Args:
        path: the lock's file, which is made if it is missing. It is not deleted afterwards: another
            process could hold the lock of the deleted file while a third process makes a new one.
        on_wait: called once if another process holds the lock.

    Raises:
        InputError: the file cannot be written.
    """
    waiting = False
    while True:
        descriptor = _open_lock(path)
        try:
            if try_lock(descriptor):
                # The file may have been deleted since it was opened.
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()}\n".encode())
                    yield
                    return
                continue
        finally:
            os.close(descriptor)
        if not waiting:
            waiting = True
            on_wait()
        time.sleep(_ASK_EVERY_SECONDS)


def _open_lock(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InputError(
            f"cannot lock the device ({error.strerror})",
            path=path,
            hint=f"name another folder with {LOCKS_VARIABLE}",
        ) from error
