"""Runs the tests that need NPUs inside the stand-in for them."""

from __future__ import annotations

from pathlib import Path

import pytest

INSIDE = Path(__file__).with_name("inside")


@pytest.mark.parametrize("file", sorted(path.name for path in INSIDE.glob("test_*.py")))
def test_inside(ascend_sim, file):
    # Warnings are torch_npu's own there.
    result = ascend_sim("--python", "-m", "pytest", "-q", "-W", "ignore", str(INSIDE / file))
    assert result.returncode == 0, result.stdout
