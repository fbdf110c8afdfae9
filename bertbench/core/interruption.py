"""Signals such as Ctrl-C: a training is asked to stop, other work is interrupted, in one line.

A person presses Ctrl-C, a batch system sends SIGTERM or SIGXCPU before it kills, and a terminal
that is closed sends SIGHUP. Each interrupts work that keeps what it has at all times, and asks a
training, which first saves. Exactly one `KeyboardInterrupt` is raised: a second one would meet the
code that tidies up after the first, where nobody expects it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from bertbench.core.terminal import say

PATIENCE_SECONDS = 2.0
"""Further signals are ignored for so long after the interruption, and then end the process."""

EXIT_CODE = 130
"""Of what was interrupted, as shells have it."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)
_SWALLOWED_AGAIN_SECONDS = 0.05


@dataclasses.dataclass
class _State:
    """What has come so far.

    Attributes:
        asks: whether work is under way that is asked to stop, and not interrupted.
        asked: it has been asked.
        interrupted_at: time of the `KeyboardInterrupt`.
        swallowed: it was raised where Python goes on all the same, and is to be raised again.
    """

    asks: bool = False
    asked: bool = False
    interrupted_at: float | None = None
    swallowed: bool = False


_state = _State()
_owns_process = False


def was_interrupted() -> bool:
    """Whether a `KeyboardInterrupt` was raised; what else is raised then comes of it."""
    return _state.interrupted_at is not None


def handle_signals() -> None:
    """Handle signals from here on, in a process that is there for one command."""
    global _owns_process
    _owns_process = True
    _install()
    # The first function that is registered is the last that is called; after it, Python would let
    # a signal kill the process, and the exit code would be another.
    atexit.register(_ignore_signals)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: _raise_again(unraisable, hook)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first signal into a question that the work asks between steps.

    Yields:
        A function that says whether to stop. A second Ctrl-C interrupts at once; other signals do
        not, as a closed terminal and a batch system may send several.
    """
    global _state
    outer, state = _state, _State(asks=True)
    _state = state
    before = {} if _owns_process else _install()
    try:
        yield lambda: state.asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _owns_process:
            outer.interrupted_at = state.interrupted_at
        _state = outer


def end_quietly(exit_code: int) -> None:
    """From here on a signal ends the process with this code, while Python tidies up.

    An interrupted process is ended here. Python would end it by a signal in place of the code, if
    the interruption has met code that was made from text, as that of data classes is.
    """
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(exit_code))
    if exit_code == EXIT_CODE:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(exit_code)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _install() -> dict[signal.Signals, Any]:
    """Set the handlers; return those that were there."""
    terminals = [number for number in (0, 1, 2) if os.isatty(number)]

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave(terminals)
        _hear(number)

    # What `nohup` has had ignored stays ignored.
    kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in _SIGNALS if number != signal.SIGHUP or not kept]
    return {number: signal.signal(number, handle) for number in numbers}


def _hear(number: int) -> None:
    state, now = _state, time.monotonic()
    if state.swallowed:
        state.swallowed, state.interrupted_at = False, now
        raise KeyboardInterrupt
    if state.interrupted_at is not None:
        if now - state.interrupted_at < PATIENCE_SECONDS:
            return
        if _owns_process:
            os._exit(EXIT_CODE)
    if state.asks:
        if not state.asked:
            state.asked = True
            _say_that_it_stops()
            return
        if number != signal.SIGINT:
            return
    state.interrupted_at = now
    raise KeyboardInterrupt


def _say_that_it_stops() -> None:
    text = "stopping after this step; Ctrl-C once more to stop at once"
    with contextlib.suppress(OSError, ValueError):  # a terminal that has gone, a closed stream
        try:
            say(text)
        except RuntimeError:  # the signal has come while the same stream was written to
            os.write(2, f"{text}\n".encode())


def _leave(terminals: list[int]) -> None:
    """Write to nowhere in place of a terminal that has gone, where every write would fail."""
    for number in terminals:
        if not os.isatty(number):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            os.close(null)


def _raise_again(unraisable: Any, hook: Callable[[Any], Any]) -> None:
    """Interrupt soon, when the interruption has hit a place that cannot raise, as `__del__`."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        hook(unraisable)
        return
    _state.swallowed = True
    # A real signal, as the main thread may be waiting for the system.
    main = threading.main_thread().ident
    timer = threading.Timer(_SWALLOWED_AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
    timer.daemon = True
    timer.start()
