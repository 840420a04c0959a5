"""Runs the tests that need NPUs inside the stand-in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

INSIDE = Path(__file__).with_name("inside")
# These fork ranks, which works only while their process has touched no NPU.
FORKING = ("test_hccl.py", "test_fused.py", "test_layouts.py")


def test_inside(ascend_sim):
    """In two processes: starting one with torch_npu takes longer than most of the tests."""
    others = sorted(path.name for path in INSIDE.glob("test_*.py") if path.name not in FORKING)

    def run(names):
        files = (str(INSIDE / name) for name in names)
        # Warnings are torch_npu's own there.
        return ascend_sim("--python", "-m", "pytest", "-q", "-W", "ignore", *files, timeout=600)

    with ThreadPoolExecutor() as pool:
        for result in pool.map(run, (FORKING, others)):
            assert result.returncode == 0, result.stdout
