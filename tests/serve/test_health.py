"""Probes get the truth: 200 only while every rank shows signs of life."""

from __future__ import annotations

import asyncio

import httpx
from starlette.applications import Starlette
from starlette.requests import Request

from moespan.serve.health import health_routes
from moespan.serve.life import Life
from moespan.serve.options import LifeOptions
from moespan.version import __version__
from tests.serve.fake_ranks import FakeStart, metrics, request
from tests.serve.virtual_time import run, settle

KEY = {"authorization": "Bearer secret"}


def client(life: Life) -> httpx.AsyncClient:
    def may_see(request: Request) -> bool:
        return request.headers.get("authorization") == KEY["authorization"]

    app = Starlette(routes=health_routes(life, may_see))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def test_each_state_has_its_answers():
    async def work() -> None:
        start = FakeStart(start_s=10)
        life = Life(start, LifeOptions(max_queued_requests=1), metrics())
        async with client(life) as http:

            async def answers() -> list[tuple[int, str]]:
                found = [await http.get(path) for path in ("/live", "/health", "/ready", "/ping")]
                return [(one.status_code, one.text) for one in found]

            def all_but_live(word: str) -> list[tuple[int, str]]:
                return [(200, ""), *[(503, word)] * 3]

            well = [(200, "")] * 4
            running = asyncio.create_task(life.run())
            await settle()
            assert await answers() == all_but_live("starting")
            await asyncio.sleep(11)
            assert await answers() == well
            inbox = life.submit(request("a"))
            assert await answers() == [(200, ""), (200, ""), (503, "overloaded"), (200, "")]
            start.ranks.is_stopped = True
            await asyncio.sleep(1)
            assert await answers() == all_but_live("stalled")
            start.ranks.die()
            await settle()
            assert await answers() == all_but_live("recovering")
            await asyncio.sleep(12)
            assert await answers() == well
            inbox.close()
            life.submit(request("b"))
            life.drain()
            assert await answers() == all_but_live("draining")
            life.force()
            await running
            assert await answers() == all_but_live("ended")

    run(work())


def test_details_are_for_those_with_the_key():
    async def work() -> None:
        start = FakeStart()
        life = Life(start, LifeOptions(), metrics())
        running = asyncio.create_task(life.run())
        async with client(life) as http:
            await settle()
            start.ranks.die("rank 3 was killed by SIGKILL\nTraceback\x1b[31m")
            await asyncio.sleep(2)
            life.submit(request("a"))
            assert (await http.get("/health?verbose")).text == ""
            answer = await http.get("/health?verbose", headers=KEY)
            assert answer.status_code == 200
            assert answer.json() == {
                "state": "ready",
                "reason": "",
                "trouble": "",
                "restarts": 1,
                "live_requests": 1,
                "queued_requests": 1,
                "queued_tokens": 3,
                "last_error": "rank 3 was killed by SIGKILL\nTraceback\\x1b[31m",
                "ranks": [
                    {
                        "rank": 0,
                        "place": "idle after step 1",
                        "beat_age_s": 0.0,
                        "is_stopped": False,
                    }
                ],
            }
            assert (await http.get("/load")).json() == {"server_load": 1}
            assert (await http.get("/version")).json() == {"version": __version__}
            assert (await http.post("/ping")).status_code == 200
            start.ranks.is_stopped = True
            await asyncio.sleep(1)
            assert (await http.get("/health?verbose", headers=KEY)).status_code == 503
        life.force()
        await running

    run(work())
