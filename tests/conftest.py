"""Settings of all tests: one thread each, the same random examples every time, and the tiers."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any, NoReturn
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

from moespan import log
from tests import tiers

# Before anything imports torch, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Before anything imports Triton: its kernels then run on the CPU, and take part wherever it is.
os.environ["TRITON_INTERPRET"] = "1"

# Messages go to stderr, where tests look for them, as in our own programs.
log.set_up()

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
    """Mark the slow tier, leave out what is not sampled, and put slow tests first for `-n`.

    Short groups at the end let the processes end together.
    """
    for item in items:
        if tiers.is_slow(item.path.relative_to(config.rootpath).as_posix()):
            item.add_marker("slow")
    left_out = [item for item in items if not tiers.ALL and not _is_sampled(item)]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _is_sampled(item: pytest.Item) -> bool:
    """Whether a sampled test runs this combination of its parameters' values.

    The positions of the values in their lists are added up, and sums that n divides run. So each
    combination of all parameters but one runs with every n-th value of that one. A test with only
    one list runs with all of its values.
    """
    marker = item.get_closest_marker("sampled")
    lists = list(item.iter_markers("parametrize"))
    if marker is None or len(lists) < 2:
        return True
    assert isinstance(item, pytest.Function)
    total = 0
    number = next(iter(item.callspec.indices.values()))  # among all combinations
    for parameters in reversed(lists):
        number, position = divmod(number, len(parameters.args[1]))
        total += position
    return total % int(marker.args[0]) == 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail tests of the fast tier that start ranks."""
    if item.get_closest_marker("slow") is not None:
        return (yield)
    with mock.patch("moespan.launch.agent_process.start_agent", _refuse_ranks):
        return (yield)


def _refuse_ranks(*_: object) -> NoReturn:
    pytest.fail("this test starts ranks: mark it with @pytest.mark.slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep tests of one group in one process (`pytest -n`)."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return tiers.group(nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return ByGroup(config, log)
