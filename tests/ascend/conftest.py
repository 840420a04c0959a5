"""Builds the stand-in for an Ascend NPU (`tools/ascend_sim`) once, for the tests inside it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANNOT_BUILD = 77

# These tests run inside the stand-in only; `test_inside.py` starts them there.
collect_ignore = [] if "ascend_sim" in sys.modules else ["inside"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def ascend_sim() -> Run:
    """`tools/ascend_sim/run.sh` with its arguments; skipped where it cannot be built."""

    def run(
        *arguments: str, timeout: float = 170, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "tools/ascend_sim/run.sh"), *arguments],
            env={**os.environ, "PYTHON": sys.executable, **environ},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )

    built = run("--python", "-c", "")
    if built.returncode == CANNOT_BUILD:
        pytest.skip(built.stdout.strip().splitlines()[-1])
    assert built.returncode == 0, built.stdout
    return run
