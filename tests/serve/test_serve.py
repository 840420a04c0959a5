"""`moespan serve` as a program with real ranks: its front, its keys, its sockets, its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from moespan import LLM, SamplingParams
from tests.launch.test_ranks import alive, descendants

START_S, END_S = 120, 20
KEY = "the-key"
LISTENS = "0A"  # the state in /proc/net/tcp


@contextlib.contextmanager
def started(*flags: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server on a port of its own, when it is ready; ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moespan", "serve", "models/quickstart", "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MOESPAN_API_KEY": KEY},
    )
    assert process.stderr is not None
    told: list[str] = []
    try:
        for line in process.stderr:
            told.append(line)
            if found := re.search(r"ready on (http://127\.0\.0\.1:\d+); ", line):
                break
        else:
            raise AssertionError("".join(told))
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=found[1], headers=headers, timeout=60) as client:
            yield process, client
        process.terminate()
        assert process.wait(END_S) == 0
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(UnboundLocalError):
            reader.join()
        process.stderr.close()


def score_with(client: httpx.Client, ids: list[int]) -> list[float | None]:
    """The log probabilities of token ids, as lm-eval asks for them."""
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 0}
    logprobs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    scores: list[float | None] = logprobs["token_logprobs"]
    return scores


def listening(pids: set[int]) -> list[str]:
    """The addresses, as the kernel writes them, on which processes listen over TCP."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(link.readlink())
                inodes.add(name.removeprefix("socket:[").removesuffix("]"))
    rows = [
        line.split()
        for file in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]
    ]
    return [row[1].partition(":")[0] for row in rows if row[3] == LISTENS and row[9] in inodes]


def test_a_server_with_two_ranks_says_what_llm_says_and_leaves_nothing():
    flags = ("-tp", "2", "--device", "cpu", "--dtype", "float32", "--expert-stats")
    with started(*flags) as (process, client):
        body = {"prompt": "681+734=", "temperature": 0, "max_tokens": 8}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "1415"
        chat = {"messages": [{"role": "user", "content": "12+30="}], "temperature": 0}
        answer = client.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == " 42"
        ids = client.post("/tokenize", json={"prompt": "sort 40 7 93: 7 40 93"}).json()["tokens"]
        told = score_with(client, ids)
        assert {sum(row) > 0 for row in client.get("/ui/experts").json()["counts"]} == {True}
        assert "moespan_expert_tokens_total{expert=" in client.get("/metrics").text

        pids = descendants(process.pid)
        assert len(pids) > 3, "front, agent and two ranks"
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps, "the front has no torch"
        for pid in pids - {process.pid}:
            assert KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert set(listening(pids)) == {"0100007F"}, "all of them on loopback"

        stream: Any
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            next(stream.iter_lines())
        deadline = time.monotonic() + 10
        while client.get("/load").json() != {"server_load": 0}:
            assert time.monotonic() < deadline, "a client has gone, and its request goes on"
            time.sleep(0.05)
    deadline = time.monotonic() + END_S
    while alive(pids):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)

    with LLM("models/quickstart", device="cpu", dtype="float32") as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        expected = llm.generate([ids], params)[0].prompt_logprobs
    assert expected is not None and told[0] is None
    scores = [entry.logprob for entry in expected if entry is not None]
    assert told[1:] == pytest.approx(scores, abs=1e-3)


def test_a_checkpoint_that_cannot_be_loaded_ends_it_with_one_line(tmp_path: Path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path("models/quickstart", name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    process = subprocess.run(
        [sys.executable, "-m", "moespan", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert process.returncode == 1
    *_, last = process.stderr.splitlines()
    assert "model.safetensors" in last and "Traceback" not in process.stderr


def test_ctrl_c_ends_a_server_that_starts():
    process = subprocess.Popen(
        [sys.executable, "-m", "moespan", "serve", "models/quickstart", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process:
        assert "memory of the fullest rank" in process.stderr.readline()
        time.sleep(1)
        pids = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(END_S) in (0, 130)
    deadline = time.monotonic() + END_S
    while alive(pids):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)
