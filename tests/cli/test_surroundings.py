"""Every verb in broken surroundings: it works, or ends in bounded time with one clear line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import DATA, QUICKSTART
from tests.tiers import every

TINY = DATA / "oracle" / "tiny"
REFERENCE = TINY / "ref" / "ref_logits.safetensors"
COUNTS = {layer: [90, 80, 70, 60, 50, 40, 30, 20, *[1] * 8] for layer in (1, 2, 3)}
"""Tokens of each expert of the quickstart model."""
MOST_SECONDS = 150
"""Far more than any of these takes, even on a machine that is busy with other tests."""

VERBS = {
    "generate": "generate {quick} --quiet --device cpu --prompt 1+1=",
    "generate-file": "generate {quick} --quiet --device cpu --input {tmp}/in --output {tmp}/out",
    "verify": "verify {tiny} --reference {ref} --device cpu --dtype float32",
    "reference": "verify {tiny} --reference {tmp}/ref --write-reference --device cpu",
    "bench": (
        "bench {quick} --device cpu --prefill 8 --decode-batch 1 --context 8 --decode-tokens 2 "
        "--repeats 1"
    ),
    "info": "info {quick}",
    "doctor": "doctor --device cpu",
    "make-checkpoint": "make-checkpoint {tmp}/made",
    "quantize": "quantize {quick} {tmp}/quantized",
    "chat": "chat {quick} --quiet --device cpu --max-tokens 2",
    "serve": "serve {quick} --log-level warning --device cpu --uds {tmp}/socket",
    "plan": (
        "plan {quick} --hardware h100 --devices 1 --input 16 --output 4 --num-requests 20 --rate 1 "
        "--ttft 10s --tpot 10s --max-num-seqs 4 --jobs 1 --what-if none --json {tmp}/plan"
    ),
    "experts": "experts {quick} -ep 2 -dp 2 --counts {tmp}/counts --out {tmp}/placement",
    "calibrate": "calibrate --preset tiny --device cpu --seconds 1 --out {tmp}/profile",
}
PRINTING = {"generate", "verify", "bench", "info", "doctor", "reference", "chat", "plan", "experts"}
WRITING = {
    *("generate-file", "reference", "make-checkpoint", "quantize", "plan", "experts", "calibrate")
}
WITHOUT_TORCH = frozenset({"info", "doctor", "plan", "experts"})


@dataclass(frozen=True)
class Broken:
    """Surroundings of a run.

    Attributes:
        environment: variables; None for one that is not set.
        closed: descriptors that are closed.
        stdout: file that takes the place of stdout.
        limits: resource → the most of it.
        fails: verbs that cannot work like this, for the reason that `says` matches.
        may_fail: verbs that work or not, depending on the machine.
    """

    environment: dict[str, str | None] = field(default_factory=dict)
    closed: tuple[int, ...] = ()
    stdout: str | None = None
    limits: dict[int, int] = field(default_factory=dict)
    in_a_gone_folder: bool = False
    fails: frozenset[str] = frozenset()
    may_fail: frozenset[str] = frozenset()
    says: str = ""


EVERY = frozenset(VERBS)
SURROUNDINGS = {
    "bare": Broken(
        # No home, no folder for temporary files, no programs, an unknown language, and an encoding
        # that lacks most characters.
        environment={
            "HOME": None,
            "TMPDIR": "/nowhere",
            "LC_ALL": "xx_YY.unknown",
            "LANG": "xx",
            "PATH": "",
            "PYTHONIOENCODING": "ascii",
            "XDG_CACHE_HOME": None,
        }
    ),
    "a home that is not there": Broken(environment={"HOME": "/nowhere"}),
    "no stdout": Broken(
        closed=(1,), fails=frozenset(PRINTING), says="stdout cannot be written: Bad file descriptor"
    ),
    "a full stdout": Broken(
        stdout="/dev/full",
        fails=frozenset(PRINTING),
        says="stdout cannot be written: No space left on device",
    ),
    "no stderr": Broken(closed=(2,)),
    "no streams": Broken(closed=(0, 1, 2), fails=frozenset(PRINTING)),
    "no current folder": Broken(
        in_a_gone_folder=True, fails=EVERY, says="the current folder is gone: .*; cd to another"
    ),
    "few descriptors": Broken(limits={resource.RLIMIT_NOFILE: 9}, may_fail=EVERY),
    "little memory": Broken(
        limits={resource.RLIMIT_AS: 250 << 20}, fails=EVERY - WITHOUT_TORCH, may_fail=WITHOUT_TORCH
    ),
    "a full disk": Broken(
        limits={resource.RLIMIT_FSIZE: 64}, fails=frozenset(WRITING), says="{tmp}/.*File too large"
    ),
}
# The rows that test code of all verbs in common take only some.
ONLY = {
    "no stdout": EVERY - {"calibrate"},
    "a home that is not there": {"generate"},
    "a full stdout": {"generate", "info"},
    "no stderr": {"generate", "info", "quantize"},
    "no streams": {"generate-file", "doctor", "make-checkpoint"},
    "no current folder": {"generate", "info"},
    "few descriptors": EVERY - {"bench", "calibrate", "chat"},
    "a full disk": WRITING - {"calibrate"},  # whose files of its own come first
}


@pytest.mark.parametrize(
    ("surroundings", "verb"),
    [
        pytest.param(name, verb, id=f"{name}-{verb}")
        for name in SURROUNDINGS
        for verb in every(sorted(ONLY.get(name, VERBS)), nth=2)
    ],
)
def test_a_verb_works_or_says_why_not_in_one_line(tmp_path: Path, surroundings: str, verb: str):
    broken = SURROUNDINGS[surroundings]
    code, said = run_in(broken, verb, tmp_path)
    errors = [line for line in said.splitlines() if line.startswith("moespan: ")]
    assert "Traceback" not in said
    if verb in broken.fails:
        assert code in (1, 2)
    elif verb not in broken.may_fail:
        assert code == 0, said
    assert code in (0, 1, 2)
    if code and 2 not in broken.closed:
        assert len(errors) == 1, said
        assert re.search(broken.says.format(tmp=re.escape(str(tmp_path))), errors[0])


def run_in(broken: Broken, verb: str, folder: Path) -> tuple[int, str]:
    """Run a verb; → its exit code, and all that it says on stderr."""
    (folder / "counts").write_text(json.dumps({"counts": COUNTS}))
    (folder / "in").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    command = VERBS[verb].format(quick=QUICKSTART, tiny=TINY, ref=REFERENCE, tmp=folder)
    current = folder / "gone"
    current.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    for name, value in broken.environment.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value

    def prepare() -> None:
        if broken.in_a_gone_folder:
            current.rmdir()
        if broken.stdout is not None:
            os.dup2(os.open(broken.stdout, os.O_WRONLY), 1)
        for descriptor in broken.closed:
            os.close(descriptor)
        for limit, value in broken.limits.items():
            resource.setrlimit(limit, (value, value))

    with (
        (folder / "in").open() as stdin,
        subprocess.Popen(
            [sys.executable, "-m", "moespan", *command.split()],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # not a file, whose size a limit could bound
            env=environment,
            cwd=current,
            preexec_fn=prepare,
        ) as process,
    ):
        try:
            if verb == "serve":
                end_once_it_answers(process, folder / "socket")
            said = process.communicate(timeout=MOST_SECONDS)[1].decode()
        finally:
            process.kill()
    return process.returncode, said


def end_once_it_answers(process: subprocess.Popen[bytes], path: Path) -> None:
    """Ask the server for `/ready` until it says yes, and end it like a supervisor does."""
    ends_at = time.monotonic() + MOST_SECONDS
    while process.poll() is None and time.monotonic() < ends_at:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            if client.recv(12) == b"HTTP/1.1 200":
                process.terminate()
                return
        time.sleep(0.2)
