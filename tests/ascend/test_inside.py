"""Runs the tests that need NPUs inside the stand-in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import tiers

INSIDE = Path(__file__).with_name("inside")
# These fork ranks, which works only while their process has touched no NPU.
FORKING = ("test_hccl.py", "test_fused.py", "test_layouts.py")
# The schema of torch-npu 2.9.0, on the oldest release of CANN that is supported.
OLD_WHEEL = {"ASCEND_SIM_OLD_WHEEL": "1", "ASCEND_SIM_CANN": "9.0.0"}
# What a wheel without `cache_mode` changes; all tests run with MOESPAN_TEST_ALL=1.
OF_THE_CACHE = ("-k", "cache or greedy_continuations", "test_ops.py", "test_decode.py")


def others() -> list[str]:
    return sorted(path.name for path in INSIDE.glob("test_*.py") if path.name not in FORKING)


def passes(ascend_sim, *arguments, **environ):
    paths = (str(INSIDE / one) if one.endswith(".py") else one for one in arguments)
    # Warnings are torch_npu's own there.
    pytest = ("--python", "-m", "pytest", "-q", "-W", "ignore")
    result = ascend_sim(*pytest, *paths, timeout=600, **environ)
    assert result.returncode == 0, result.stdout


def test_inside(ascend_sim):
    """In two processes: starting one with torch_npu takes longer than most of the tests."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda names: passes(ascend_sim, *names), (FORKING, others())))


def test_inside_with_a_wheel_whose_cache_write_has_no_mode(ascend_sim):
    if not tiers.ALL:
        passes(ascend_sim, *OF_THE_CACHE, **OLD_WHEEL)
        return
    passes(ascend_sim, *others(), **OLD_WHEEL)
    passes(ascend_sim, *FORKING, **OLD_WHEEL)
