"""`moespan serve` on two NPUs of the stand-in, as its clients see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest

from tests import tiers

ROOT = Path(__file__).resolve().parents[2]
# The environment of `bash tools/clients.sh --prepare`.
CLIENTS = Path(os.environ.get("MOESPAN_CLIENTS", ROOT / ".clients")) / "bin/python"
KEY = "a-key-for-tests"
FLAGS = ("--device", "npu", "-tp", "2", "--dtype", "bfloat16", "--served-model-name", "quickstart")
QUESTIONS = {"681+734=": "1415", "12+30=": "42", "sort 40 7 93:": "7 40 93"}


@pytest.fixture(scope="module")
def url(ascend_sim) -> Iterator[str]:
    """Address of the server."""
    environ = {"PYTHON": sys.executable, "ASCEND_SIM_HBM_GIB": "1", "MOESPAN_API_KEY": KEY}
    with subprocess.Popen(
        ["bash", "tools/ascend_sim/run.sh", "serve", "models/quickstart", "--port", "0", *FLAGS],
        cwd=ROOT,
        env={**os.environ, **environ},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            told = []
            for line in process.stderr:
                told.append(line)
                if ready := re.search(r"ready on (http://[^\s;]+)", line):
                    break
            else:
                pytest.fail("".join(told))
            yield f"{ready[1].rstrip('/')}/v1"
            process.terminate()
            _, rest = process.communicate(timeout=60)
            assert process.returncode == 0, rest
        finally:
            process.kill()


def streamed(client: httpx.Client, question: str) -> str:
    """The text of a streamed chat, whose last event is `[DONE]`."""
    body = {
        "model": "quickstart",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
    }
    with client.stream("POST", "/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    deltas = [msgspec.json.decode(one)["choices"][0]["delta"] for one in events[:-1]]
    assert len(deltas) > 2, "the text came in one piece"
    return "".join(delta.get("content") or "" for delta in deltas)


def test_streams_at_once_are_answered_from_two_npus(url: str) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    with (
        httpx.Client(base_url=url, headers=headers, timeout=120) as client,
        ThreadPoolExecutor() as pool,
    ):
        texts = list(pool.map(lambda question: streamed(client, question), QUESTIONS))
        drawn = [
            client.post(
                "/completions",
                json={
                    "model": "quickstart",
                    "prompt": "681+734=",
                    "temperature": 0.8,
                    "top_p": 0.9,
                    "seed": 7,
                    "max_tokens": 8,
                },
            ).json()["choices"][0]["text"]
            for _ in range(2)
        ]
    assert [text.strip() for text in texts] == list(QUESTIONS.values())
    assert drawn[0] == drawn[1]


@pytest.mark.skipif(not tiers.ALL, reason="MOESPAN_TEST_ALL=1 runs the openai package here")
@pytest.mark.skipif(not CLIENTS.exists(), reason="no clients: bash tools/clients.sh --prepare")
def test_the_openai_package_gets_what_it_expects(url: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [CLIENTS, ROOT / "tests/clients/openai_client.py", url, "quickstart", KEY],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
