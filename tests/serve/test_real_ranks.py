"""`Life` with real ranks: a death, a restart, a forced end with a stopped rank, nothing left."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

import pytest

from moespan.config import EngineConfig, Layout
from moespan.errors import EngineDeadError
from moespan.launch.async_ranks import AsyncRanks
from moespan.serve.life import Life, State
from moespan.serve.live_requests import OnNews
from moespan.serve.options import LifeOptions
from tests.launch.test_ranks import DEATH_S, FAKE_RANK, alive, descendants, request
from tests.serve.fake_ranks import metrics

FORCED_S = 20.0  # the promise is 15 s, on a machine that is not busy


async def until(life: Life, state: State, limit_s: float) -> None:
    async def wait() -> None:
        while life.state is not state:
            await asyncio.sleep(0.05)

    await asyncio.wait_for(wait(), limit_s)


async def answers(life: Life, request_id: str) -> list[int]:
    """The tokens of a request that the fake engine echoes."""
    inbox = life.submit(request(request_id))
    (delta,) = await asyncio.wait_for(inbox.next(), 30)
    assert inbox.is_finished
    return delta.token_ids


def test_the_engine_lives_again_after_a_death_and_ends_with_a_stopped_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def start(on_news: OnNews) -> AsyncRanks:
        config = EngineConfig("fake", Layout(tp=2))
        return await AsyncRanks.start(
            config, on_news=on_news, start_timeout_s=60, program=[FAKE_RANK]
        )

    async def work() -> None:
        before = descendants(os.getpid())  # of other tests, and this process
        life = Life(start, LifeOptions(max_restarts=1), metrics())
        running = asyncio.create_task(life.run())
        await until(life, State.READY, 60)
        assert await answers(life, "one") == [3, 1, 4]
        first = descendants(os.getpid()) - before

        dying = life.submit(request("sigkill@1"))
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match="rank 1 was killed by SIGKILL"):
            await dying.next()
        assert time.monotonic() - began < DEATH_S
        await until(life, State.READY, 60)
        assert not alive(first), "processes of the first life are left"
        assert await answers(life, "one") == [3, 1, 4]
        assert [place.rank for place in life.places()] == [0, 1] and life.reason == ""

        second = descendants(os.getpid()) - before
        stuck = life.submit(request("sigstop@1"))
        await asyncio.sleep(0.5)
        life.drain()
        began = time.monotonic()
        life.force()
        with pytest.raises(EngineDeadError, match="the server ends"):
            await stuck.next()
        await running
        assert time.monotonic() - began < FORCED_S
        assert not alive(second), "processes of the second life are left"

    asyncio.run(work())
    assert list(tmp_path.iterdir()) == [], "a folder or socket is left"
