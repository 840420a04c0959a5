"""The engine behind the server over its lives: admission, deaths, restarts, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moespan import log
from moespan.engine.request import OutputDelta, Request
from moespan.errors import CheckpointError, ConfigError, EngineDeadError, RequestError
from moespan.parallel.beats import BUSY, Place
from moespan.serve.inbox import Inbox
from moespan.serve.life import Life, State, Unavailable
from moespan.serve.metrics import Metrics
from moespan.serve.options import LifeOptions
from tests import tiers
from tests.serve.fake_ranks import FakeStart, metrics, pulse, request, token
from tests.serve.virtual_time import run, settle


def now() -> float:
    return asyncio.get_running_loop().time()


def scene(
    script: Callable[[Life, FakeStart, asyncio.Task[None]], Awaitable[None]],
    start: FakeStart | None = None,
    counted: Metrics | None = None,
    **options: Any,
) -> Life:
    """Play `script` against a life that runs, and end the life if the script has not."""
    start = start or FakeStart()

    async def work() -> Life:
        life = Life(start, LifeOptions(**options), counted or metrics())
        running = asyncio.create_task(life.run())
        await settle()
        try:
            await script(life, start, running)
        finally:
            life.force()
            await asyncio.wait((running,))
            if not running.cancelled():
                running.exception()  # seen
        assert life.state is State.ENDED
        assert life.num_live == life.num_queued == life.num_queued_tokens == 0
        assert all(ranks.is_closed for ranks in start.lives)
        return life

    return run(work())


async def until_state(life: Life, state: State) -> float:
    """Wait for a state; returns the seconds that it took."""
    began = now()
    while life.state is not state:
        await asyncio.sleep(0.01)
    return now() - began


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No messages about a thousand deaths."""
    level = log.logger.level
    log.logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.logger.setLevel(level)


async def fails(inbox: Inbox) -> str:
    with pytest.raises(EngineDeadError) as caught:
        while True:
            await inbox.next()
    return str(caught.value)


# Requests.


def test_a_request_travels_to_its_finish():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        assert life.reason == ""
        inbox = life.submit(request("a", n=2))
        assert life.num_live == life.num_queued == 1 and life.num_queued_tokens == 3
        start.ranks.tell(token("a", index=1), pulse=pulse(running=2))
        assert life.pulse == pulse(running=2)
        assert life.num_live == 1 and life.num_queued == life.num_queued_tokens == 0
        start.ranks.finish("a")
        assert life.num_live == 0
        assert {delta.index: len(delta.token_ids) for delta in await inbox.next()} == {0: 1, 1: 2}
        assert inbox.is_finished
        inbox.close()
        assert start.ranks.aborted == []

    scene(script)


def test_a_handler_that_goes_aborts_its_request():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        queued, begun = life.submit(request("a", n=3)), life.submit(request("b"))
        start.ranks.tell(token("b"))
        queued.close()
        begun.close()
        assert start.ranks.aborted == ["a", "b"]
        assert life.num_live == life.num_queued == life.num_queued_tokens == 0
        start.ranks.tell(token("a"), token("b"))  # of the step under way
        assert life.num_live == 0

    scene(script)


def test_requests_are_handed_over_all_or_none():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        life.submit(request("b"))
        with pytest.raises(RequestError, match="the id b is running"):
            life.submit_all([request("a"), request("b")])
        assert start.ranks.aborted == ["a"] and list(start.ranks.running) == ["b"]
        assert life.num_live == 1 and life.num_queued_tokens == 3
        assert [i.request.id for i in life.submit_all([request("c"), request("d")])] == ["c", "d"]

    scene(script)


def test_a_full_queue_refuses_with_429():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        life.submit_all([request("a"), request("b")])
        assert life.reason == "overloaded"
        with pytest.raises(Unavailable, match="2 queued requests, at most 2") as caught:
            life.submit(request("c"))
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.retry_after_s > 0
        start.ranks.tell(token("a"))  # it waits no more
        assert life.state is State.READY
        life.submit(request("c"))

    scene(script, max_queued_requests=2)


@pytest.mark.parametrize("given, most", [(None, 16 * 8 * 4), (30, 30)])
def test_queued_tokens_are_bounded_by_sixteen_caches_or_as_told(given: int | None, most: int):
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        life.submit(request("a", num_tokens=most - 5))
        with pytest.raises(Unavailable, match=f"{most - 5} queued prompt tokens, at most {most}"):
            life.submit(request("b", num_tokens=6))
        life.submit(request("b", num_tokens=5))

    scene(script, max_queued_tokens=given)


def test_an_empty_queue_takes_any_request():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        life.submit_all([request("a", num_tokens=60), request("b", num_tokens=60)])

    scene(script, max_queued_requests=1, max_queued_tokens=1)


# Starts and deaths.


def test_nothing_is_taken_while_the_engine_starts():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        assert life.state is State.STARTING and life.info is None
        with pytest.raises(Unavailable, match="is starting") as caught:
            life.submit(request("a"))
        assert (caught.value.status, caught.value.code) == (503, "starting")
        assert await until_state(life, State.READY) == pytest.approx(30, abs=0.1)
        assert life.info is not None

    scene(script, FakeStart(start_s=30))


def test_an_engine_that_cannot_start_ends_the_life_with_its_error():
    start = FakeStart()
    start.failures = [CheckpointError("a.safetensors is truncated")]

    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        with pytest.raises(CheckpointError, match="truncated"):
            await running
        assert life.state is State.ENDED and life.num_restarts == 0

    scene(script, start)


def test_a_death_fails_what_is_live_and_the_engine_starts_again():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        begun, queued, done = (life.submit(request(name)) for name in "abc")
        start.ranks.tell(token("a", 1), pulse=pulse(running=1))
        start.ranks.finish("c")
        start.ranks.die()
        with pytest.raises(Unavailable, match="has died") as caught:  # known before it is told
            life.submit(request("d"))
        assert (caught.value.status, caught.value.code) == (503, "engine_dead")
        old = start.ranks
        await settle()
        assert life.state is State.RECOVERING and life.pulse is None
        assert [delta.token_ids for delta in await begun.next()] == [[1]]
        assert "rank 1 was killed by SIGKILL" in await fails(begun)
        assert "rank 1 was killed by SIGKILL" in await fails(queued)
        assert len(await done.next()) == 1 and done.is_finished
        assert life.num_live == 0 and "SIGKILL" in str(life.last_error)
        with pytest.raises(Unavailable) as caught:
            life.submit(request("d"))
        assert caught.value.retry_after_s == 1 + 5
        assert await until_state(life, State.READY) == pytest.approx(1 + 5, abs=0.1)
        assert life.num_restarts == 1
        old.tell(token("a"), pulse=pulse())
        assert life.pulse is None
        begun.close()
        life.submit(request("a"))
        assert list(start.ranks.running) == ["a"] and start.ranks.aborted == []

    start = FakeStart(start_s=5)

    async def started(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        await until_state(life, State.READY)
        await script(life, start, running)

    scene(started, start)


def test_the_cause_of_a_death_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture):
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        start.ranks.die("rank 1 failed\nTraceback of rank 1")
        await until_state(life, State.RECOVERING)
        start.failures = [EngineDeadError("no device")]
        await asyncio.sleep(10)
        start.ranks.die("rank 2 failed")
        await asyncio.wait((running,))

    scene(script, max_restarts=2)
    errors = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
    assert errors == [
        "the engine has died: rank 1 failed\nTraceback of rank 1",
        "the engine cannot start: no device",
        "the engine has died: rank 2 failed",
        "the engine does not start again after 2 restarts within 3600 s "
        "(--max-restarts, --restart-window)",
    ]


def test_a_restart_is_timed_from_the_death(caplog: pytest.LogCaptureFixture):
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        await asyncio.sleep(100)
        start.ranks.die()
        await settle()
        start.start_s = 6
        await asyncio.sleep(0.5)
        assert life.away_s == pytest.approx(0.5, abs=0.2)
        await until_state(life, State.READY)

    caplog.set_level("INFO", "moespan")
    scene(script)
    assert "the engine is ready again, after 7 s" in caplog.text  # a second of waiting, 6 to start


def test_restarts_wait_longer_each_time_and_then_end_the_program():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        for wait_s in (1, 2, 4, 8, 16, 32, 60, 60):
            start.ranks.die()
            await settle()
            assert await until_state(life, State.READY) == pytest.approx(wait_s, abs=0.1)
        start.ranks.die("rank 0 was killed at last")
        with pytest.raises(EngineDeadError, match="at last"):
            await running

    scene(script, max_restarts=8)


def test_restarts_are_forgiven_after_the_window():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        for _ in range(5):
            start.ranks.die()
            await settle()
            assert await until_state(life, State.READY) == pytest.approx(1, abs=0.1)
            await asyncio.sleep(100)

    assert scene(script, max_restarts=1, restart_window_s=100).num_restarts == 5


def test_a_restart_that_fails_counts_as_one():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        start.failures = [EngineDeadError("no device"), EngineDeadError("no device yet")]
        start.ranks.die()
        await settle()
        assert await until_state(life, State.READY) == pytest.approx(1 + 2 + 4, abs=0.1)
        start.failures = [EngineDeadError("no device any more")]
        start.ranks.die()
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await running
        assert life.num_restarts == 3

    scene(script)


def test_no_restart_where_none_is_allowed():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        inbox = life.submit(request("a"))
        start.ranks.die()
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await running
        assert "SIGKILL" in await fails(inbox)

    scene(script, max_restarts=0)


def test_requests_without_a_token_survive_a_restart_if_asked():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        begun, queued, gone = (life.submit(request(name)) for name in "abc")
        start.ranks.tell(token("a"))
        start.ranks.die()
        await settle()
        assert "SIGKILL" in await fails(begun)
        assert life.num_live == life.num_queued == 2
        gone.close()
        await until_state(life, State.READY)
        assert list(start.ranks.running) == ["b"] and start.ranks.aborted == []
        start.ranks.finish("b")
        assert len(await queued.next()) == 1 and queued.is_finished

    scene(script, retry_unstarted=True)


def test_requests_that_wait_for_a_restart_fail_when_there_is_none():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        queued = life.submit(request("a"))
        start.failures = [EngineDeadError("no device")]
        start.ranks.die()
        with pytest.raises(EngineDeadError, match="no device"):
            await running
        assert await fails(queued)

    scene(script, retry_unstarted=True, max_restarts=1)


# Signs of life.


def test_a_stopped_rank_is_seen_at_once_and_forgotten_when_it_goes_on():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        start.ranks.is_stopped = True
        await asyncio.sleep(1)
        assert (life.state, life.reason) == (State.READY, "stalled")
        assert "rank 0 is stopped" in life.trouble
        start.ranks.is_stopped = False
        await asyncio.sleep(1)
        assert life.reason == life.trouble == ""

    scene(script)


def test_an_idle_engine_that_says_nothing_is_stalled_after_10_s_and_ended_after_20():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        await asyncio.sleep(3600)
        assert life.reason == ""
        start.ranks.is_silent = True
        await asyncio.sleep(9)
        assert life.reason == ""
        await asyncio.sleep(2)
        assert life.reason == "stalled" and "rank 0 has not run" in life.trouble
        await asyncio.sleep(9.2)
        assert life.state is State.RECOVERING and life.reason == "recovering"
        assert life.trouble == "" and start.ranks.is_closed
        assert "the leader has said nothing" in str(life.last_error)

    scene(script)


def test_a_long_step_is_not_silence_until_the_limit_of_steps_is_over():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        inbox = life.submit(request("a"))
        ranks = start.ranks
        ranks.is_silent = True
        ranks.places = lambda: [Place(rank=0, alive=int(now()), state=BUSY)]  # type: ignore[method-assign]
        await asyncio.sleep(129)
        assert life.reason == ""
        await asyncio.sleep(2)
        assert life.reason == "stalled"
        await asyncio.sleep(10)
        assert "the leader has said nothing" in await fails(inbox)

    scene(script)


# The end.


def test_a_drain_lets_streams_finish_and_takes_nothing_new():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        inbox = life.submit(request("a"))
        life.drain()
        assert life.state is State.DRAINING and life.reason == "draining"
        with pytest.raises(Unavailable, match="takes no more") as caught:
            life.submit(request("b"))
        assert (caught.value.status, caught.value.code) == (503, "draining")
        await asyncio.sleep(44)
        assert not running.done()
        start.ranks.finish("a")
        await running
        assert len(await inbox.next()) == 1 and inbox.is_finished

    scene(script)


def test_a_drain_ends_at_its_timeout_and_tells_the_rest():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        inbox = life.submit(request("a"))
        life.drain()
        began = now()
        await running
        assert now() - began == pytest.approx(10, abs=0.1)
        assert "the server ends" in await fails(inbox)

    scene(script, drain_timeout_s=10)


def test_a_forced_end_does_not_wait():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        inbox = life.submit(request("a"))
        life.drain()
        await asyncio.sleep(1)
        began = now()
        life.force()
        await running
        assert now() - began < 0.1
        assert "the server ends" in await fails(inbox)

    scene(script)


@pytest.mark.parametrize("state", [State.STARTING, State.RECOVERING])
def test_a_drain_without_requests_ends_at_once_in_any_state(state: State):
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        if state is State.RECOVERING:
            await until_state(life, State.READY)
            start.ranks.die()
            await settle()
        assert life.state is state
        began = now()
        life.drain()
        await running
        assert now() - began < 0.1

    scene(script, FakeStart(start_s=30))


def test_a_death_during_a_drain_starts_nothing_new():
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        inbox = life.submit(request("a"))
        life.drain()
        start.ranks.die()
        await running
        assert "SIGKILL" in await fails(inbox)
        assert len(start.lives) == 1

    scene(script)


@pytest.mark.parametrize(
    "name, value", [("max_queued_requests", 0), ("max_restarts", -1), ("drain_timeout_s", -0.5)]
)
def test_options_out_of_bounds_are_refused(name: str, value: float):
    with pytest.raises(ConfigError, match=f"{name}={value} must be at least"):
        LifeOptions(**{name: value})  # type: ignore[arg-type]


# Anything in any order.

DEEDS = st.lists(
    st.tuples(
        st.sampled_from(
            ["submit", "submit", "token", "finish", "cancel", "die", "no start", "wait", "turn"]
        ),
        st.integers(0, 7),
    ),
    max_size=40,
)


class Handler:
    """Submits a request and reads its inbox as a handler of the server does.

    Attributes:
        deltas: what it was told.
        ends: how it ended: `finished`, `dead`, `refused` or `cancelled`, exactly one of them.
    """

    def __init__(self, life: Life, request: Request) -> None:
        self.request = request
        self.deltas: list[OutputDelta] = []
        self.ends: list[str] = []
        self.task = asyncio.create_task(self.serve(life))

    async def serve(self, life: Life) -> None:
        try:
            inbox = life.submit(self.request)
        except Unavailable:
            self.ends.append("refused")
            return
        try:
            while not inbox.is_finished:
                self.deltas += await inbox.next()
            self.ends.append("finished")
        except EngineDeadError:
            self.ends.append("dead")
        except asyncio.CancelledError:
            self.ends.append("cancelled")
        finally:
            inbox.close()

    def check(self) -> None:
        """Each continuation ended at most once, and all of them if the request is finished."""
        if self.task.cancelled():  # before its first turn
            assert not self.ends
            return
        assert len(self.ends) == 1
        ended = [delta.index for delta in self.deltas if delta.finish_reason is not None]
        assert len(ended) == len(set(ended))
        assert self.ends != ["finished"] or len(ended) == self.request.params.n


def act(life: Life, start: FakeStart, handlers: list[Handler], deed: str, number: int) -> None:
    """Do one of `DEEDS`, to what `number` picks, as far as there is any."""
    ranks = start.ranks
    if deed == "submit":
        handlers.append(Handler(life, request(f"r{len(handlers)}", 1 + number % 3)))
    elif deed == "no start":
        start.failures.append(EngineDeadError("no device"))
    elif deed == "die" and not ranks.is_dead:
        ranks.die()
    elif deed == "cancel" and handlers:
        handlers[number % len(handlers)].task.cancel()
    elif deed in ("token", "finish") and ranks.running and not ranks.is_dead:
        name = list(ranks.running)[number % len(ranks.running)]
        if deed == "finish":
            ranks.finish(name)
        else:
            ranks.tell(token(name, index=number % ranks.running[name].params.n))


COUNTED = metrics()  # of all examples, since making metrics takes most of an example's time


def ends_counted(found: Metrics) -> int:
    """How many continuations the metrics have seen end."""
    return sum(int(counter._value.get()) for counter in found._success.values())


@settings(max_examples=tiers.examples(1000))
@given(deeds=DEEDS, retries=st.booleans(), ends_by=st.sampled_from(["drain", "force"]))
def test_every_request_ends_once_whatever_happens(
    deeds: list[tuple[str, int]], retries: bool, ends_by: str
):
    async def script(life: Life, start: FakeStart, running: asyncio.Task[None]) -> None:
        await until_state(life, State.READY)
        handlers: list[Handler] = []
        for deed, number in deeds:
            act(life, start, handlers, deed, number)
            if deed == "wait":
                await asyncio.sleep(number)
            elif deed == "turn":
                await settle()
        getattr(life, ends_by)()
        await asyncio.wait([running, *(handler.task for handler in handlers)])
        for handler in handlers:
            handler.check()
            if handler.ends and handler.ends != ["refused"]:
                taken.append(handler.request.params.n)

    taken: list[int] = []  # continuations of each request that was taken
    before = ends_counted(COUNTED)
    options = {"retry_unstarted": retries, "max_restarts": 4, "restart_window_s": 30.0}
    with quiet():
        scene(script, FakeStart(start_s=0.5), COUNTED, **options)
    assert ends_counted(COUNTED) - before == sum(taken)
