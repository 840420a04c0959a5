"""Limits of what comes in, and that the event loop never waits."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from moespan.serve import app, intake
from moespan.serve.pool import Pool
from moespan.serve.refusals import Refusal
from tests.serve.scene import Served, Wired, error_of, events, play, play_wired, post_bytes


def test_a_full_queue_is_a_429_with_a_time_to_try_again():
    async def script(served: Served) -> None:
        waiting = [asyncio.create_task(served.complete(max_tokens=1)) for _ in range(2)]
        while served.life.num_queued < 2:
            await asyncio.sleep(0.001)
        for route in (served.complete, served.chat):
            response = await route()
            assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
            error = error_of(response)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        served.ranks.holds = False
        for task in waiting:
            assert (await task).status_code == 200

    play(script, holds=True, max_queued_requests=2)


def test_a_draining_server_takes_nothing_and_finishes_what_it_has():
    async def script(served: Served) -> None:
        running = asyncio.create_task(served.complete(stream=True))
        while not served.life.num_live:
            await asyncio.sleep(0.001)
        served.life.drain()
        response = await served.complete()
        assert response.status_code == 503 and response.headers["retry-after"]
        assert error_of(response)["code"] == "draining"
        served.ranks.holds = False
        assert events(await running)[-1]["choices"][0]["finish_reason"] == "stop"

    play(script, holds=True)


def test_counts_have_flags():
    async def script(served: Served) -> None:
        for body, name in (
            ({"prompt": ["a"] * 4}, "prompt holds 4 prompts; at most 3"),
            ({"prompt": ["a"] * 2, "n": 3}, "are 6 continuations; at most 5"),
            ({"n": 5}, "n=5 must be within 1..4"),
            ({"logprobs": 3}, "logprobs=3 must be within 0..2"),
        ):
            response = await served.complete(**body)
            assert response.status_code == 400 and name in error_of(response)["message"]

    play(script, max_prompts=3, max_choices=5, max_n=4, max_logprobs=2)


def test_a_pool_refuses_what_would_wait_too_long():
    async def script() -> None:
        pool, gate = Pool(2), threading.Event()
        waiting = [asyncio.create_task(pool.run(gate.wait, 10)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as caught:
            await pool.run(gate.wait, 10)
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        gate.set()
        assert await asyncio.gather(*waiting) == [True, True]
        assert await pool.run(int, "3") == 3
        pool.close()

    asyncio.run(script())


def test_a_request_that_is_cancelled_leaves_the_pool_when_its_work_ends():
    async def script() -> None:
        pool, gate = Pool(1), threading.Event()
        task = asyncio.create_task(pool.run(gate.wait, 10))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait((task,))
        with pytest.raises(Refusal):
            await pool.run(int)
        gate.set()
        while True:
            await asyncio.sleep(0.001)
            try:
                assert await pool.run(int) == 0
            except Refusal:
                continue
            break
        pool.close()

    asyncio.run(script())


def test_all_bodies_together_have_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intake, "_MOST_HELD", 2)

    async def script(served: Served, server: Wired) -> None:
        head = post_bytes("/v1/completions", b"")
        head = head.replace(b"content-length: 0", b"content-length: 1000000")
        lines = [await server.line() for _ in range(3)]
        for line in lines[:2]:
            await line.send(head + b" " * 999_999)
        await asyncio.sleep(0.2)
        await lines[2].send(head + b" " * 999_999)
        answer = await lines[2].read_until(b"\r\n\r\n")
        assert b" 429 " in answer and b"retry-after" in answer

    play_wired(script, max_body_mib=1)


def test_bodies_that_wait_for_a_thread_are_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intake, "_MOST_HELD", 2)
    encode = threading.Event()
    monkeypatch.setattr(app, "completion_job", lambda *_: encode.wait(10))

    async def script(served: Served, server: Wired) -> None:
        request = post_bytes("/v1/completions", b" " * 1_000_000, b"connection: close")
        lines = [await server.line() for _ in range(2)]
        for line in lines:
            await line.send(request)
        await asyncio.sleep(0.2)
        answer = await server.ask(request)
        encode.set()
        assert b" 429 " in answer and b"retry-after" in answer
        assert b'rejected_total{model_name="fake model",reason="queue_full"} 1.0' in (
            served.life.metrics.render()
        )

    play_wired(script, max_body_mib=1)


def test_probes_are_answered_while_large_prompts_are_encoded():
    async def script(served: Served, server: Wired) -> None:
        large = b'{"prompt": "' + "森林 🙂 one two ".encode() * 300_000 + b'"}'
        cut = b'{"truncate_prompt_tokens": 9, "prompt": "' + b"one two " * 130_000 + b'"}'
        requests = [
            post_bytes("/v1/completions", body, b"connection: close") for body in (large, cut)
        ]
        asked = [asyncio.create_task(server.ask(request)) for request in requests * 2]
        worst = 0.0
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
            for _ in range(40):
                began = time.monotonic()
                assert (await client.get("/live")).status_code == 200
                worst = max(worst, time.monotonic() - began)
                await asyncio.sleep(0.01)
        for task, status in zip(asked, [400, 200] * 2, strict=True):
            assert b" %d " % status in (await task)[:20]
        assert worst < 1, worst  # an idle machine takes under 0.05

    play_wired(script)
