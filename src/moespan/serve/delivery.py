"""Hands a job to the engine, and sends its answer: whole, or as a stream of server-sent events.

A stream begins with the first delta, so that a job which fails before it gets a status of its own.
While nothing comes, a comment keeps the connection busy. An error in a stream is an event without
`[DONE]`: clients must not take what they have for the whole answer.

If the client goes, the requests leave the engine, whether they are queued, run or stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from moespan import log
from moespan.engine.request import OutputDelta
from moespan.errors import shortened
from moespan.serve.answers import Answer
from moespan.serve.edge import ClientGoneError
from moespan.serve.inbox import Inbox, joined
from moespan.serve.life import Life
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal, refusal_of
from moespan.serve.sampling import Job

COMMENT_S = 15.0
"""Seconds of silence in a stream after which a comment is sent."""

_MOST_LOGGED = 4096  # characters of a prompt or an answer, with --log-prompts
_COMMENT = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class _TimedOutError(Refusal):
    """The request took longer than `--request-timeout`."""


class Delivery:
    """The response to a job.

    Args:
        answer: the form of the answer; None for OpenAI's.
        end: what ends a stream that is complete.
    """

    def __init__(
        self,
        job: Job,
        life: Life,
        options: ServeOptions,
        *,
        answer: Answer | None = None,
        end: bytes = _DONE,
    ) -> None:
        self._job = job
        self._life = life
        self._options = options
        self._answer = Answer(job) if answer is None else answer
        self._answer.keeps_text = options.log_prompts
        self._end = end
        self._headers: list[tuple[bytes, bytes]] = []
        if job.ignored:
            self._headers.append(ignored_header(job.ignored))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit the job and answer it.

        Raises:
            Refusal, MoespanError: the job failed before anything was sent.
            ClientGoneError: the client has gone.
        """
        inboxes = self._life.submit_all(self._job.requests, _traceparent(scope))
        ending = "abort"
        try:
            stream = _Stream(send, self._headers) if self._job.stream else None
            work = self._whole(inboxes, send) if stream is None else self._stream(inboxes, stream)
            try:
                await _unless_gone(work, receive, self._options.request_timeout_s)
            except ClientGoneError:
                raise
            except Exception as error:
                if isinstance(error, _TimedOutError):
                    ending = "timeout"
                if stream is None or not stream.is_started:
                    raise
                await stream.fail(refusal_of(error))
        finally:
            for inbox in inboxes:
                inbox.close(ending)
            self._tell(scope)

    async def _whole(self, inboxes: Sequence[Inbox], send: Send) -> None:
        deltas = [
            (number, delta)
            for number, inbox in enumerate(inboxes)
            for delta in await _all_deltas(inbox)
        ]
        body = msgspec.json.encode(self._answer.whole(deltas))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self._headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, inboxes: Sequence[Inbox], stream: _Stream) -> None:
        with self._life.metrics.open_streams.track_inprogress():
            await self._send_events(inboxes, stream)

    async def _send_events(self, inboxes: Sequence[Inbox], stream: _Stream) -> None:
        comments = asyncio.create_task(stream.keep_busy())
        try:
            async with contextlib.aclosing(_arrivals(inboxes)) as arrivals:
                async for number, deltas in arrivals:
                    events = list(self._answer.events(number, deltas))
                    if events:
                        await stream.send(b"".join(map(self._answer.line, events)))
        finally:
            comments.cancel()
        last = self._answer.last_event()
        await stream.end((b"" if last is None else self._answer.line(last)) + self._end)

    def _tell(self, scope: Scope) -> None:
        """What the log says of this job."""
        job, usage = self._job, self._answer.usage
        scope.setdefault("state", {})["told"] = {
            "answer": job.id,
            "prompt tokens": usage.prompt_tokens,
            "completion tokens": usage.completion_tokens,
        }
        if self._options.log_prompts:
            prompts = [
                text or r.prompt_token_ids for text, r in zip(job.texts, job.requests, strict=True)
            ]
            for kind, values in (("prompt", prompts), ("answer", self._answer.texts)):
                for number, value in enumerate(values):
                    shown = shortened(value, _MOST_LOGGED)
                    log.logger.info("%s, %s %d: %s", job.id, kind, number, shown)


class _Stream:
    """Server-sent events on their way. The head goes out with the first of them."""

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self._lock = asyncio.Lock()
        self._sent_at = asyncio.get_running_loop().time()
        self.is_started = False

    async def send(self, data: bytes, is_last: bool = False) -> None:
        """Send bytes of whole events."""
        async with self._lock:
            if not self.is_started:
                self.is_started = True
                headers = [*_HEADERS, *self._headers]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
            self._sent_at = asyncio.get_running_loop().time()

    async def end(self, data: bytes) -> None:
        """Send the last bytes."""
        await self.send(data, is_last=True)

    async def fail(self, refusal: Refusal) -> None:
        """End with an error, so that no client takes the stream for complete."""
        await self.end(b"data: " + refusal.body + b"\n\n")

    async def keep_busy(self) -> None:
        """Send a comment whenever nothing was sent for a while, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            wait_s = self._sent_at + COMMENT_S - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            else:
                await self.send(_COMMENT)


def _traceparent(scope: Scope) -> str:
    """The client's trace (W3C Trace Context), for spans."""
    for name, value in scope["headers"]:
        if name == b"traceparent":
            return str(value.decode("latin-1"))
    return ""


def ignored_header(names: Sequence[str]) -> tuple[bytes, bytes]:
    """The header that names fields without effect; logs them, too, the first time."""
    # Blanks at the ends of a header's value are illegal, and a name may be blank.
    text = ", ".join(shortened(name).strip() or "''" for name in names[:32])[:1024].strip()
    log.once(f"fields without effect in requests: {shortened(text, 200)}")
    return b"x-moespan-ignored-fields", text.encode("ascii", "replace")


async def _all_deltas(inbox: Inbox) -> list[OutputDelta]:
    """All that a request has to tell: one delta for each continuation."""
    deltas: dict[int, list[OutputDelta]] = {}
    while not inbox.is_finished:
        for delta in await inbox.next():
            deltas.setdefault(delta.index, []).append(delta)
    return [joined(parts) for _, parts in sorted(deltas.items())]


async def _arrivals(
    inboxes: Sequence[Inbox],
) -> AsyncGenerator[tuple[int, list[OutputDelta]], None]:
    """Deltas as they come, with the number of their request."""
    if len(inboxes) == 1:
        while not inboxes[0].is_finished:
            yield 0, await inboxes[0].next()
        return
    # One place: an inbox joins what comes while its deltas wait for it.
    arrived: asyncio.Queue[tuple[int, list[OutputDelta]] | Exception | None] = asyncio.Queue(1)

    async def pump(number: int, inbox: Inbox) -> None:
        try:
            while not inbox.is_finished:
                await arrived.put((number, await inbox.next()))
        except Exception as error:
            await arrived.put(error)
        else:
            await arrived.put(None)

    pumps = [asyncio.create_task(pump(*one)) for one in enumerate(inboxes)]
    try:
        num_running = len(pumps)
        while num_running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()


async def _unless_gone(
    work: Coroutine[Any, Any, None], receive: Receive, timeout_s: float | None
) -> None:
    """Run `work` unless the client goes or time runs out; then it is cancelled.

    Raises:
        ClientGoneError: the client has gone.
        Refusal: time has run out.
    """
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        elif gone.done():
            raise ClientGoneError("the client has gone")
        else:
            raise _TimedOutError(
                503,
                f"the request took longer than --request-timeout {timeout_s:g} s",
                code="request_timeout",
                retry_after_s=1,
            )
    finally:
        for one in (task, gone):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task, gone))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
