"""One probe of a device at a time: two would meet each other's memory, and repeat each other."""

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
from bertbench.devices.device import Device
from finetune.errors import InputError
from finetune.storage.folders import try_lock

LOCKS_VARIABLE = "BERTBENCH_LOCKS"
"""Names another folder for the locks of devices; a test must not wait for its user's probes."""

_ASK_EVERY_SECONDS = 0.2


@contextlib.contextmanager
def devices_held(devices: Sequence[Device]) -> Iterator[None]:
    """Keep this user's other probes off devices, whatever their ledgers and temporary folders.

    Another user's probe is not waited for: a lock that others can open is one that they can hold
    for ever. Of others `bertbench.devices.device.check_free` and `check_alone` tell.
    """
    folder = _lock_folder()
    if folder is None:
        say(
            "warning: no folder for locks can be used; do not probe the same device twice at the "
            f"same time, or name a folder with {LOCKS_VARIABLE}"
        )
        yield
        return
    labels = ", ".join(device.label for device in devices)
    with contextlib.ExitStack() as held:
        # In one order, so that no two probes wait for each other.
        for path in sorted({folder / _lock_name(device) for device in devices}):

            def on_wait(path: Path = path) -> None:
                say(f"waiting for another probe of {labels} to end ({_holder(path)})")

            held.enter_context(locked(path, on_wait))
        yield


def _lock_folder() -> Path | None:
    """A folder that only this user can enter, the same for all of the user's probes here.

    So neither `TMPDIR` nor `XDG_RUNTIME_DIR` names it, which depend on how a shell was started.
    """
    chosen = os.environ.get(LOCKS_VARIABLE)
    if chosen:
        candidates = [Path(chosen)]
    else:
        candidates = [user_temporary_folder()]
        state = state_folder()
        if state is not None:
            # Machines may share it.
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
    """Hold a lock in the block; the system releases it when the process ends, however it does.

    Args:
        path: a file, made if it does not exist and left there: were it deleted, another process
            could hold a lock on the deleted file while a third makes a new one.
        on_wait: called once if another process holds it.

    Raises:
        InputError: the file cannot be written.
    """
    waiting = False
    while True:
        descriptor = _open_lock(path)
        try:
            if try_lock(descriptor):
                # Somebody may have tidied up since it was opened.
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
