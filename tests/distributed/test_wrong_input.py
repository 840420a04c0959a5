"""Whatever a program passes, it gets one error, and the engine answers the next request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moespan import LLM, SamplingParams
from moespan.errors import RequestError
from tests.support import QUICKSTART

GREEDY = SamplingParams(temperature=0)
USER = {"role": "user", "content": "12+30="}

WRONG: dict[str, Callable[[Any], object]] = {
    "no prompts": lambda llm: llm.generate(None),
    "a number": lambda llm: llm.generate(5),
    "a set": lambda llm: llm.generate({"1+1="}),
    "bytes": lambda llm: llm.generate(b"1+1="),
    "a generator": lambda llm: llm.generate(text for text in ["1+1="]),
    "an array": lambda llm: llm.generate(np.array([1, 2])),
    "a tuple of ids": lambda llm: llm.generate([(1, 2)]),
    "a pair": lambda llm: llm.request((1, 2)),
    "floats": lambda llm: llm.generate([[1.0, 2.0]]),
    "a huge id": lambda llm: llm.generate([[10**6000]]),
    "params as a dict": lambda llm: llm.generate("1+1=", {"n": 1}),
    "params in a list": lambda llm: llm.generate(["1+1="], [{"n": 1}]),
    "params as text": lambda llm: llm.generate(["1+1="], "n"),
    "params as a number": lambda llm: llm.generate("1+1=", 0),
    "a stop of bytes": lambda llm: llm.generate("1+1=", SamplingParams(stop=b"x")),  # type: ignore[arg-type]
    "stops that are numbers": lambda llm: llm.generate(
        "1+1=",
        SamplingParams(stop=[1]),  # type: ignore[list-item]
    ),
    "logprobs of bool": lambda llm: llm.generate("1+1=", SamplingParams(logprobs=True)),
    "a biased name": lambda llm: llm.generate(
        "1+1=",
        SamplingParams(logit_bias={"a": 1}),  # type: ignore[dict-item]
    ),
    "one message": lambda llm: llm.chat(USER),
    "no messages": lambda llm: llm.chat(None),
    "text as messages": lambda llm: llm.chat("12+30="),
    "an image": lambda llm: llm.chat([{"role": "user", "content": [{"type": "image_url"}]}]),
    "no content": lambda llm: llm.chat([{"role": "user", "content": None}]),
    "a huge key": lambda llm: llm.chat([{**USER, "k" * 10**6: 5}]),
}


@pytest.mark.parametrize("tp", [1, 2])
def test_wrong_input_is_one_error_and_the_next_request_is_answered(tp: int):
    with LLM(str(QUICKSTART), device="cpu", tensor_parallel_size=tp) as llm:
        for name, call in WRONG.items():
            with pytest.raises(RequestError) as caught:
                call(llm)
            message = str(caught.value)
            assert "\n" not in message, name
            assert len(message) < 400, name
        assert llm.generate("681+734=", GREEDY)[0].outputs[0].text == "1415"
        assert llm.tokenizer is not None
        ids: Any = list(np.array(llm.tokenizer.encode("681+734=")))
        assert llm.generate(ids, GREEDY)[0].outputs[0].text == "1415"
        prompt: Any = {"prompt_token_ids": None, "prompt": "12+30="}
        assert llm.generate(prompt, GREEDY)[0].outputs[0].text == "42"
        parts = [{"type": "text", "text": "12+30="}]
        assert (
            llm.chat([{"role": "user", "content": parts, "name": None}], GREEDY)[0]
            .outputs[0]
            .text.endswith("42")
        )
