"""Tokens of experts are counted alike under every layout, and as a trace sees them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from moespan import LLM, SamplingParams
from moespan.config import Layout
from moespan.engine.request import Request
from moespan.errors import RequestError
from moespan.planner.expert_balance import balanced
from tests.distributed.ranks import ONE_RANK, Ranks, cases, oracle
from tests.support import Oracle

SIXTEEN = oracle("sixteen")
PROMPT_LENGTHS, LENGTH = (3, 40, 5, 1, 9), 6
LAYOUTS = [
    Layout(tp=2),
    Layout(pp=2),
    Layout(sp=2, ep=2),
    Layout(dp=2, ep=2),
    Layout(tp=2, ep=4, pp=1, sp=2),
]
CASES = list(itertools.chain(cases(Oracle("sixteen").config, LAYOUTS)))


def counted(llm: LLM) -> dict[int, list[int]]:
    """The counts after some requests, whose prompts share no prefix."""
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    requests = [
        Request(
            id=str(number),
            prompt_token_ids=[(7 * number + 3 * place + 1) % 60 for place in range(length)],
            params=params,
        )
        for number, length in enumerate(PROMPT_LENGTHS)
    ]
    assert len(list(llm.stream((None, request) for request in requests))) == len(requests)
    return llm.expert_counts()


@pytest.mark.parametrize(("layout", "dispatch"), CASES, ids=str)
def test_every_layout_counts_as_one_rank(ranks: Ranks, layout: Layout, dispatch: str):
    config = Oracle("sixteen").config
    expected = counted(ranks.llm(SIXTEEN, expert_stats=True))
    assert list(expected) == [i for i in range(config.num_hidden_layers) if config.is_moe(i)]
    # The last token of each answer is not computed.
    num_tokens = sum(PROMPT_LENGTHS) + len(PROMPT_LENGTHS) * (LENGTH - 1)
    assert {sum(row) for row in expected.values()} == {num_tokens * config.num_experts_per_tok}
    assert counted(ranks.llm(SIXTEEN, layout, dispatch, expert_stats=True)) == expected


def test_counts_are_the_choices_of_a_trace(ranks: Ranks):
    llm = ranks.llm(SIXTEEN, Layout(tp=2), expert_stats=True)
    assert {sum(row) for row in llm.expert_counts().values()} == {0}
    for times in (1, 2):
        chosen = {
            one.layer: Counter(one.values.astype(int).ravel().tolist())
            for one in llm.trace(list(range(1, 30)))
            if one.module == "router.experts"
        }
        for layer, row in llm.expert_counts().items():
            assert row == [times * chosen[layer][expert] for expert in range(len(row))]


def test_counts_that_nobody_asked_for_are_refused_and_the_engine_goes_on(ranks: Ranks):
    llm = ranks.llm(SIXTEEN, ONE_RANK)
    with pytest.raises(RequestError, match="--expert-stats"):
        llm.expert_counts()
    assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))


def test_a_placement_made_from_counts_changes_no_token_and_counts_alike(
    ranks: Ranks, tmp_path: Path
):
    alone = ranks.llm(SIXTEEN, expert_stats=True)
    expected = counted(alone)
    table = {str(layer): balanced(row, 2, copies=1) for layer, row in expected.items()}
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(table))
    prompts = [[1, 2, 3, 4], [50, 40, 30]]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    tokens = [one.outputs[0].token_ids for one in alone.generate(prompts, params)]
    llm = ranks.llm(SIXTEEN, Layout(ep=2, dp=2), expert_stats=True, expert_placement=str(path))
    assert counted(llm) == expected
    assert [one.outputs[0].token_ids for one in llm.generate(prompts, params)] == tokens
