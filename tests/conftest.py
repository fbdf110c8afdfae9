"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DIR = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with golden numbers and real data; it is not part of the repository."""
    if not (SHARED_DIR / "golden").is_dir():
        pytest.skip("the shared golden data is not on this machine")
    return SHARED_DIR
