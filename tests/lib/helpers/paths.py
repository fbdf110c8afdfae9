"""Where the repository is, for tests that read its files or start programs of it."""

from __future__ import annotations

from pathlib import Path

HELPERS = Path(__file__).resolve().parent
# The folder that `helpers` is imported from, for processes that a test starts.
LIBRARY = HELPERS.parent
REPOSITORY = LIBRARY.parents[1]
