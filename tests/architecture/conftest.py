"""The source tree of the repository, parsed once."""

from __future__ import annotations

import pytest

from helpers.paths import REPOSITORY
from helpers.source_tree import SourceTree, read_source_tree


@pytest.fixture(scope="session")
def repository() -> SourceTree:
    source = read_source_tree(REPOSITORY)
    assert len(source.modules) > 150
    return source
