"""The same requests again give the same bits in bfloat16, where docs/verification.md says so."""

from __future__ import annotations

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
    return LLM(
        str(QUICKSTART),
        device="cpu",
        dtype="bfloat16",
        tensor_parallel_size=tp,
        enable_prefix_caching=False,
    )


@pytest.mark.parametrize("tp", [1, 4])
def test_a_request_alone_is_repeatable_to_the_last_bit(tp: int):
    with engine(tp) as llm:
        rounds = [[bits(llm.generate(prompt, PARAMS)[0]) for prompt in PROMPTS] for _ in range(3)]
    assert len(rounds[0][0]) == 24
    assert rounds == [rounds[0]] * 3


def test_a_call_is_repeatable_to_the_last_bit_on_one_rank():
    calls = []
    for _ in range(2):
        with engine(1) as llm:
            calls += [[bits(output) for output in llm.generate(PROMPTS, PARAMS)] for _ in range(2)]
    assert calls == [calls[0]] * 4
