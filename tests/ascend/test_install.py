"""The documented commands make an environment in which torch_npu can be imported.

Slow: an environment of its own with torch. `MOESPAN_TEST_INSTALL=1` runs the commands with the
version of torch that the tests use, from the package index that pip is set up for;
`MOESPAN_TEST_INSTALL=exact` runs them unchanged.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moespan.machine.cann import RECOMMENDED_TORCH_NPU, release

ROOT = Path(__file__).resolve().parents[2]
HOW = os.environ.get("MOESPAN_TEST_INSTALL", "")


def commands() -> list[str]:
    """The `pip install` lines of docs/ascend.md for this architecture."""
    text = (ROOT / "docs/ascend.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    common = [line for line in blocks[0].splitlines() if line.startswith("pip install")]
    assert common[0] == f"pip install torch=={release(RECOMMENDED_TORCH_NPU)}"
    assert common[1:] == [
        f"pip install torch-npu=={RECOMMENDED_TORCH_NPU} pyyaml setuptools",
        "pip install .",
    ]
    if platform.machine() == "x86_64":
        (common[0],) = [line for line in blocks[1].splitlines() if "--index-url" in line]
    if HOW == "exact":
        return common
    here = importlib.metadata.version("torch").partition("+")[0]
    common[0] = f"pip install torch=={here}"
    common[1] = common[1].replace(RECOMMENDED_TORCH_NPU, here)
    return common


def run(*command: str, **environ: str) -> None:
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={**{n: x for n, x in os.environ.items() if n != "PYTHONPATH"}, **environ},
        text=True,
        capture_output=True,
        timeout=1800,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


@pytest.mark.skipif(not HOW, reason="takes minutes: MOESPAN_TEST_INSTALL=1 runs it")
def test_torch_npu_can_be_imported_after_the_documented_commands(tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv/bin/python")
    for command in commands():
        run(python, "-m", *command.split())
    # The libraries of CANN, without the Python packages that the stand-in may bring.
    packages = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", packages], text=True, capture_output=True).stdout.strip()
    build = "import build, pathlib, sys; build.build(pathlib.Path(sys.argv[1]))"
    run(python, "-c", build, site, PYTHONPATH=str(ROOT / "tools/ascend_sim"))
    script = "import torch, torch_npu, moespan; print(torch_npu.__version__)"
    run(python, "-c", script, TORCH_DEVICE_BACKEND_AUTOLOAD="0", CUDA_VISIBLE_DEVICES="")


def test_the_documents_name_the_commands_of_this_architecture() -> None:
    assert len(commands()) == 3
