"""Pipeline parallelism keeps its stages busy: idle stage-steps, counted from the plans in flight.

Time is counted in ticks: in each, every stage works on one plan, and hands it to the next. The
leader acts between ticks as `Engine.step` does: it takes in the result that the last stage has,
then makes plans until pp of them are in flight. So a tick in which no plan is made for the first
stage is a bubble, which idles each of the pp stages for one tick.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespan.config import EngineConfig, Layout
from moespan.engine.replicas import Replicas
from moespan.engine.request import Request, SamplingParams
from moespan.engine.step import StepPlan
from tests.engine.paged_model import EOS, VOCAB, PagedModel


@dataclass
class Log:
    """What a run leaves.

    Attributes:
        sizes: sequences of the plan that each tick brought; 0 is a bubble.
        unfinished: sequences that were unfinished in each tick.
        num_ended_whole: plans of which no sequence went on.
    """

    sizes: list[int] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)
    num_ended_whole: int = 0

    @property
    def num_ticks(self) -> int:
        return len(self.sizes)

    @property
    def num_steps(self) -> int:
        return sum(size > 0 for size in self.sizes)

    @property
    def idle_share(self) -> Fraction:
        """Idle stage-steps over all: a plan keeps each stage busy for one tick."""
        return Fraction(self.num_ticks - self.num_steps, self.num_ticks)

    def bubbles(self, fewer_than: int) -> tuple[int, int]:
        """Bubbles while fewer sequences than that were unfinished, and other bubbles."""
        left = [n for size, n in zip(self.sizes, self.unfinished, strict=True) if not size]
        draining = sum(n < fewer_than for n in left)
        return draining, len(left) - draining


def run(requests: list[Request], pp: int) -> Log:
    """Run all requests to their end on a model of no size, with pp stages."""
    config = EngineConfig(
        "", Layout(pp=pp), block_size=4, max_model_len=64, max_num_batched_tokens=64
    )
    replicas = Replicas(config, 1000, VOCAB, [EOS])
    model, log = PagedModel(config.block_size), Log()
    for request in requests:
        replicas.add(request)
    # The plan that each stage works on in this tick, the first stage first.
    stages: deque[StepPlan | None] = deque([None] * pp, maxlen=pp)
    while replicas.has_unfinished:
        plan = (replicas.schedule() or [None])[0] if replicas.num_in_flight < pp else None
        stages.appendleft(plan)
        scheduler = replicas.schedulers[0]
        log.sizes.append(len(plan.query_lens) if plan else 0)
        log.unfinished.append(scheduler.num_waiting + scheduler.num_running)
        if (computed := stages[-1]) is not None:
            updates = replicas.update([model.execute(computed)])
            ended = sum(update.finish_reason is not None for update in updates)
            log.num_ended_whole += ended == len(computed.query_lens)
    return log


def request(number: int, prompt_len: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(id=str(number), prompt_token_ids=[1 + number % 9] * prompt_len, params=params)


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 13])
def test_requests_of_one_length_cost_no_more_than_filling_the_pipeline(pp: int, count: int):
    log = run([request(i, 1, 40) for i in range(pp + count)], pp)
    assert log.num_steps == pp * 40
    assert log.idle_share == Fraction(pp - 1, log.num_steps + pp - 1)
    assert max(log.sizes) - min(filter(None, log.sizes)) <= 1


@given(
    pp=st.sampled_from([2, 4, 4, 7]),
    lengths=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 38)), min_size=4, max_size=60),
)
def test_a_bubble_comes_only_of_a_plan_that_ended_whole_or_of_draining(
    pp: int, lengths: list[tuple[int, int]]
):
    log = run([request(i, *pair) for i, pair in enumerate(lengths)], pp)
    _, others = log.bubbles(fewer_than=pp)
    assert others <= log.num_ended_whole


@pytest.mark.parametrize("count", [5, 6, 9, 17, 40, 64])
def test_random_requests_cost_no_more_than_filling_the_pipeline_and_draining_it(count: int):
    pp, rng = 4, random.Random(count)
    log = run([request(i, rng.randint(1, 30), rng.randint(10, 34)) for i in range(count)], pp)
    draining, _ = log.bubbles(fewer_than=pp)
    filling = Fraction(pp - 1, log.num_steps + pp - 1)
    assert log.idle_share <= filling + Fraction(draining, log.num_ticks)
