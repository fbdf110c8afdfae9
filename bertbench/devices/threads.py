"""How many cores and threads a process may use.

Libraries abort, or send signals, where the system allows too few threads.
"""

from __future__ import annotations

import os
import threading

from bertbench.core.errors import WorkError

_LIBRARY_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def usable_cores() -> int:
    """Number of CPU cores that this process may use.

    A container of a large machine may have few. TensorFlow and OpenBLAS count these alone.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spare_threads() -> None:
    """Have numeric libraries do with one thread, where one for each core cannot be had.

    OpenBLAS, which NumPy and SciPy use, sends its own process a SIGINT when it cannot start its
    threads.
    """
    if not can_start_threads(usable_cores() - 1):
        for name in _LIBRARY_VARIABLES:
            os.environ.setdefault(name, "1")


def check_threads() -> None:
    """Refuse to begin what TensorFlow, or the tokenizer, would end with an abort.

    Raises:
        WorkError: the system does not allow the threads that TensorFlow starts.
    """
    # One pool for operations and one inside of them, and those for data, the profiler and gRPC.
    count = 2 * usable_cores() + 8
    if not can_start_threads(count):
        raise WorkError(
            f"TensorFlow needs {count} threads, and the system does not allow them: "
            "allow more processes (`ulimit -u`, or pids.max of the control group)"
        )


def can_start_threads(count: int) -> bool:
    """Whether so many threads can be there at the same time."""
    end = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:  # can't start new thread
        return False
    finally:
        end.set()
        for thread in threads:
            thread.join()
    return True
