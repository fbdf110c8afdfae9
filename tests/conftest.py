"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from bertbench.hardware.lock import LOCKS_VARIABLE
from helpers.paths import REPOSITORY

# A busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# TensorFlow imports no Keras then, unless the package tf_keras is installed: two fifths of the time
# that its import takes, in these processes and in all that they start.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

SHARED_DIR = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what tests cache, also in processes that they start, out of the user's folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERTBENCH_CACHE", str(folder))
        patch.setenv("BERTBENCH_LEDGER", str(folder / "ledger.sqlite"))
        # Do not wait for the user's own probes.
        patch.setenv(LOCKS_VARIABLE, str(folder / "locks"))
        yield folder


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with golden numbers and real data; it is not part of the repository."""
    if not (SHARED_DIR / "golden").is_dir():
        pytest.skip("the shared golden data is not on this machine")
    return SHARED_DIR
