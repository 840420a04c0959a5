"""Real ranks with a fake engine, for an event loop: started, heard, killed, and started again."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moespan.config import EngineConfig, Layout
from moespan.engine.info import PULSE_S, Pulse
from moespan.engine.questions import Stats, Trace, Traffic
from moespan.engine.request import OutputDelta
from moespan.errors import CheckpointError, EngineDeadError, RequestError
from moespan.launch.async_ranks import AsyncRanks
from tests.launch.test_ranks import (
    DEATH_S,
    FAKE_RANK,
    alive,
    descendants,
    echo,
    request,
    wait_until_gone,
)


class Heard:
    """What the leader has told."""

    def __init__(self) -> None:
        self.deltas: list[OutputDelta] = []
        self.pulses: list[Pulse] = []
        self._came = asyncio.Event()

    def __call__(self, deltas: list[OutputDelta], pulse: Pulse) -> None:
        self.deltas += deltas
        self.pulses.append(pulse)
        self._came.set()

    async def until(self, holds: Callable[[], bool], limit_s: float = 30.0) -> None:
        while not holds():
            self._came.clear()
            await asyncio.wait_for(self._came.wait(), limit_s)


async def start(heard: Heard, model: str = "fake", ranks: int = 2) -> AsyncRanks:
    return await AsyncRanks.start(
        EngineConfig(model, Layout(tp=ranks)),
        on_news=heard,
        start_timeout_s=60,
        program=[FAKE_RANK],
    )


def num_open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


async def die(client: AsyncRanks, request_id: str) -> str:
    """The cause after the deed of a rank; all processes have gone when it is known."""
    assert client._agent is not None
    processes = descendants(client._agent.pid)
    started = time.monotonic()
    if request_id == "agent":
        os.kill(client._agent.pid, signal.SIGKILL)
    else:
        client.add(request(request_id))
    await asyncio.sleep(0.2)  # the deed begins, so that the question comes too late
    asked = asyncio.ensure_future(client.ask(Traffic()))
    await client.wait_lost()
    cause = await client.wait_dead()
    assert time.monotonic() - started < DEATH_S
    assert alive(processes) == set()
    with pytest.raises(EngineDeadError):
        await asked
    with pytest.raises(EngineDeadError):
        client.add(request("late"))
    client.abort("late")
    return str(cause)


async def answer(heard: Heard, client: AsyncRanks) -> None:
    assert client.info.layout == Layout(tp=2)
    for number in range(20):
        client.add(request(str(number)))
    client.add(request("bad"))
    client.abort("unknown")
    answers = await asyncio.gather(*(client.ask(Stats()) for _ in range(9)))
    assert all(answer.kv_usage == 0.0 for answer in answers)
    with pytest.raises(RequestError, match="this trace is refused"):
        await client.ask(Trace([1]))
    await heard.until(lambda: len(heard.deltas) == 21)
    good = [delta for delta in heard.deltas if delta.id != "bad"]
    assert good == [echo(str(number)) for number in range(20)]
    assert not client._answers


async def be_told(heard: Heard, client: AsyncRanks) -> None:
    count = len(heard.pulses)
    await heard.until(lambda: len(heard.pulses) > count, 3 * PULSE_S + 5)  # idle
    assert (heard.pulses[-1].num_steps, heard.pulses[-1].steps) == (20, [])
    assert client.pulse is heard.pulses[-1]
    steps = [step for pulse in heard.pulses for step in pulse.steps]
    assert [step.num_tokens for step in steps] == [3] * 20  # each step once
    count, heard_at = len(heard.pulses), client.heard_at
    client.abort("unknown")
    await heard.until(lambda: len(heard.pulses) > count, PULSE_S + 5)
    assert heard.pulses[-1].stats.num_waiting == 0
    assert heard_at < client.heard_at <= asyncio.get_running_loop().time()
    assert [place.rank for place in client.places()] == [0, 1]


def test_ranks_answer_and_the_leader_tells_its_state_without_being_asked() -> None:
    async def main() -> None:
        heard = Heard()
        client = await start(heard)
        assert client._agent is not None
        folder, processes = client._agent.job.directory, descendants(client._agent.pid)
        await answer(heard, client)
        await be_told(heard, client)
        dead = asyncio.ensure_future(client.wait_dead())
        await client.close()
        await client.close()
        assert str(await dead) == "the engine is closed"
        assert alive(processes) == set()
        assert not folder.exists()
        with pytest.raises(EngineDeadError, match="closed"):
            client.add(request("late"))

    asyncio.run(main())


async def measure_loop(seconds: list[float]) -> None:
    """Measure how long the loop is held up."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.01)
        seconds.append(time.monotonic() - before)


def measure_machine(seconds: list[float], is_over: threading.Event) -> None:
    """Measure how long a thread that does nothing is held up, by other programs."""
    while not is_over.is_set():
        before = time.monotonic()
        time.sleep(0.01)
        seconds.append(time.monotonic() - before)


def test_ranks_are_started_again_after_each_death_and_the_loop_goes_on() -> None:
    open_before = num_open_files()
    turns: list[float] = []
    busy: list[float] = []
    is_over = threading.Event()
    threading.Thread(target=measure_machine, args=(busy, is_over), daemon=True).start()

    async def main() -> list[str]:
        measuring = asyncio.ensure_future(measure_loop(turns))
        causes = []
        for deed in ("sigkill@1", "raise@0", "agent"):
            heard = Heard()
            client = await start(heard)
            client.add(request("one"))
            while heard.deltas != [echo("one")]:
                await asyncio.sleep(0.01)
            causes.append(await die(client, deed))
            await client.close()
        measuring.cancel()
        return causes

    by_signal, by_error, by_agent = asyncio.run(main())
    is_over.set()
    assert by_signal == "rank 1 was killed by SIGKILL from outside"
    assert by_error.startswith("rank 0 failed with ValueError: the fake engine fails on purpose")
    assert by_agent == "the agent that watches the ranks was killed by SIGKILL from outside"
    assert num_open_files() <= open_before
    assert max(turns) < max(busy) + 0.5  # a wait for a process would take longer


def test_an_error_while_loading_arrives_as_the_same_class() -> None:
    async def main() -> None:
        with pytest.raises(CheckpointError, match="the fake checkpoint is broken"):
            await start(Heard(), "load-error@0", ranks=1)

    asyncio.run(main())


def test_a_start_that_is_cancelled_or_hangs_leaves_nothing(tmp_path: Path) -> None:
    program = ["-c", "import time; time.sleep(60)"]
    config = EngineConfig("fake", Layout(tp=2))
    before = descendants(os.getpid())

    async def main() -> None:
        def begin(limit_s: float | None = None) -> asyncio.Task[AsyncRanks]:
            starting = AsyncRanks.start(
                config, on_news=Heard(), program=program, start_timeout_s=limit_s
            )
            return asyncio.ensure_future(starting)

        hanging, cancelled, at_once = begin(1.0), begin(), begin()
        await asyncio.sleep(0)
        at_once.cancel()
        await asyncio.sleep(0.7)
        cancelled.cancel()
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match="start_timeout_s"):
            await hanging
        for one in (cancelled, at_once):
            with pytest.raises(asyncio.CancelledError):
                await one
        assert time.monotonic() - started < 15

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        asyncio.run(main())
    assert wait_until_gone(descendants(os.getpid()) - before, 1) == set()
    assert list(tmp_path.iterdir()) == []


def test_the_client_imports_no_torch() -> None:
    code = "import sys, moespan.launch.async_ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
