"""With `batch_invariant` a request gets the same tokens, and the same bits of log probabilities,
alone and in any batch, with its prompt in any chunks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moespan import LLM, SamplingParams
from moespan.config import EngineConfig, Layout
from moespan.errors import ConfigError
from moespan.front.outputs import RequestOutput
from tests import tiers
from tests.support import write_config

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}

# (prompt, seed) of each request; no two prompts share blocks, so that each is computed.
requests = st.lists(
    st.tuples(st.lists(st.integers(3, 511), min_size=1, max_size=70), st.integers(0, 99)),
    min_size=2,
    max_size=6,
)

Start = Callable[..., LLM]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no compiler")
    folder = write_config(tmp_path_factory.mktemp("model"), **SIZES)
    with ExitStack() as engines:

        def start(**options: Any) -> LLM:
            return engines.enter_context(
                LLM(str(folder), device="cpu", dtype="bfloat16", load_format="dummy", **options)
            )

        yield start


def bits(output: RequestOutput) -> list[Any]:
    entries = output.outputs[0].logprobs or []
    return [(entry.token_id, entry.logprob, entry.top) for entry in entries]


def params(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1, seed=seed, max_tokens=9, ignore_eos=True, logprobs=2)


def alone(llm: LLM, asked: list[tuple[list[int], int]]) -> list[list[Any]]:
    return [bits(llm.generate(prompt, params(seed))[0]) for prompt, seed in asked]


def together(llm: LLM, asked: list[tuple[list[int], int]]) -> list[list[Any]]:
    prompts = [prompt for prompt, _ in asked]
    return [bits(output) for output in llm.generate(prompts, [params(seed) for _, seed in asked])]


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_tokens_do_not_depend_on_the_batch_or_the_chunks(start: Start, cache: str) -> None:
    # Without the cache of prefixes, so that an engine computes a prompt each time.
    common = {"batch_invariant": True, "kv_cache_dtype": cache, "enable_prefix_caching": False}
    whole = start(**common)
    chunked = start(**common, max_num_batched_tokens=11, max_num_seqs=3)

    @settings(max_examples=tiers.examples(6))
    @given(asked=requests)
    def check(asked: list[tuple[list[int], int]]) -> None:
        expected = alone(whole, asked)
        assert together(whole, asked) == expected
        assert together(chunked, asked) == expected

    check()


def test_a_prefix_that_is_found_in_the_cache_changes_nothing(start: Start) -> None:
    llm = start(batch_invariant=True)
    asked = [([*range(3, 70)], 1), ([*range(3, 70), 9, 8], 2)]
    assert alone(llm, asked) == together(llm, asked) == alone(llm, asked)


def test_without_the_option_the_batch_changes_bits(start: Start) -> None:
    """So that the tests above can fail."""
    llm = start(enable_prefix_caching=False)
    asked = [([*range(3 + i, 40 + 3 * i)], i) for i in range(12)]
    assert alone(llm, asked) != together(llm, asked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "npu"}, "batch_invariant=True is for device=cpu, not npu; leave it out"),
        ({"device": "cuda"}, "batch_invariant=True is for device=cpu, not cuda; leave it out"),
        ({"dtype": "float32"}, "float32 gives the same tokens without it"),
        ({"dtype": "float16"}, "is for dtype=bfloat16, not float16"),
        ({"layout": Layout(tp=4)}, "does not go with tp=4: sums over more than two ranks may add"),
        ({"layout": Layout(sp=2)}, "does not go with sp=2"),
        ({"layout": Layout(dp=2, ep=2)}, "does not go with ep=2×dp=2"),
        (
            {"layout": Layout(tp=2, ep=2), "expert_placement": {"default": [[0], [1]]}},
            "is for expert_placement=contiguous or round_robin",
        ),
    ],
    ids=str,
)
def test_what_cannot_hold_the_promise_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig("unused", batch_invariant=True, **options)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, dp=2), Layout(tp=2, ep=2)], ids=str)
def test_layouts_that_hold_the_promise(layout: Layout) -> None:
    assert EngineConfig("unused", layout, batch_invariant=True).batch_invariant
