"""How much the suite runs: the fast tier, all of it, or every case that exists.

`bash test.sh --fast` leaves out the slow tier: tests that start several processes or take long.
A test belongs to the slow tier by its file or folder (`SLOW`), or by `@pytest.mark.slow` where its
neighbours are fast; every other test is in the fast tier. `MOESPAN_TEST_ALL=1` (`--all`) runs every
layout and every case where the suite otherwise samples them, and ten times as many random examples.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

ALL = os.environ.get("MOESPAN_TEST_ALL") == "1"

PATIENCE = float(os.environ.get("MOESPAN_TEST_PATIENCE", "1"))
"""How many times the usual a script of the server's tests may take; more on emulated machines."""

SLOW = (
    "tests/ascend/",
    "tests/distributed/",
    "tests/benchmarks/test_gpu_benchmarks.py",
    "tests/cli/test_interrupt.py",
    "tests/clients/",
    "tests/cli/test_surroundings.py",
    "tests/launch/test_async_ranks.py",
    "tests/launch/test_fate.py",
    "tests/launch/test_nodes.py",
    "tests/launch/test_ranks.py",
    "tests/launch/test_two_hosts.py",
    "tests/measure/test_bench.py",
    "tests/ops/test_cuda.py",
    "tests/scripts/test_setup.py",
    "tests/serve/test_real_ranks.py",
    "tests/serve/test_serve.py",
    "tests/test_examples.py",
)
"""Folders and files whose tests are all slow."""

_GROUPS = {
    "tests/distributed/": "ranks",
    "tests/launch/": "timed",
    "tests/measure/": "timed",
}
"""Folder → group of tests that one process runs, one after the other.

Tests of `ranks` share the pools of ranks. Those of `timed` hold bounds in seconds or measure the
machine, so they do not run beside each other. Tests of other folders are grouped by file, so that
fixtures of a module are made once.
"""


def is_slow(path: str) -> bool:
    """Whether the test file `path`, relative to the repository, is of the slow tier as a whole."""
    return path.startswith(SLOW)


def group(path: str) -> str:
    """The group of the tests in the file `path`, relative to the repository."""
    return next((name for folder, name in _GROUPS.items() if path.startswith(folder)), path)


def examples(count: int) -> int:
    """The number of random examples for a test that usually takes `count`."""
    return count * 10 if ALL else count


def every(cases: Sequence[T], nth: int) -> list[T]:
    """All cases under `MOESPAN_TEST_ALL=1`, otherwise every `nth`."""
    return list(cases if ALL else cases[::nth])
