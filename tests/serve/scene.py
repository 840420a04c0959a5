"""A server in this process over scripted ranks: real tokens and text, no model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import msgspec

from moespan.engine.request import OutputDelta, Request, TokenLogprobs
from moespan.engine.text import TextStream
from moespan.front.settings import Settings
from moespan.serve import mindie
from moespan.serve.app import make_app
from moespan.serve.auth import Keys
from moespan.serve.expert_watch import ExpertWatch
from moespan.serve.life import Life, State
from moespan.serve.metrics import metrics_route
from moespan.serve.options import ServeOptions
from moespan.serve.page import page_routes
from moespan.serve.served import ServedModel
from moespan.serve.server import Server, listen
from tests import tiers
from tests.serve.fake_ranks import INFO, FakeRanks, FakeStart, metrics

QUICKSTART = "models/quickstart"
MAX_MODEL_LEN = 512


@functools.cache
def quickstart(**given: Any) -> ServedModel:
    model_config, config, _ = Settings(QUICKSTART, device="cpu").resolve(to_run=False)
    assert model_config is not None
    return ServedModel.load(QUICKSTART, config, model_config, ServeOptions(**given))


def logprob(token_id: int, position: int) -> float:
    """What the scripted model says of a token at a position."""
    return -((token_id * 31 + position * 7) % 97) / 8 - 0.125


def entry(token_id: int, position: int, num_top: int) -> TokenLogprobs:
    best = sorted(((logprob(t, position), -t) for t in range(400)), reverse=True)[:num_top]
    return TokenLogprobs(token_id, logprob(token_id, position), [(-t, lp) for lp, t in best])


class ScriptedRanks(FakeRanks):
    """Ranks that answer each request with a text, a token a turn of the loop.

    Attributes:
        texts: what is said; continuation i of a request says texts[i % len(texts)], then EOS.
        holds: whether answers wait until it is False.
        seen: all requests that came.
    """

    def __init__(self, on_news: Any, texts: Sequence[str], holds: bool) -> None:
        super().__init__(on_news)
        self.texts = texts
        self.holds = holds
        self.seen: list[Request] = []

    def add(self, request: Request) -> None:
        super().add(request)
        self.seen.append(request)
        asyncio.get_running_loop().create_task(self._speak(request))

    async def _speak(self, request: Request) -> None:
        params = request.params
        tokenizer = quickstart().tokenizer
        assert tokenizer is not None
        prompt = request.prompt_token_ids
        if params.prompt_logprobs is not None:
            entries = [
                entry(token, place, params.prompt_logprobs)
                for place, token in enumerate(prompt)
                if place
            ]
            half = len(entries) // 2  # two prefill chunks
            self.on_news([OutputDelta(id=request.id, prompt_logprobs=entries[:half])], None)
            await asyncio.sleep(0)
            self.on_news([OutputDelta(id=request.id, prompt_logprobs=entries[half:])], None)
        for index in range(params.n):
            ids = tokenizer.encode(self.texts[index % len(self.texts)], add_special_tokens=False)
            await self._continue(request, index, [*ids, *tokenizer.eos_token_ids])

    async def _continue(self, request: Request, index: int, ids: list[int]) -> None:
        params = request.params
        tokenizer = quickstart().tokenizer
        assert tokenizer is not None
        text = TextStream(tokenizer, params, request.prompt_token_ids)
        room = MAX_MODEL_LEN - len(request.prompt_token_ids)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        if params.ignore_eos:
            ids = [*ids, *[ids[0]] * limit]
        if limit == 0:
            self.on_news([OutputDelta(id=request.id, index=index, finish_reason="length")], None)
            self.running.pop(request.id, None)
        for number, token in enumerate(ids[:limit]):
            while self.holds:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            if request.id not in self.running or self.is_closed:
                return
            reason: str | None = None
            if token in tokenizer.eos_token_ids and not params.ignore_eos:
                reason = "stop"
            elif number == limit - 1:
                reason = "length"
            new = text.push([token], number + 1 >= params.min_tokens, reason is not None)
            if text.stopped_by is not None:
                reason = "stop"
            place = len(request.prompt_token_ids) + number
            self.on_news(
                [
                    OutputDelta(
                        id=request.id,
                        index=index,
                        text=new if params.stop else "",
                        token_ids=[token],
                        logprobs=[]
                        if params.logprobs is None
                        else [entry(token, place, params.logprobs)],
                        finish_reason=reason,
                        stop_reason=text.stopped_by,
                        num_cached_tokens=1,
                    )
                ],
                None,
            )
            if reason is not None:
                if index == params.n - 1:
                    self.running.pop(request.id, None)
                return


class ScriptedStart(FakeStart):
    """Starts scripted ranks."""

    def __init__(self, texts: list[str] | None = None, holds: bool = False) -> None:
        super().__init__()
        self._texts = texts or [" 42"]
        self._holds = holds

    async def __call__(self, on_news: Callable[[list[OutputDelta], Any], None]) -> FakeRanks:
        await super().__call__(on_news)
        ranks = ScriptedRanks(on_news, self._texts, self._holds)
        ranks.info = msgspec.structs.replace(INFO, num_blocks=1024, max_model_len=MAX_MODEL_LEN)
        self.lives[-1] = ranks
        return ranks


class Served:
    """A running server.

    Attributes:
        http: a client of the application.
        ends: route and status of all requests that ended.
    """

    def __init__(self, options: ServeOptions, start: ScriptedStart, **model: Any) -> None:
        self.options = options
        self.start = start
        counted = metrics()
        served = quickstart(**model)
        self.life = Life(start, options, counted, served.tokenizer)
        self.ends: list[tuple[str, int]] = []
        self.app = make_app(
            served,
            self.life,
            Keys(options, {}),
            options,
            more_routes=[
                metrics_route(counted),
                *page_routes(self.life, counted, QUICKSTART, 1, ExpertWatch(self.life, counted)),
                *(
                    mindie.mindie_routes(served, self.life, counted, options)
                    if options.mindie_routes
                    else ()
                ),
            ],
            open_paths=mindie.OPEN_PATHS if options.mindie_routes else frozenset(),
            on_end=self._end,
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://localhost", timeout=20
        )

    def _end(self, route: str, status: int) -> None:
        self.ends.append((route, status))
        self.life.metrics.answered(route, status)

    @property
    def ranks(self) -> ScriptedRanks:
        ranks = self.start.ranks
        assert isinstance(ranks, ScriptedRanks)
        return ranks

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", **{"prompt": "12+30=", **body})

    async def chat(self, *texts: str, **body: Any) -> httpx.Response:
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": text}
            for number, text in enumerate(texts or ("12+30=",))
        ]
        return await self.post("/v1/chat/completions", **{"messages": messages, **body})


def play(
    script: Callable[[Served], Awaitable[None]],
    texts: list[str] | None = None,
    holds: bool = False,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> Served:
    """Run a script against a server that is ready."""

    async def work() -> Served:
        served = Served(
            ServeOptions(**{**(model or {}), **options}),
            ScriptedStart(texts, holds),
            **(model or {}),
        )
        running = asyncio.create_task(served.life.run())
        while served.life.state is State.STARTING:
            await asyncio.sleep(0)
        try:
            await asyncio.wait_for(script(served), 30 * tiers.PATIENCE)
            assert served.life.num_live == 0, "a request is left"
        finally:
            served.life.force()
            with contextlib.suppress(Exception):
                await running
        return served

    return asyncio.run(work())


def event_lines(response: httpx.Response) -> list[str]:
    """The events of a stream, without what ends them."""
    assert response.status_code == 200, response.text
    assert "\r" not in response.text and response.text.endswith("\n\n")
    return response.text.removesuffix("\n\n").split("\n\n")


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream that ends as it should."""
    lines = event_lines(response)
    assert lines.pop() == "data: [DONE]"
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line[6:]) for line in lines]


def error_of(response: httpx.Response) -> Any:
    """The content of an envelope."""
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < 4096
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return body["error"]


class Line:
    """A raw connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def until_closed(self) -> bytes:
        """All that comes before the server closes the connection."""
        with contextlib.suppress(ConnectionResetError):
            return await self._reader.read()
        return b""

    async def read_until(self, end: bytes) -> bytes:
        return await self._reader.readuntil(end)

    def close(self) -> None:
        self._writer.close()

    def end(self) -> None:
        """Say that nothing more is sent."""
        self._writer.write_eof()

    def reset(self) -> None:
        self._writer.transport.abort()


def post_bytes(path: str, body: bytes, *headers: bytes) -> bytes:
    """A request as it goes over the wire."""
    lines = [
        b"POST " + path.encode() + b" HTTP/1.1",
        b"host: localhost",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class Wired:
    """A server that listens on a port of its own, in this loop."""

    def __init__(self, served: Served) -> None:
        self._server = Server(served.app, served.options, served._end)
        self._sock = listen(served.options)
        self.port = self._sock.getsockname()[1]
        self._lines: list[Line] = []

    async def __aenter__(self) -> Wired:
        self._task = asyncio.create_task(self._server.serve([self._sock]))
        while not self._server.started:
            await asyncio.sleep(0.001)
        return self

    async def __aexit__(self, *_: object) -> None:
        for line in self._lines:
            line.close()
        self._server.should_exit = True
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        await self._task

    @property
    def waits_for_a_reader(self) -> bool:
        """Whether a client has left so much unread that its handler waits."""
        connections = self._server.server_state.connections
        return any(getattr(one, "flow").write_paused for one in connections)  # noqa: B009

    async def end(self) -> None:
        """End as the program does."""
        self._server.should_exit = True
        await self._task

    async def line(self, limit: int = 2**16) -> Line:
        line = Line(*await asyncio.open_connection("127.0.0.1", self.port, limit=limit))
        self._lines.append(line)
        return line

    async def ask(self, data: bytes) -> bytes:
        """The answer to bytes, up to the end of the connection."""
        line = await self.line()
        await line.send(data)
        try:
            return await asyncio.wait_for(line.until_closed(), 10)
        finally:
            line.close()


def play_wired(
    script: Callable[[Served, Wired], Awaitable[None]],
    texts: list[str] | None = None,
    holds: bool = False,
    **options: Any,
) -> Served:
    """`play` with a real socket."""

    async def wired(served: Served) -> None:
        async with Wired(served) as server:
            await script(served, server)

    return play(wired, texts, holds, **{"port": 0, **options})


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def envelope_of(answer: bytes) -> Any:
    """The content of the envelope in a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert len(body) < 4096
    return json.loads(body)["error"]
