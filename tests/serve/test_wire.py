"""Limits of a connection, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from functools import partial
from types import SimpleNamespace

import pytest

from moespan.serve import server as server_module
from moespan.serve import wire
from tests.serve.scene import (
    Line,
    Served,
    Wired,
    envelope_of,
    play_wired,
    post_bytes,
    status_of,
)

CLOSE = b"connection: close"
GET = b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


def completion(**body: object) -> bytes:
    return json.dumps({"prompt": "12+30=", **body}).encode()


def unchunked(body: bytes) -> bytes:
    text = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            return text
        text, body = text + body[: int(size, 16)], body[int(size, 16) + 2 :]


def test_headers_that_never_end_are_answered_408_in_time():
    async def script(served: Served, server: Wired) -> None:
        answer = await server.ask(b"GET /live HTTP/1.1\r\nx: ")
        assert status_of(answer) == 408
        assert "did not arrive within 0.2 s" in envelope_of(answer)["message"]
        assert served.ends == [("other", 408)]

    play_wired(script, read_timeout_s=0.2)


def test_a_body_that_never_ends_is_answered_408_in_time():
    async def script(served: Served, server: Wired) -> None:
        whole = post_bytes("/v1/completions", completion())
        line = await server.line()
        for byte in whole[:-1]:  # slowly, and never the last one
            await line.send(bytes([byte]))
        answer = await asyncio.wait_for(line.until_closed(), 5)
        assert status_of(answer) == 408 and envelope_of(answer)["code"] is None
        await asyncio.sleep(0.05)
        assert served.ends == [("/v1/completions", 408)]

    play_wired(script, read_timeout_s=0.3)


def test_a_connection_that_sends_nothing_is_closed():
    async def script(served: Served, server: Wired) -> None:
        assert await server.ask(b"") == b""

    play_wired(script, read_timeout_s=0.2)


def test_the_time_to_read_does_not_bound_the_answer_or_an_idle_connection():
    async def script(served: Served, server: Wired) -> None:
        line = await server.line()
        await line.send(post_bytes("/v1/completions", completion()))
        await asyncio.sleep(0.4)
        served.ranks.holds = False
        await line.read_until(b"\r\n\r\n")
        await asyncio.sleep(0.4)
        await line.send(GET)
        assert b"200 OK" in await line.until_closed()

    play_wired(script, holds=True, read_timeout_s=0.2)


def test_an_idle_connection_is_closed_after_keep_alive():
    async def script(served: Served, server: Wired) -> None:
        answer = await server.ask(GET.replace(b"connection: close\r\n", b""))
        assert status_of(answer) == 200

    play_wired(script, keep_alive_s=0.2)


def test_headers_beyond_the_limit_are_answered_431():
    async def script(served: Served, server: Wired) -> None:
        for size in (17 << 10, 200 << 10, 1 << 20):
            answer = await server.ask(
                b"GET /live HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * size + b"\r\n\r\n"
            )
            assert status_of(answer) == 431, size
            assert "16384 bytes" in envelope_of(answer)["message"]
        many = b"".join(b"x%d: y\r\n" % number for number in range(3000))
        answer = await server.ask(b"GET /live HTTP/1.1\r\nhost: localhost\r\n" + many + b"\r\n")
        assert status_of(answer) == 431
        assert status_of(await server.ask(GET)) == 200

    play_wired(script)


def test_what_is_not_http_is_answered_400_in_the_envelope():
    async def script(served: Served, server: Wired) -> None:
        for data in (
            b"hello\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"GET /live HTTP/1.1\r\n\r\n",  # without a host
            b"GET /live HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
            b"GET /li ve HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET /live HTTP/1.1\r\nhost: a\r\nb\x00d: x\r\n\r\n",
        ):
            answer = await server.ask(data)
            assert status_of(answer) == 400, data
            assert served.ends.pop() == ("other", 400)
            assert envelope_of(answer)["type"] == "invalid_request_error"

    play_wired(script)


@pytest.mark.parametrize("order", [1, -1])
def test_a_request_of_two_lengths_is_refused_and_nothing_after_it_is_answered(order: int):
    async def script(served: Served, server: Wired) -> None:
        lengths = [b"Content-Length: 6\r\n", b"Transfer-Encoding: chunked\r\n"][::order]
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + b"".join(lengths)
        answer = await server.ask(head + b"\r\n0\r\n\r\n" + GET)
        assert status_of(answer) == 400 and answer.count(b"HTTP/1.1") == 1
        assert "exclude each other" in envelope_of(answer)["message"]
        assert CLOSE in answer
        assert served.ends == [("other", 400)]

    play_wired(script)


def test_a_body_beyond_the_limit_is_answered_413():
    async def script(served: Served, server: Wired) -> None:
        body = completion(prompt="x" * (2 << 20))
        answer = await server.ask(post_bytes("/v1/completions", body))
        assert status_of(answer) == 413
        assert "1048576 bytes" in envelope_of(answer)["message"]
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        assert status_of(await server.ask(head + chunk * 2 + b"0\r\n\r\n")) == 413

    play_wired(script, max_body_mib=1)


def test_connections_beyond_the_limit_are_answered_503():
    async def script(served: Served, server: Wired) -> None:
        lines = [await server.line() for _ in range(3)]
        await asyncio.sleep(0.05)
        answer = await server.ask(b"")
        assert status_of(answer) == 503 and b"retry-after: " in answer
        assert served.ends == [("other", 503)]
        assert envelope_of(answer)["code"] == "too_many_connections"
        for line in lines:
            line.close()
        await asyncio.sleep(0.05)
        assert status_of(await server.ask(GET)) == 200

    play_wired(script, max_connections=3)


def test_a_client_that_reads_nothing_is_dropped_and_its_request_aborted():
    async def script(served: Served, server: Wired) -> None:
        line = await server.line(limit=16)
        body = completion(stream=True, max_tokens=400, n=64, logprobs=20, ignore_eos=True)
        await line.send(post_bytes("/v1/completions", body))
        while not served.ends:
            await asyncio.sleep(0.05)
        assert served.ends == [("/v1/completions", 499)]
        assert served.life.num_live == 0
        line.reset()

    play_wired(script, texts=["x" * 500], write_timeout_s=0.3)


def test_the_server_ends_although_a_client_reads_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "SHUTDOWN_S", 0.2)

    async def script(served: Served, server: Wired) -> None:
        line = await server.line(limit=16)
        body = completion(stream=True, max_tokens=400, n=64, logprobs=20, ignore_eos=True)
        await line.send(post_bytes("/v1/completions", body))
        while not server.waits_for_a_reader:
            await asyncio.sleep(0.01)
        served.life.force()
        await asyncio.wait_for(server.end(), 10)

    play_wired(script, texts=["x" * 500])


def test_a_client_that_goes_ends_its_request():
    async def script(served: Served, server: Wired) -> None:
        for stream in (False, True):
            for leave in ("close", "reset"):
                line = await server.line()
                await line.send(post_bytes("/v1/completions", completion(stream=stream, n=3)))
                while not served.life.num_live:
                    await asyncio.sleep(0.001)
                getattr(line, leave)()
                while served.life.num_live:
                    await asyncio.sleep(0.001)
        assert len(served.ranks.aborted) == 4
        await asyncio.sleep(0.05)
        assert served.ends == [("/v1/completions", 499)] * 4

    play_wired(script, holds=True)


def test_the_bytes_of_a_stream():
    async def script(served: Served, server: Wired) -> None:
        answer = await server.ask(post_bytes("/v1/completions", completion(stream=True), CLOSE))
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        for line in (
            b"content-type: text/event-stream",
            b"cache-control: no-cache",
            b"x-accel-buffering: no",
            b"x-content-type-options: nosniff",
        ):
            assert line in lines
        assert b"server" not in head.lower()
        text = unchunked(body)
        assert text.startswith(b"data: {") and text.endswith(b"data: [DONE]\n\n")
        assert b"\r" not in text

    play_wired(script)


def test_a_refusal_reaches_a_client_that_still_sends():
    """Each client reads only when its whole body is out, as most do. The answer closes."""

    def client(port: int, head: bytes, kind: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(10)
            lines = [head, b"host: localhost", b"content-type: " + kind, b"connection: close"]
            size = 3 << 20
            sock.sendall(b"\r\n".join([*lines, b"content-length: %d" % size]) + b"\r\n\r\n")
            for _ in range(size >> 14):
                sock.sendall(b" " * (1 << 14))
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(1 << 16), b""))

    async def script(served: Served, server: Wired) -> None:
        good, form = b"application/json", b"application/x-www-form-urlencoded"
        for head, kind, status in (
            (b"POST /v1/completions HTTP/1.1", good, 413),
            (b"POST /v1/completions HTTP/1.1", form, 415),
            (b"POST /nothing HTTP/1.1", good, 404),
        ):
            answer = await asyncio.to_thread(client, server.port, head, kind)
            assert status_of(answer) == status
            assert envelope_of(answer)["type"] in ("invalid_request_error", "not_found_error")

    play_wired(script, max_body_mib=1)


def test_a_refusal_of_the_key_reaches_a_client_that_still_sends():
    async def script(served: Served, server: Wired) -> None:
        body = b" " * (2 << 20)
        line = await server.line()
        request = post_bytes("/v1/completions", body, CLOSE)
        await line.send(request[: 1 << 20])
        await asyncio.sleep(0.05)  # the answer is out, and nobody has read it
        await line.send(request[1 << 20 :])
        assert status_of(await line.until_closed()) == 401

    play_wired(script, api_key="secret")


def test_a_connection_lingers_within_bounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wire, "_LINGER_SILENT_S", 0.2)
    monkeypatch.setattr(wire, "_LINGER_S", 0.6)

    async def drip(line: Line, every_s: float) -> float:
        """Send on without end; returns the seconds until the server has had enough."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await line.send(post_bytes("/v1/completions", b" " * 100)[:-100].replace(b"100", b"9" * 9))
        with contextlib.suppress(ConnectionError):
            while loop.time() - began < 10:
                await asyncio.sleep(every_s)
                await line.send(b" " * 10)
        return loop.time() - began

    async def script(served: Served, server: Wired) -> None:
        assert 0.4 < await drip(await server.line(), 0.05) < 5
        line = await server.line()
        await line.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n"
        )
        answer = await asyncio.wait_for(line.until_closed(), 5)
        assert status_of(answer) == 415
        assert served.life.num_live == 0

    play_wired(script)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_only_stops_sending_gets_its_answer(stream: bool):
    async def script(served: Served, server: Wired) -> None:
        line = await server.line()
        await line.send(post_bytes("/v1/completions", completion(stream=stream)))
        line.end()
        await asyncio.sleep(0.3)
        assert served.life.num_live == 1
        served.ranks.holds = False
        answer = await asyncio.wait_for(line.until_closed(), 5)
        going_on, _, answer = answer.partition(b"\r\n\r\n")
        assert going_on.startswith(b"HTTP/1.1 100 ")
        assert status_of(answer) == 200
        assert (b"[DONE]" if stream else b'"text":" 42"') in answer

    play_wired(script, holds=True)


def test_a_probe_that_only_stops_sending_gets_its_answer():
    async def script(served: Served, server: Wired) -> None:
        for version in (b"1.0", b"1.1"):
            line = await server.line()
            await line.send(b"GET /live HTTP/" + version + b"\r\nhost: localhost\r\n\r\n")
            line.end()
            answer = await asyncio.wait_for(line.until_closed(), 5)
            assert answer.startswith(b"HTTP/1.1 200 ")

    play_wired(script)


def test_requests_that_arrive_together_begin_a_few_in_each_turn_of_the_loop():
    begun: list[int] = []

    async def script() -> None:
        turns, loop = wire.Turns(), asyncio.get_running_loop()
        for number in range(20):
            turns.take(SimpleNamespace(loop=loop, begin=partial(begun.append, number)))  # type: ignore[arg-type]
        counts = []
        while len(begun) < 20:
            counts.append(len(begun))
            await asyncio.sleep(0)
        assert counts == [0, 8, 16]
        assert begun == list(range(20))
        turns.take(SimpleNamespace(loop=loop, begin=partial(begun.append, 20)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert begun[-1] == 20

    asyncio.run(script())


def test_a_client_that_goes_while_its_request_waits_for_its_turn_is_seen_to_go(
    monkeypatch: pytest.MonkeyPatch,
):
    waiting: list[wire.Wire] = []
    monkeypatch.setattr(wire.Turns, "take", lambda self, one: waiting.append(one))

    async def script(served: Served, server: Wired) -> None:
        line = await server.line()
        await line.send(post_bytes("/v1/completions", completion()))
        while not waiting:
            await asyncio.sleep(0.001)
        line.close()
        await asyncio.sleep(0.01)
        waiting[0].begin()
        while not served.ends:
            await asyncio.sleep(0.001)
        assert served.ends == [("/v1/completions", 499)]

    play_wired(script)
