"""No request, whatever its bytes, makes the server fail or wait for ever."""

from __future__ import annotations

import asyncio
import contextlib

from tests.serve.hostile import Raw, all_requests
from tests.serve.scene import Served, Wired, play_wired, status_of


def test_no_request_makes_the_server_fail_or_hang():
    faults: list[tuple[str, bytes]] = []

    async def ask(server: Wired, raw: Raw) -> None:
        answer = b""
        with contextlib.suppress(ConnectionError):  # closed before all was read
            answer = await server.ask(raw.data)
        if answer and status_of(answer) >= 500:
            faults.append((raw.name, answer[-400:]))

    async def script(served: Served, server: Wired) -> None:
        gate = asyncio.Semaphore(32)

        async def next_in_line(raw: Raw) -> None:
            async with gate:
                await ask(server, raw)

        requests = [*all_requests()]
        assert len(requests) > 1000
        await asyncio.gather(*map(next_in_line, requests))
        assert not faults
        assert (await served.http.get("/load")).json() == {"server_load": 0}
        assert (await served.complete(prompt="12+30=")).status_code == 200

    play_wired(script, read_timeout_s=0.5, max_queued_requests=1000)
