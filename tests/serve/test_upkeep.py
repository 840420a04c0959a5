"""What a running server tells systemd and the log, and how it obeys signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from moespan.serve.life import Life, State
from moespan.serve.options import LifeOptions
from moespan.serve.systemd import Notifier
from moespan.serve.upkeep import Upkeep, obey_signals
from tests.serve.fake_ranks import FakeStart, metrics, pulse, request, token
from tests.serve.virtual_time import run, settle


class Systemd:
    """The other end of systemd's socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(address)

    def heard(self) -> list[str]:
        """All messages since the last call."""
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_hears_of_start_health_and_end(tmp_path: Path, is_abstract: bool):
    name = f"moespan-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    systemd = Systemd(f"\0{name}" if is_abstract else name)
    environ = {"NOTIFY_SOCKET": f"@{name}" if is_abstract else name, "WATCHDOG_USEC": "30000000"}

    async def work() -> None:
        start, found = FakeStart(start_s=60), metrics()
        life = Life(start, LifeOptions(), found)
        upkeep = asyncio.create_task(Upkeep(life, found, Notifier(environ)).run())
        running = asyncio.create_task(life.run())
        await asyncio.sleep(59)
        heard = systemd.heard()
        assert heard[0] == "STATUS=starting"
        assert set(heard[1:]) == {"WATCHDOG=1"} and len(heard) == 1 + 5
        await asyncio.sleep(2)
        assert set(systemd.heard()) == {"READY=1", "STATUS=ready", "WATCHDOG=1"}
        await asyncio.sleep(60)
        assert set(systemd.heard()) == {"WATCHDOG=1"}
        start.ranks.is_stopped = True
        await asyncio.sleep(60)
        (stalled,) = systemd.heard()
        assert stalled.startswith("STATUS=stalled: rank 0 is stopped")
        start.ranks.is_stopped = False
        life.submit(request("a"))
        await asyncio.sleep(1)
        life.drain()
        await asyncio.sleep(1)
        assert "STOPPING=1" in systemd.heard()
        life.force()
        await running
        upkeep.cancel()
        await asyncio.wait((upkeep,))

    run(work())
    systemd.close()


def test_nothing_is_sent_where_no_systemd_listens(tmp_path: Path):
    for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        Notifier(environ).ready()
    assert Notifier({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}).watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "5000000"}).watchdog_s == 5.0


def test_a_line_of_load_comes_every_ten_seconds_while_there_is_any(
    caplog: pytest.LogCaptureFixture,
):
    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [line for line in found if line.startswith("load:")]

    async def work() -> None:
        start, found = FakeStart(), metrics()
        life = Life(start, LifeOptions(), found)
        running = asyncio.create_task(life.run())
        upkeep = asyncio.create_task(Upkeep(life, found, Notifier({})).run())
        await asyncio.sleep(35)
        assert lines() == []
        life.submit(request("a", num_tokens=40))
        for _ in range(19):
            start.ranks.tell(token("a"), pulse=pulse(running=1, waiting=2))
        start.ranks.tell(token("a", end="stop"))
        await asyncio.sleep(10)
        (line,) = lines()
        assert line.startswith("load: 1 running, 2 waiting, KV cache 12.5%, tokens/s: 4.0 of pro")
        assert line.endswith("2.0 generated")
        await asyncio.sleep(30)
        assert lines() == []
        upkeep.cancel()
        life.force()
        await asyncio.wait((running, upkeep))

    caplog.set_level("INFO", logger="moespan")
    run(work())


def test_a_long_start_is_told_every_ten_seconds(caplog: pytest.LogCaptureFixture):
    async def work() -> None:
        start, found = FakeStart(start_s=25), metrics()
        life = Life(start, LifeOptions(), found)
        running = asyncio.create_task(life.run())
        upkeep = asyncio.create_task(Upkeep(life, found, Notifier({})).run())
        await asyncio.sleep(100)
        assert [record.getMessage() for record in caplog.records] == [
            "the engine is starting, for 10 s",
            "the engine is starting, for 20 s",
        ]
        upkeep.cancel()
        life.force()
        await asyncio.wait((running, upkeep))

    caplog.set_level("INFO", logger="moespan")
    run(work())


def test_delays_of_the_event_loop_are_measured():
    async def work() -> None:
        found = metrics()
        life = Life(FakeStart(), LifeOptions(), found)
        upkeep = asyncio.create_task(Upkeep(life, found, Notifier({})).run())
        await settle()
        loop = asyncio.get_running_loop()
        loop._virtual.now += 0.3  # type: ignore[attr-defined]  # a callback that takes so long
        await asyncio.sleep(0.05)
        upkeep.cancel()
        await asyncio.wait((upkeep,))
        assert 'event_loop_lag_seconds_bucket{le="0.1",model_name="fake model"} 0.0' in (
            found.render().decode()
        )

    run(work())


async def arrives() -> None:
    """Let a signal reach the loop, which reads of it from a socket."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "signals, states",
    [
        ([signal.SIGTERM], [State.DRAINING]),
        ([signal.SIGTERM, signal.SIGTERM], [State.DRAINING, State.ENDED]),
        ([signal.SIGINT], [State.ENDED]),
    ],
    ids=["drain", "second", "interrupt"],
)
def test_signals_drain_and_then_force(signals: list[signal.Signals], states: list[State]):
    async def work() -> None:
        start = FakeStart()
        life = Life(start, LifeOptions(), metrics())
        obey_signals(life)
        running = asyncio.create_task(life.run())
        await settle()
        life.submit(request("a"))
        for one, state in zip(signals, states, strict=True):
            os.kill(os.getpid(), one)
            await arrives()
            assert life.state is state
        life.force()
        await running
        for one in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(one)

    run(work())
