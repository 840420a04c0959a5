"""Deltas wait in the inbox until the handler takes them; each inbox ends exactly once."""

from __future__ import annotations

import asyncio

import pytest

from moespan.engine.request import OutputDelta, Timing, TokenLogprobs
from moespan.errors import EngineDeadError
from moespan.serve.inbox import Inbox
from tests.serve.fake_ranks import request, token
from tests.serve.virtual_time import run, settle


def test_waiting_deltas_are_joined_for_each_continuation():
    async def work() -> None:
        closed: list[tuple[Inbox, str]] = []
        inbox = Inbox(request("a", n=2), lambda *end: closed.append(end))
        first = TokenLogprobs(7, -0.5, [(7, -0.5)])
        second = TokenLogprobs(8, -1.5, [(9, -0.25)])
        inbox.put(OutputDelta(id="a", index=1, text="y", token_ids=[5]))
        inbox.put(
            OutputDelta(id="a", text="mi", token_ids=[7], logprobs=[first], num_cached_tokens=2)
        )
        inbox.put(
            OutputDelta(
                id="a",
                text="x",
                token_ids=[8],
                logprobs=[second],
                finish_reason="stop",
                stop_reason=8,
                timing=Timing(0.5, 0.25),
            )
        )
        told = {delta.index: delta for delta in await inbox.next()}
        assert told[1] == OutputDelta(id="a", index=1, text="y", token_ids=[5])
        assert told[0] == OutputDelta(
            id="a",
            text="mix",
            token_ids=[7, 8],
            logprobs=[first, second],
            finish_reason="stop",
            stop_reason=8,
            num_cached_tokens=2,
            timing=Timing(0.5, 0.25),
        )
        assert not inbox.is_finished
        inbox.put(token("a", index=1, end="length"))
        assert not inbox.is_finished, "its last delta has not been told"
        assert len(await inbox.next()) == 1
        assert inbox.is_finished and await inbox.next() == []
        inbox.close()
        assert not closed, "the engine had finished it"

    run(work())


def test_a_cancelled_wait_loses_no_delta():
    async def work() -> None:
        inbox = Inbox(request("a"), lambda *_: None)
        waiting = asyncio.create_task(inbox.next())
        await settle()
        inbox.put(token("a", 1))
        waiting.cancel()  # in the same turn of the loop in which the delta came
        with pytest.raises(asyncio.CancelledError):
            await waiting
        inbox.put(token("a", 2, end="stop"))
        (delta,) = await inbox.next()
        assert delta.token_ids == [1, 2]

    run(work())


def test_the_death_of_the_engine_comes_after_the_deltas_before_it():
    async def work() -> None:
        inbox = Inbox(request("a"), lambda *_: None)
        inbox.put(token("a", 1))
        inbox.fail(EngineDeadError("rank 1 was killed"))
        inbox.put(token("a", 2))  # too late
        assert [delta.token_ids for delta in await inbox.next()] == [[1]]
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="rank 1 was killed"):
                await inbox.next()
        assert not inbox.is_finished

    run(work())


def test_a_death_after_the_finish_is_not_told():
    async def work() -> None:
        inbox = Inbox(request("a"), lambda *_: None)
        inbox.put(token("a", end="stop"))
        inbox.fail(EngineDeadError("rank 1 was killed"))
        assert len(await inbox.next()) == 1
        assert inbox.is_finished and await inbox.next() == []

    run(work())


def test_closing_aborts_once_and_wakes_the_waiting_handler():
    async def work() -> None:
        closed: list[tuple[Inbox, str]] = []
        inbox = Inbox(request("a"), lambda *end: closed.append(end))
        waiting = asyncio.create_task(inbox.next())
        await settle()
        inbox.close("timeout")
        inbox.close()
        assert closed == [(inbox, "timeout")]
        assert await waiting == [] and inbox.is_finished
        inbox.put(token("a"))
        assert await inbox.next() == []

    run(work())
