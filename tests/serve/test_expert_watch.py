"""Counts of experts are asked for once, however many look, and go to the metrics as well."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from moespan.engine.info import StepFigures
from moespan.serve.expert_watch import FRESH_S, METRICS_S, ExpertWatch
from moespan.serve.life import Life, Unavailable
from moespan.serve.metrics import Metrics
from moespan.serve.options import LifeOptions
from tests.serve.fake_ranks import FakeStart, metrics, pulse
from tests.serve.test_metrics import samples
from tests.serve.virtual_time import run, settle

Script = Callable[[ExpertWatch, Life, FakeStart, Metrics], Awaitable[None]]


def watched(script: Script) -> None:
    async def work() -> None:
        start, found = FakeStart(), metrics(expert_stats=True)
        life = Life(start, LifeOptions(), found)
        watch = ExpertWatch(life, found)
        with pytest.raises(Unavailable, match="starting"):
            await watch.counts()
        tasks = [asyncio.create_task(life.run()), asyncio.create_task(watch.run())]
        await settle()
        await script(watch, life, start, found)
        life.force()
        await asyncio.wait(tasks[:1])
        tasks[1].cancel()
        await asyncio.wait(tasks)

    run(work())


def tokens(found: Metrics) -> dict[str, float]:
    name = "moespan_expert_tokens_total"
    return {key.removeprefix(name): n for key, n in samples(found).items() if key.startswith(name)}


def test_many_who_look_ask_the_engine_once_a_second():
    async def script(watch: ExpertWatch, life: Life, start: FakeStart, found: Metrics) -> None:
        start.ranks.expert_counts = {1: [4, 0, 2]}
        assert await asyncio.gather(*(watch.counts() for _ in range(50))) == [{1: [4, 0, 2]}] * 50
        start.ranks.expert_counts = {1: [5, 1, 2]}
        assert await watch.counts() == {1: [4, 0, 2]}
        assert start.ranks.num_asked == 1
        await asyncio.sleep(FRESH_S)
        assert await watch.counts() == {1: [5, 1, 2]}
        assert start.ranks.num_asked == 2

    watched(script)


def test_metrics_follow_the_counts_over_restarts_and_a_scrape_asks_nothing():
    async def script(watch: ExpertWatch, life: Life, start: FakeStart, found: Metrics) -> None:
        assert tokens(found) == {}
        start.ranks.expert_counts = {1: [4, 0], 12: [1, 3]}
        start.ranks.tell(pulse=pulse(steps=[StepFigures("decode", 4, 0.1)]))
        await asyncio.sleep(METRICS_S + 1)
        first = start.ranks
        assert first.num_asked == 1
        expected = {
            "{expert=0,layer=1}": 4,
            "{expert=1,layer=1}": 0,
            "{expert=0,layer=12}": 1,
            "{expert=1,layer=12}": 3,
        }
        assert tokens(found) == expected
        await asyncio.sleep(5 * METRICS_S)  # no step has run since
        assert first.num_asked == 1
        first.die()
        await asyncio.sleep(10)
        start.ranks.expert_counts = {1: [3, 0], 12: [0, 0]}
        await watch.counts()
        assert tokens(found) == {**expected, "{expert=0,layer=1}": 4 + 3}

    watched(script)


def test_an_engine_that_dies_before_it_answers_is_away():
    async def script(watch: ExpertWatch, life: Life, start: FakeStart, found: Metrics) -> None:
        asked = asyncio.create_task(watch.counts())
        await asyncio.sleep(0)
        start.ranks.die()
        with pytest.raises(Unavailable, match="started again"):
            await asked
        with pytest.raises(Unavailable, match="started again"):
            await watch.counts()

    watched(script)
