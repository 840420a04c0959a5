"""Real clients, unmodified, get from the server what they expect.

They have an environment of their own, which `bash tools/clients.sh --prepare` makes; without it
these tests are skipped. The programs beside this file say what they check.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moespan import LLM, SamplingParams
from tests.support import QUICKSTART

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("MOESPAN_CLIENTS", HERE.parents[1] / ".clients")) / "bin" / "python"
KEY = "a-key-for-tests"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no clients: bash tools/clients.sh --prepare installs them"
)

PAIRS = [("681+734=", " 1415"), ("681+734=", " 1416"), ("sort 30 70 7:", " 7 30 70")]
CONTEXTS = ["681+734=", "sort 30 70 7:", "12+9="]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of a server of the quickstart model in float32."""
    command = [sys.executable, "-m", "moespan", "serve", str(QUICKSTART), "--port", "0"]
    flags = ["--served-model-name", "quickstart", "--dtype", "float32"]
    environment = {**os.environ, "MOESPAN_API_KEY": KEY}
    with subprocess.Popen(
        [*command, *flags], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        deadline, found = time.monotonic() + 120, None
        for line in process.stderr:
            found = re.search(r"ready on (http://[^\s;]+)", line)
            if found or time.monotonic() > deadline:
                break
        assert found
        yield f"{found[1].rstrip('/')}/v1"
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0


def run(program: str, *arguments: object) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    environment |= {"HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false", "DO_NOT_TRACK": "1"}
    ran = subprocess.run(
        [PYTHON, HERE / program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("client", ["openai", "langchain", "litellm"])
def test_a_client_gets_what_it_expects(url: str, client: str):
    run(f"{client}_client.py", url, "quickstart", KEY)


def test_lm_eval_scores_as_the_engine_itself(url: str, tmp_path: Path):
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps(own_scores()), encoding="utf-8")
    run("lm_eval_client.py", url, "quickstart", KEY, expected)


def own_scores() -> dict[str, object]:
    """What lm_eval_client.py compares with, from `LLM`."""
    with LLM(str(QUICKSTART), dtype="float32") as llm:

        def encode(text: str) -> list[int]:
            assert llm.tokenizer is not None
            return llm.tokenizer.encode(text, add_special_tokens=False)

        scores = []
        for context, continuation in PAIRS:
            params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
            (output,) = llm.generate([encode(context + continuation)], params)
            entries = (output.prompt_logprobs or [])[len(encode(context)) :]
            value = sum(entry.logprob for entry in entries if entry)
            greedy = all(entry.logprob == entry.top[0][1] for entry in entries if entry)
            scores.append((value, greedy))
        params = SamplingParams(max_tokens=12, temperature=0, stop=["\n"])
        after_ids = llm.generate([encode(context) for context in CONTEXTS], params)
        after_text = llm.generate(CONTEXTS, params)
    return {
        "pairs": PAIRS,
        "scores": scores,
        "contexts": CONTEXTS,
        "texts_after_ids": [output.outputs[0].text for output in after_ids],
        "texts_after_text": [output.outputs[0].text for output in after_text],
    }
