"""Under every layout and in any batch, a request gets the tokens that it gets on one rank."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moespan import LLM, SamplingParams
from moespan.checkpoint.random import make_checkpoint
from moespan.config import Layout
from moespan.engine.request import OutputDelta, Request
from tests.distributed.ranks import Ranks
from tests.support import geometry

VERY_DIFFERENT = [
    (Layout(tp=4, ep=2), "replicated"),
    (Layout(ep=4, dp=4), "all_to_all"),
    (Layout(pp=4), "replicated"),
    (Layout(tp=2, ep=4, sp=2), "all_gather"),
    (Layout(ep=4, pp=2, sp=2, dp=2), "all_to_all"),
    (Layout(tp=2, ep=4, pp=2, dp=2), "all_gather"),
    (Layout(tp=2, ep=8, sp=2, dp=2), "all_to_all"),
    (Layout(tp=2, ep=2, pp=4), "replicated"),
]
# The same with plans made ahead, on every axis along which sampled tokens are sent.
AHEAD = [(Layout(tp=4, ep=2), "replicated"), (Layout(tp=2, ep=8, sp=2, dp=2), "all_to_all")]
# A replica's blocks hold one sequence of the greatest length and one block more.
FEW: dict[str, Any] = {
    "max_model_len": 48,
    "block_size": 4,
    "num_blocks": 13,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 12,
}
MANY = {**FEW, "num_blocks": 400}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers and eight heads, so that every layout fits; its 10 experts do not divide by 4."""
    folder = tmp_path_factory.mktemp("workloads") / "model"
    make_checkpoint(
        folder, geometry(num_hidden_layers=4, num_attention_heads=8, n_routed_experts=10)
    )
    return folder


@dataclass
class Job:
    """A request, and the number of tokens after which it is dropped."""

    request: Request
    dropped_after: int | None


@dataclass
class Received:
    """The tokens and the end of one continuation."""

    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)


Key = tuple[str, int]


def random_jobs(seed: int, count: int, penalties: bool = True) -> list[Job]:
    """Prompts from one token to several chunks, with common prefixes; all methods of sampling."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(61) for _ in range(length)] for length in (8, 12, 17)]
    jobs = []
    for number in range(count):
        prompt = list(rng.choice([[], *prefixes]))
        prompt += [rng.randrange(61) for _ in range(rng.choice([1, 2, 7, 12]))]
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 3]),
            max_tokens=rng.choice([1, 4, 10]),
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_k=rng.choice([0, 8]),
            top_p=rng.choice([1.0, 0.9]),
            seed=rng.choice([None, rng.randrange(1000)]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]) if penalties else 1.0,
            frequency_penalty=rng.choice([0.0, 0.5]) if penalties else 0.0,
            ignore_eos=rng.random() < 0.7,
            allowed_token_ids=list(range(0, 61, 3)) if number % 4 == 2 else None,
        )
        dropped_after = rng.choice([None, None, None, 0, 3])
        jobs.append(
            Job(Request(id=str(number), prompt_token_ids=prompt, params=params), dropped_after)
        )
    return jobs


def long_jobs(layout: Layout) -> list[Job]:
    """Two requests for each replica that together outgrow its blocks, at whatever speed."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    return [
        Job(Request(id=f"long-{number}", prompt_token_ids=[number] * 9, params=params), None)
        for number in range(2 * layout.dp)
    ]


def run(llm: LLM, jobs: list[Job], drop: bool, at_once: int = 12) -> dict[Key, Received]:
    """Send `at_once` requests, then one more with each delta; → everything received."""
    client = llm._client
    received = {
        (job.request.id, index): Received() for job in jobs for index in range(job.request.params.n)
    }
    jobs_by_id = {job.request.id: job for job in jobs}
    dropped: set[str] = set()
    coming: Iterator[Job] = iter(jobs)

    def send(count: int) -> None:
        for _, job in zip(range(count), coming, strict=False):
            client.add(job.request)

    def take(delta: OutputDelta) -> None:
        assert delta.error is None
        mine = received[delta.id, delta.index]
        assert not mine.ends, "something came after the end"
        mine.token_ids += delta.token_ids
        mine.ends += [delta.finish_reason] if delta.finish_reason is not None else []
        limit = jobs_by_id[delta.id].dropped_after
        if drop and limit is not None and len(mine.token_ids) >= limit and delta.id not in dropped:
            client.abort(delta.id)
            dropped.add(delta.id)

    def is_over(key: Key) -> bool:
        return bool(received[key].ends) or key[0] in dropped

    send(at_once)
    while not all(map(is_over, received)):
        deltas = client.receive()
        for delta in deltas:
            take(delta)
        send(len(deltas))
    return received


@pytest.mark.parametrize(
    ("layout", "dispatch", "ahead"),
    [
        pytest.param(layout, dispatch, ahead, id=f"{layout}-{dispatch}" + "-ahead" * ahead)
        for ahead, chosen in ((False, VERY_DIFFERENT), (True, AHEAD))
        for layout, dispatch in chosen
    ],
)
def test_mixed_workloads_give_every_request_the_tokens_of_one_rank(
    ranks: Ranks, model: Path, layout: Layout, dispatch: str, ahead: bool
):
    seed = VERY_DIFFERENT.index((layout, dispatch)) + len(VERY_DIFFERENT) * ahead
    drafts = 2 if ahead or seed % 2 else 0
    # Penalties need to know the last token, so with them no plan is made ahead.
    jobs = long_jobs(layout) + random_jobs(seed, count=11 + 3 * layout.dp, penalties=not ahead)
    expected = run(ranks.llm(model, **MANY), jobs, drop=False)
    options = {**FEW, "async_scheduling": ahead, "speculative_tokens": drafts}
    options["max_num_seqs"] += 3 * drafts  # rows for them
    llm = ranks.llm(model, layout, dispatch, **options)
    received = run(llm, jobs, drop=True, at_once=8 + 6 * layout.dp)

    is_dropped = {job.request.id: job.dropped_after is not None for job in jobs}
    for key, mine in received.items():
        theirs = expected[key]
        if is_dropped[key[0]] and not mine.ends:
            assert mine.token_ids == theirs.token_ids[: len(mine.token_ids)], key
        else:
            assert mine == theirs, key
            assert len(mine.ends) == 1

    # Dropped requests bring no more deltas and use no blocks.
    stats = llm.stats()
    assert (stats.num_waiting, stats.num_running, stats.kv_usage) == (0, 0, 0.0)
    # The run has met the difficult cases.
    sent = {(axis, module) for rank in llm.traffic() for axis, _, module, _, _ in rank}
    axes_of_tokens = {axis for axis, module in sent if module == "sampled"}
    assert axes_of_tokens == {axis for axis in ("tp", "sp") if ahead and layout.sizes[axis] > 1}
    assert stats.num_preemptions > 0
    assert drafts or not stats.num_draft_tokens
    assert stats.num_prefix_hit_tokens > 0
    assert any(is_dropped.values()) and not all(is_dropped.values())


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=4), Layout(ep=4, dp=4), Layout(ep=2, dp=4), Layout(ep=2, pp=2, dp=2)],
    ids=str,
)
def test_one_request_keeps_going_while_all_other_replicas_are_idle(
    ranks: Ranks, model: Path, layout: Layout
):
    prompt, params = [3, 1, 4, 1, 5], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (expected,) = ranks.llm(model, **MANY).generate(prompt, params)
    for dispatch in layout.dispatches:
        (output,) = ranks.llm(model, layout, dispatch, **MANY).generate(prompt, params)
        assert output.outputs == expected.outputs


def test_requests_go_to_the_replica_that_has_their_prefix(ranks: Ranks, model: Path):
    llm = ranks.llm(model, Layout(dp=4), **MANY)
    params = SamplingParams(temperature=0, max_tokens=2)
    prefixes = [[first] * 13 for first in range(8)]
    llm.generate(prefixes, params)
    outputs = llm.generate([[*prefix, 60] for prefix in prefixes], params)
    assert [output.num_cached_tokens for output in outputs] == [12] * 8
