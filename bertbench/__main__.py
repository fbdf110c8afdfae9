"""`python -m bertbench`, and the command `bertbench`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; what goes wrong while it is imported is one line too."""
    try:
        from bertbench.cli import main as run
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except (OSError, ImportError) as error:  # no more files, or a package is missing
        _end(f"cannot start: {error}", 1)
    run()


def _end(message: str, exit_code: int) -> None:
    # As `bertbench.core.terminal` does, which may be what cannot be imported.
    clean = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    try:
        print(f"bertbench: {clean}", file=sys.stderr, flush=True)
    finally:
        os._exit(exit_code)


if __name__ == "__main__":
    main()
