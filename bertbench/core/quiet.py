"""TensorFlow's start-up chatter, kept off the user's terminal unless something fails."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def muted_stderr() -> Iterator[None]:
    """Hold back what native code writes to standard error; show it if the block raises.

    The messages come from C++ before its log level is set, so no variable silences them.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        # Standard error is not a file here, as under some test runners and notebooks.
        yield
        return
    sys.stderr.flush()
    saved = os.dup(descriptor)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), descriptor)
        try:
            yield
        except Exception:  # and not an interruption, of which nothing is to be learnt
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, descriptor)
            os.close(saved)
