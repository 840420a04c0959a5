"""Real ranks for all tests of layouts: 2, 4 and 8 processes, started once and used by all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The groups of ranks on which `Ranks.llm` builds engines."""
    with Ranks() as ranks:
        yield ranks
