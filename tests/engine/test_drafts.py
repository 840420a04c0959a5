"""Drafts come from the sequence's own text, and change no token."""

from __future__ import annotations

import os
import random
import shutil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moespan import LLM, SamplingParams
from moespan.config import EngineConfig
from moespan.engine.drafts import Drafter
from moespan.engine.info import EngineStats
from moespan.errors import ConfigError
from tests.support import QUICKSTART

TEXT = [11, 12, 13, 14, 15, 16, 17, 18]


def follow(prompt: list[int], output: list[int], most: int = 8) -> list[list[int]]:
    """The drafts before each token of the output."""
    token_ids = list(prompt)
    drafter, drafts = Drafter(token_ids), []
    for token_id in output:
        drafts.append(drafter.draft(most))
        token_ids.append(token_id)
    return drafts


def test_what_followed_the_last_tokens_before_is_the_draft():
    *_, last = follow([*range(30, 90), 1, 2], [*range(40, 60)], most=4)
    assert last == [59, 60, 61, 62]


def test_nothing_is_drafted_until_predictions_have_been_right():
    drafts = follow([*TEXT, *TEXT, 1], TEXT)
    assert drafts[:3] == [[], [], []]  # two tokens are matched first, and one predicted
    assert drafts[5] and drafts[5] == TEXT[5 : 5 + len(drafts[5])]


def test_text_that_does_not_repeat_gets_no_drafts():
    assert not any(follow([*range(100)], [*range(200, 300)]))


def test_predictions_that_were_wrong_lower_the_number_of_drafts():
    rng = random.Random(0)
    prompt = [*range(40)]
    right = follow(prompt, [*range(1, 30)])
    output = [n if rng.random() < 0.6 else rng.randrange(100, 200) for n in range(1, 30)]
    wrong = follow(prompt, output)
    assert max(map(len, right)) == 8
    assert sum(map(len, wrong)) < sum(map(len, right)) / 4


def test_a_repetition_goes_on_beyond_the_end_of_the_text():
    *_, last = follow([1, 2, 3], [1, 2, 3] * 6)
    assert last[:7] == [3, 1, 2, 3, 1, 2, 3][: len(last)] and len(last) > 3


def test_a_token_that_is_being_sampled_is_skipped_and_counts_as_a_draft():
    token_ids = [*TEXT, *TEXT * 3]
    drafter = Drafter(token_ids)
    for _ in range(20):
        token_ids.append(token_ids[-8])
        drafter.draft(1)
    now = drafter.draft(5)
    assert len(now) == 5 and drafter.draft(4, num_expected=1) == now[1:]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40), st.sets(st.integers(0, 39), max_size=9)
)
def test_when_a_drafter_is_asked_changes_nothing(text: list[int], asked: set[int]):
    token_ids = text[:1]
    often = Drafter(token_ids)
    for at, token_id in enumerate(text[1:]):
        if at in asked:
            often.draft(3)
        token_ids.append(token_id)
    late = text[:1]
    once = Drafter(late)
    late += text[1:]
    assert often.draft(4) == once.draft(4)


# With the network

PROMPTS: list[Any] = [
    "Story: Mia, fox, lake.",
    "sort 30 70 7 89 97:",
    "681+734=",
    *([seed + (7 * at * at) % 300 for at in range(25)] * 2 for seed in range(5)),
]


def run(
    params: dict[str, Any], model: str = str(QUICKSTART), **options: Any
) -> tuple[list[Any], EngineStats]:
    """Every answer with its log probabilities, and the engine's counts."""
    several = [
        SamplingParams(
            **{"max_tokens": 80, "seed": number, "ignore_eos": number % 2 == 0, **params}
        )
        for number in range(len(PROMPTS))
    ]
    with LLM(model, device="cpu", **options) as llm:
        outputs = llm.generate(PROMPTS, several)
        answers = [
            (one.token_ids, one.text, one.finish_reason, one.stop_reason, one.logprobs)
            for output in outputs
            for one in output.outputs
        ]
        return answers, llm.stats()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.4, "n": 2, "top_p": 0.9, "repetition_penalty": 1.05},
        {"temperature": 0, "stop": [" went", "ee", "7"], "min_tokens": 4},
        {"temperature": 0.7, "allowed_token_ids": [*range(300, 306)], "bad_words": ["the lake"]},
        {"temperature": 0.5, "structured_outputs": {"regex": "( (Mia|fox|and a) *){9,20}"}},
    ],
    ids=["greedy", "drawn", "stop", "few", "grammar"],
)
def test_tokens_are_the_same_with_and_without_drafts(params: dict[str, Any], ahead: bool):
    if "structured_outputs" in params:
        pytest.importorskip("llguidance")
    common: dict[str, Any] = {"dtype": "float32", "async_scheduling": ahead}
    expected, _ = run(params, **common)
    # Blocks of 4 tokens that several sequences compete for.
    few: dict[str, Any] = {
        "block_size": 4,
        "num_blocks": 140,
        "max_model_len": 160,
        "max_num_seqs": 12,
    }
    answers, stats = run(params, **common, **few, speculative_tokens=5)
    for (*mine, scores), (*theirs, wanted) in zip(answers, expected, strict=True):
        assert (mine, scores) == (theirs, wanted)
    assert stats.num_accepted_tokens > 5
    assert stats.num_draft_tokens > stats.num_accepted_tokens


def test_bits_are_the_same_with_and_without_drafts_in_bfloat16():
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no compiler")
    common: dict[str, Any] = {"dtype": "bfloat16", "batch_invariant": True}
    params = {"temperature": 0.4, "logprobs": 2}
    expected, _ = run(params, **common)
    answers, stats = run(params, **common, speculative_tokens=5)
    assert answers == expected
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speculative_tokens": -1}, "speculative_tokens=-1 must be a number of tokens, or 0"),
        (
            {"speculative_tokens": 4, "max_num_seqs": 4},
            "speculative_tokens=4 must be below max_num_seqs=4",
        ),
    ],
)
def test_numbers_of_drafts_that_cannot_be_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        EngineConfig("unused", **options)
