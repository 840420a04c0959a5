"""Lives of a job without ranks: the cores of the program beside them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from moespan.config import EngineConfig, Nodes
from moespan.launch import lives
from moespan.launch.async_ranks import AsyncRanks
from moespan.machine.binding import Binding, RankBinding


class FakeRanks:
    """Ranks bound to the first four of eight cores, or to fewer cores than they had."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.has_ended_well = True


@pytest.mark.parametrize(
    ("bound", "beside"), [(4, {4, 5, 6, 7}), (7, set(range(8))), (0, set(range(8)))]
)
def test_the_program_keeps_to_cores_that_no_rank_has_and_ranks_start_with_all(
    monkeypatch: pytest.MonkeyPatch, bound: int, beside: set[int]
):
    cpus = [set(range(8))]  # those of this process over time; the machine of the test has fewer
    at_start: list[set[int]] = []

    async def start(*_: Any, **__: Any) -> FakeRanks:
        at_start.append(cpus[-1])
        rank = RankBinding(local_rank=0, threads=1, cpus=list(range(bound)))
        return FakeRanks(Binding(ranks=[rank]))

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus[-1])
    monkeypatch.setattr(lives, "keep_to", lambda given: cpus.append(set(given)))
    monkeypatch.setattr(AsyncRanks, "start", start)

    async def play() -> None:
        job = lives.Lives(EngineConfig("fake"), Nodes())
        for _ in range(2):
            await job.start(lambda deltas, pulse: None)
            assert cpus[-1] == beside

    asyncio.run(play())
    assert at_start == [set(range(8))] * 2


def test_a_kernel_that_refuses_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(cpus: set[int]) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(lives, "keep_to", refuse)
    lives.Lives(EngineConfig("fake"), Nodes())._keep_to({1, 2})
    assert "keeps to no cores of its own: Operation not permitted" in caplog.text
