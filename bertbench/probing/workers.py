"""Work shared out among devices, one thread for each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

_Worker = TypeVar("_Worker")


class CancelledError(Exception):
    """Work was given up because other work failed or was interrupted."""


def share_out(
    count: int,
    workers: Sequence[_Worker],
    work: Callable[[_Worker, int, Callable[[], None]], None],
) -> None:
    """Do `work(worker, index, poll)` for every index; a worker does one at a time.

    A single worker works in the calling thread. With several, the first exception, or a Ctrl-C
    here, cancels what the others do: the `poll` that they are given raises then, and they are
    waited for.

    Args:
        count: number of indices, from 0.
        workers: what there is one of for each thread.
        work: is to call `poll` now and then.

    Raises:
        KeyboardInterrupt: of this thread.
        Exception: the first that `work` raised.
    """
    if len(workers) == 1:
        for index in range(count):
            work(workers[0], index, lambda: None)
        return
    indices: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(count):
        indices.put(index)
    cancelled = threading.Event()
    errors: list[BaseException] = []

    def poll() -> None:
        if cancelled.is_set():
            raise CancelledError

    def run(worker: _Worker) -> None:
        try:
            while not cancelled.is_set():
                try:
                    index = indices.get_nowait()
                except queue.Empty:
                    return
                work(worker, index, poll)
        except CancelledError:
            return
        except BaseException as error:  # noqa: BLE001 -- raised again in the calling thread
            errors.append(error)
            cancelled.set()

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        cancelled.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
