"""Real ranks for all tests of layouts: 2, 4 and 8 processes, started once, cut anew for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """What `Ranks.llm` builds engines on."""
    with Ranks() as ranks:
        yield ranks
