"""The same requests again give the same bits in bfloat16, where docs/verification.md says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moespan import LLM, SamplingParams
from moespan.front.outputs import RequestOutput
from tests.support import QUICKSTART

PROMPTS = ["Story: Mia, fox, lake.", "681+734=", "Story: Ben, bird, hill and a long way home."]
PARAMS = SamplingParams(temperature=1, seed=3, max_tokens=24, ignore_eos=True, logprobs=5)


def bits(output: RequestOutput) -> list[Any]:
    return [
        (entry.token_id, entry.logprob, entry.top) for entry in output.outputs[0].logprobs or []
    ]


def engine(tp: int) -> LLM:
    """Fewer sequences in a step than prompts in a call: later prompts follow earlier ones."""
    return LLM(
        str(QUICKSTART),
        device="cpu",
        dtype="bfloat16",
        tensor_parallel_size=tp,
        enable_prefix_caching=False,
        max_num_seqs=2,
    )


@pytest.fixture(scope="module", params=[1, 4], ids="tp={}".format)
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with engine(request.param) as llm:
        yield llm


def call(llm: LLM) -> list[list[Any]]:
    return [bits(output) for output in llm.generate(PROMPTS, PARAMS)]


def test_a_request_alone_is_repeatable_to_the_last_bit(llm: LLM):
    rounds = [[bits(llm.generate(prompt, PARAMS)[0]) for prompt in PROMPTS] for _ in range(3)]
    assert len(rounds[0][0]) == 24
    assert rounds == [rounds[0]] * 3


def test_a_call_is_repeatable_to_the_last_bit(llm: LLM):
    calls = [call(llm) for _ in range(4)]
    assert calls == [calls[0]] * 4


def test_another_engine_gives_the_same_bits():
    calls = []
    for _ in range(2):
        with engine(1) as llm:
            calls.append(call(llm))
    assert calls[0] == calls[1]
