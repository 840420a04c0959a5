"""The script for machines with NPUs says how it is used and goes on after what fails."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def accept(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    script = BENCHMARKS / "ascend_acceptance.sh"
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_acceptance_says_how_it_is_used(tmp_path: Path) -> None:
    asked = accept()
    assert asked.returncode == 2 and "ascend_acceptance.sh OUT" in asked.stderr
    assert accept(tmp_path).returncode == 2  # the folder exists
    nothing = accept(tmp_path / "out", DEVICE="npu", NPUS="0")
    assert nothing.returncode == 2 and "NPUS=N" in nothing.stderr


def test_acceptance_goes_on_after_what_fails_and_packs_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken\nexit 3\n")
    python.chmod(0o755)
    ran = accept(tmp_path / "out", DEVICE="cpu", NPUS="1", PYTHON=str(python))
    assert ran.returncode == 1
    lines = (tmp_path / "out/summary.jsonl").read_text().splitlines()
    steps = {one["step"]: one["exit_code"] for one in map(json.loads, lines)}
    assert set(steps.values()) == {3} and {"doctor", "verify-tiny-one-rank-float32"} <= set(steps)
    with tarfile.open(tmp_path / "out.tar.gz") as packed:
        assert {"out/summary.txt", "out/doctor.json"} <= set(packed.getnames())
