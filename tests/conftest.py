"""Settings of all tests: one thread each, the same random examples every time, and the tiers."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import tiers

# Before anything imports torch, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Before anything imports Triton: its kernels then run on the CPU, and take part wherever it is.
os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "moespan",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=tiers.examples(50),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("moespan")


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the slow tier, and begin with it where several processes share the tests.

    Short groups at the end let the processes end together.
    """
    for item in items:
        if tiers.is_slow(item.path.relative_to(config.rootpath).as_posix()):
            item.add_marker("slow")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep tests of one group in one process (`pytest -n`)."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return tiers.group(nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return ByGroup(config, log)
