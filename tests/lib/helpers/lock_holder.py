"""A process that holds a lock; a new process can import this module, and not that of a test."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bertbench.hardware.lock import locked


def hold(path: str, seconds: float, events: Any) -> None:
    """Hold a lock for some time, and say when it waits for it and when it has it."""
    with locked(Path(path), lambda: events.put("waits")):
        events.put("holds")
        time.sleep(seconds)
