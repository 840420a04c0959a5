"""Spans of requests: their times, their parent, and nothing of what was said."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import msgspec
import pytest

from moespan.engine.request import Timing
from moespan.errors import ConfigError
from moespan.serve.life import Life
from moespan.serve.options import LifeOptions
from moespan.serve.tracing import Tracing
from tests.serve.fake_ranks import FakeStart, metrics, request, token
from tests.serve.virtual_time import run, settle

HAS_OTEL = importlib.util.find_spec("opentelemetry") is not None
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WALL_NS = 10**18


class FakeSpan:
    def __init__(self, name: str, **given: Any) -> None:
        self.name, self.given, self.end_ns = name, given, 0

    def end(self, end_time: int) -> None:
        self.end_ns = end_time

    @property
    def times_s(self) -> tuple[float, float]:
        """Start and end before the end of the request."""
        start, end = self.given["start_time"], self.end_ns
        return round((start - WALL_NS) / 1e9, 6), round((end - WALL_NS) / 1e9, 6)


class FakeTracer:
    def __init__(self) -> None:
        self.spans: list[FakeSpan] = []

    def start_span(self, name: str, **given: Any) -> FakeSpan:
        self.spans.append(FakeSpan(name, **given))
        return self.spans[-1]


def traced(tracer: FakeTracer) -> Tracing:
    return Tracing(
        "fake", tracer, lambda header: ("of", header), lambda span: span, list, lambda: WALL_NS
    )


def test_a_request_becomes_a_span_with_its_parts():
    tracer, start = FakeTracer(), FakeStart()

    async def work() -> None:
        life = Life(start, LifeOptions(), metrics(), on_end=traced(tracer).tell)
        running = asyncio.create_task(life.run())
        await settle()
        inbox = life.submit_all([request("a", num_tokens=5)], PARENT)[0]
        await asyncio.sleep(2)
        start.ranks.tell(msgspec.structs.replace(token("a"), timing=Timing(0.5, 1.25)))
        await asyncio.sleep(3)
        start.ranks.tell(token("a", end="stop"))
        inbox.close()
        life.submit(request("b")).close()  # before its first token
        life.force()
        await running

    run(work())
    whole, queue, prefill, decode, aborted = tracer.spans
    assert whole.given["context"] == ("of", PARENT)
    assert whole.given["attributes"] == {
        "gen_ai.request.model": "fake",
        "gen_ai.request.id": "a",
        "gen_ai.request.n": 1,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ["stop"],
    }
    assert {span.name: span.times_s for span in tracer.spans[:4]} == {
        "request": (-5, 0),
        "queue": (-4.75, -4.25),
        "prefill": (-4.25, -3),
        "decode": (-3, 0),
    }
    assert all(part.given["context"] is whole for part in (queue, prefill, decode))
    assert aborted.given["context"] is None
    assert aborted.given["attributes"]["gen_ai.response.finish_reasons"] == ["abort"]


@pytest.mark.skipif(HAS_OTEL, reason="the extra is here")
def test_without_the_extra_the_flag_says_what_to_install():
    with pytest.raises(ConfigError, match=r"pip install '\.\[otel\]'"):
        Tracing.to("http://127.0.0.1:9/v1/traces", "fake")


@pytest.mark.skipif(not HAS_OTEL, reason="needs the extra otel")
def test_the_library_sends_what_it_is_given():
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=collector.serve_forever, daemon=True).start()
    tracing = Tracing.to(f"http://127.0.0.1:{collector.server_port}/v1/traces", "fake model")
    start = FakeStart()

    async def work() -> None:
        life = Life(start, LifeOptions(), metrics(), on_end=tracing.tell)
        running = asyncio.create_task(life.run())
        await settle()
        life.submit_all([request("the-id")], PARENT)
        start.ranks.tell(msgspec.structs.replace(token("the-id", end="stop"), timing=Timing(0, 0)))
        life.force()
        await running

    run(work())
    tracing.shut_down()
    collector.shutdown()
    collector.server_close()
    (body,) = bodies
    for words in (b"queue", b"prefill", b"decode", b"the-id", bytes.fromhex(PARENT[3:35])):
        assert words in body
