"""Number of cores and threads that a process may use.

Libraries abort, or send signals, if the system allows too few threads.
"""

from __future__ import annotations

import os
import threading

from bertbench.core.errors import WorkError

_LIBRARY_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use.

    It may be smaller than the machine's, as in a container. TensorFlow and OpenBLAS count the same.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_library_threads() -> None:
    """Make numeric libraries use one thread if the system does not allow one for each core.

    OpenBLAS, which NumPy and SciPy use, sends SIGINT to its own process if it cannot start its
    threads.
    """
    if not can_start_threads(usable_cores() - 1):
        for name in _LIBRARY_VARIABLES:
            os.environ.setdefault(name, "1")


def check_threads() -> None:
    """Check that the system allows the threads of TensorFlow, which would abort otherwise.

    Raises:
        WorkError: the system does not allow the threads that TensorFlow starts.
    """
    # A pool of threads between operations and one inside them, and 8 for data, profiler and gRPC.
    count = 2 * usable_cores() + 8
    if not can_start_threads(count):
        raise WorkError(
            f"TensorFlow needs {count} threads, and the system does not allow them: "
            "allow more processes (`ulimit -u`, or pids.max of the control group)"
        )


def can_start_threads(count: int) -> bool:
    """Whether the process can start this number of threads at the same time."""
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
