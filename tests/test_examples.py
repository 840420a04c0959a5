"""The examples run as they stand and print what the quickstart model answers."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name: str, capfd: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What an example prints, run in this process; its ranks have processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capfd.readouterr().out.splitlines()


def test_every_example_is_short_and_listed():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix == ".py":
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
            assert f"]({path.name})" in page


def test_offline(capfd: pytest.CaptureFixture[str]):
    lines = output_of("offline.py", capfd)
    assert lines[:2] == ["681+734= 1415", "sort c y r a f w:  a c f r w y"]
    assert lines[2].startswith("Story: Mia, mouse, forest. ") and "Mia" in lines[2][27:]


def test_chat(capfd: pytest.CaptureFixture[str]):
    assert output_of("chat.py", capfd) == [
        "> 681+734=",
        "1415",
        "> sort 30 70 7 89 97:",
        "7 30 70 89 97",
    ]


def test_batch(capfd: pytest.CaptureFixture[str]):
    lines = output_of("batch.py", capfd)
    assert len(lines) == 3
    assert {"sum 1415", "sort  a c f r w y"} < set(lines)
    assert any(line.startswith("story 小雨") for line in lines)


def test_torchrun():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ran = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(EXAMPLES / "torchrun.py")],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.splitlines() == ["tp=2 681+734= 1415"]
