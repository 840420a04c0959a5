"""The quickstart model answers its held-out exercises equally well under every kind of layout."""

from __future__ import annotations

import pytest

from moespan import LLM, SamplingParams, StructuredOutputsParams
from moespan.config import Layout
from tests import tiers
from tests.distributed.ranks import Ranks
from tests.quickstart.files import tasks
from tests.support import QUICKSTART

EXERCISES = [
    (task, prompt)
    for task in tasks.TASKS
    for prompt, _ in tasks.heldout(task, 8 if tiers.ALL else 4)
]
LAYOUTS = [
    Layout(tp=4, ep=4),
    Layout(tp=2, ep=4, sp=2),
    Layout(pp=4),
    Layout(ep=4, dp=4),
    Layout(tp=2, pp=2),
    Layout(ep=4, sp=2, dp=2),
]


def answers(llm: LLM) -> list[str]:
    params = SamplingParams(temperature=0, max_tokens=64)
    outputs = llm.generate([prompt for _, prompt in EXERCISES], params)
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    return [output.outputs[0].text for output in outputs]


def forms(llm: LLM) -> list[str]:
    """Drawn answers of given forms, mixed with free ones."""
    given = [
        StructuredOutputsParams(json_object=True),
        StructuredOutputsParams(regex="[0-9]{4}"),
        StructuredOutputsParams(choice=["a", "b c"]),
        None,
    ]
    params = [
        SamplingParams(temperature=1, seed=seed, max_tokens=12, structured_outputs=form)
        for seed in range(2)
        for form in given
    ]
    return [output.outputs[0].text for output in llm.generate(["681+734="] * 8, params)]


def num_correct(texts: list[str]) -> int:
    return sum(
        tasks.is_correct(task, prompt, text)
        for (task, prompt), text in zip(EXERCISES, texts, strict=True)
    )


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks) -> tuple[list[str], list[str]]:
    """The answers of one rank, and its answers of given forms."""
    llm = ranks.llm(QUICKSTART)
    return answers(llm), forms(llm)


@pytest.fixture(scope="module")
def expected(one_rank: tuple[list[str], list[str]]) -> list[str]:
    """The answers of one rank."""
    return one_rank[0]


def test_one_rank_answers_nearly_all_exercises(expected: list[str]):
    assert num_correct(expected) >= 0.9 * len(EXERCISES)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_answers_as_many_exercises_as_one_rank(
    ranks: Ranks, expected: list[str], one_rank: tuple[list[str], list[str]], layout: Layout
):
    llm = ranks.llm(QUICKSTART, layout)
    assert forms(llm) == one_rank[1]
    texts = answers(llm)
    assert num_correct(texts) == num_correct(expected)
    assert texts == expected
