"""TensorFlow's messages at start, which are hidden unless something fails."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def muted_stderr() -> Iterator[None]:
    """Hide what native code writes to standard error in the block; show it if the block raises.

    TensorFlow's C++ code writes these messages before it reads its log level, so that no
    environment variable can suppress them.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        # Standard error is not a file, as under some test runners and in notebooks.
        yield
        return
    sys.stderr.flush()
    saved = os.dup(descriptor)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), descriptor)
        try:
            yield
        except Exception:  # not KeyboardInterrupt: the messages do not explain it
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, descriptor)
            os.close(saved)
