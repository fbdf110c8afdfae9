"""Signals that end a command: Ctrl-C, and what batch systems and closed terminals send.

Ctrl-C sends SIGINT. A batch system sends SIGTERM or SIGXCPU before it kills a process. A terminal
that is closed sends SIGHUP. All four are handled alike. Training is asked to stop, and saves a
checkpoint first. Other work has its results on disk at any time, and is interrupted at once by a
`KeyboardInterrupt`. It is raised only once, because a second one would interrupt the clean-up after
the first.
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
"""Time after an interruption in which further signals are ignored; later ones end the process."""

EXIT_CODE = 130
"""Exit code of an interrupted command, as in shells."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)
_SWALLOWED_AGAIN_SECONDS = 0.05


@dataclasses.dataclass
class _State:
    """The signals that have arrived so far.

    Attributes:
        can_stop: whether the work under way stops by itself when it is asked to.
        stop_asked: whether it has been asked to stop.
        interrupted_at: time of the `KeyboardInterrupt`; None before one.
        swallowed: whether the `KeyboardInterrupt` was raised where Python ignores exceptions, so
            that it must be raised again.
    """

    can_stop: bool = False
    stop_asked: bool = False
    interrupted_at: float | None = None
    swallowed: bool = False


_state = _State()
_owns_process = False


def was_interrupted() -> bool:
    """Whether a `KeyboardInterrupt` was raised; later exceptions may be a consequence of it."""
    return _state.interrupted_at is not None


def handle_signals() -> None:
    """Handle signals from now on, in a process that runs one command only."""
    global _owns_process
    _owns_process = True
    _install()
    # The function that is registered first is called last. After it Python restores the default
    # handlers, and a signal would kill the process with another exit code.
    atexit.register(_ignore_signals)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: _raise_again(unraisable, hook)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let work stop by itself after the first signal, instead of being interrupted.

    Yields:
        A function that returns whether to stop; the work calls it between steps. A second Ctrl-C
        interrupts at once. Other signals do not, because a closed terminal and a batch system may
        send several.
    """
    global _state
    outer, state = _state, _State(can_stop=True)
    _state = state
    before = {} if _owns_process else _install()
    try:
        yield lambda: state.stop_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _owns_process:
            outer.interrupted_at = state.interrupted_at
        _state = outer


def end_quietly(exit_code: int) -> None:
    """Let a signal end the process with an exit code from now on, while Python shuts down.

    An interrupted process is ended here. Python itself would end it by SIGINT instead of the exit
    code, if the `KeyboardInterrupt` was raised in code that was compiled from text, as dataclasses
    do for their methods.
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
    """Set the signal handlers; return the previous ones."""
    terminals = [number for number in (0, 1, 2) if os.isatty(number)]

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _detach(terminals)
        _on_signal(number)

    # `nohup` lets the process ignore SIGHUP; it stays ignored.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in _SIGNALS if number != signal.SIGHUP or not ignored]
    return {number: signal.signal(number, handle) for number in numbers}


def _on_signal(number: int) -> None:
    state, now = _state, time.monotonic()
    if state.swallowed:
        state.swallowed, state.interrupted_at = False, now
        raise KeyboardInterrupt
    if state.interrupted_at is not None:
        if now - state.interrupted_at < PATIENCE_SECONDS:
            return
        if _owns_process:
            os._exit(EXIT_CODE)
    if state.can_stop:
        if not state.stop_asked:
            state.stop_asked = True
            _announce_stop()
            return
        if number != signal.SIGINT:
            return
    state.interrupted_at = now
    raise KeyboardInterrupt


def _announce_stop() -> None:
    text = "stopping after this step; press Ctrl-C again to stop at once"
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or the stream is closed
        try:
            say(text)
        except RuntimeError:  # the signal arrived during a write to this stream
            os.write(2, f"{text}\n".encode())


def _detach(terminals: list[int]) -> None:
    """Send output to /dev/null that went to a closed terminal, where every write would fail."""
    for number in terminals:
        if not os.isatty(number):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            os.close(null)


def _raise_again(unraisable: Any, hook: Callable[[Any], Any]) -> None:
    """Interrupt again soon, after a `KeyboardInterrupt` that Python ignored, as in `__del__`."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        hook(unraisable)
        return
    _state.swallowed = True
    # A real signal, because the main thread may be blocked in a system call.
    main = threading.main_thread().ident
    timer = threading.Timer(_SWALLOWED_AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
    timer.daemon = True
    timer.start()
