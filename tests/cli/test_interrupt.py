"""Ctrl-C ends the command line with 130 and without a traceback, whenever and however often."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import QUICKSTART
from tests.tiers import every

# Runs the command line, and presses Ctrl-C in this process within call number of a function.
PRESS = """
import os, signal, sys
from importlib import import_module

module, names, number, presses = sys.argv[1], sys.argv[2].split("."), *map(int, sys.argv[3:5])
sys.argv[1:] = sys.argv[5:]
owner = import_module(module)
for name in names[:-1]:
    owner = getattr(owner, name)
function, calls = getattr(owner, names[-1]), 0

def pressed(*args, **kwargs):
    global calls
    calls += 1
    if calls == number:
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
    return function(*args, **kwargs)

setattr(owner, names[-1], pressed)
from moespan.cli import main
main()
"""

SINGLE = [
    "moespan.cli.generate:settings_of:1",
    "moespan.front.settings:Settings.resolve:1",
    "moespan.front.start:connect:1",
    "moespan.engine.build:load_weights:1",
    "moespan.engine.engine:Engine.add:2",
    "moespan.engine.engine:Engine.step:4",
    "moespan.engine.engine:Engine._collect:9",
    "moespan.engine.engine:Engine.close:1",
    "moespan.front.batch:AnswerFile.write:2",
]
SEVERAL = [
    "moespan.launch.agent_process:start_agent:1",
    "moespan.launch.ranks:RanksClient._wait_until_ready:1",
    "moespan.launch.ranks:RanksClient.add:3",
    "moespan.launch.ranks:RanksClient.receive:3",
    "moespan.front.batch:AnswerFile.write:2",
    "moespan.launch.agent_process:AgentProcess.end:1",
]


def run(place: str, presses: int, *more: object, folder: Path) -> tuple[int, str, list[int]]:
    """Exit code and stderr of a run that is interrupted, and the ids that it answered."""
    module, name, number = place.split(":")
    lines = [{"prompt": "Story: Mia.", "params": {"max_tokens": 3 + n % 9}} for n in range(30)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = folder / "out.jsonl"
    arguments = ["generate", QUICKSTART, "--device", "cpu", "--max-num-seqs", 4, "--quiet"]
    files = ["--input", folder / "in.jsonl", "--output", output, *more]
    command = [sys.executable, "-c", PRESS, module, name, number, presses, *arguments, *files]
    ran = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    found = output.read_text().splitlines() if output.exists() else []
    return ran.returncode, ran.stderr, [json.loads(line)["id"] for line in found]


def with_presses(places: list[str], twice: tuple[str, ...]) -> list[Any]:
    """Each place with one press, and those that end in one of `twice` with two presses as well."""
    runs = [(place, 1) for place in places]
    runs += [(place, 2) for place in places if place.endswith(twice)]
    cases = [pytest.param(*run, id=f"{run[0].rpartition('.')[2]}x{run[1]}") for run in runs]
    return every(cases, nth=2)


@pytest.mark.parametrize(
    ("place", "presses"), with_presses(SINGLE, ("weights:1", "_collect:9", "write:2", "close:1"))
)
def test_one_rank(tmp_path: Path, place: str, presses: int):
    code, said, answered = run(place, presses, folder=tmp_path)
    assert (code, said) == (130, "")
    if place.endswith("write:2"):
        assert len(answered) >= 1
    if place.endswith("close:1"):
        assert len(answered) == 30


@pytest.mark.parametrize(("place", "presses"), with_presses(SEVERAL, ("receive:3", ".end:1")))
def test_two_ranks(tmp_path: Path, place: str, presses: int):
    code, said, answered = run(place, presses, "-tp", 2, folder=tmp_path)
    assert (code, said) == (130, "")
    if place.endswith("write:2"):
        assert len(answered) >= 1
    if place.endswith(".end:1"):
        assert len(answered) == 30


def test_prompts_that_are_finished_are_printed_before_the_end():
    command = [sys.executable, "-c", PRESS, "moespan.engine.engine", "Engine.step", 12, 1]
    prompts = ["--prompt", "Story: Mia, mouse, forest.", "12+30="]
    more = ["generate", QUICKSTART, "--device", "cpu", "--quiet", *prompts]
    ran = subprocess.run(
        list(map(str, [*command, *more])),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "\n12+30=\n→ 42\n", "")
