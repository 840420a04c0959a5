"""Requests that the engine has not finished, and the deltas that come for them.

All methods belong to one event loop, and none of them waits. So nothing comes between the
registration of a request and its hand-over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from moespan.engine.info import EngineInfo, Pulse
from moespan.engine.questions import Question
from moespan.engine.request import OutputDelta, Request
from moespan.errors import EngineDeadError, MoespanError, RequestError
from moespan.front.live_texts import LiveTexts
from moespan.parallel.beats import Place
from moespan.serve.inbox import Inbox
from moespan.serve.metrics import Course, Metrics
from moespan.text.tokenizer import Tokenizer

A = TypeVar("A")

OnNews = Callable[[list[OutputDelta], Pulse | None], None]
"""Takes the deltas of a step, and the newest `Pulse` or None."""


class Ranks(Protocol):
    """What the server needs of `moespan.launch.async_ranks.AsyncRanks`."""

    @property
    def info(self) -> EngineInfo:
        """Facts about this engine."""

    def add(self, request: Request) -> None:
        """Hand a request over; raises RequestError or EngineDeadError."""

    def abort(self, request_id: str) -> None:
        """Drop a request; raises EngineDeadError."""

    async def ask(self, question: Question[A]) -> A:
        """The engine's answer; raises RequestError or EngineDeadError."""

    @property
    def heard_at(self) -> float:
        """Time of the leader's last word."""

    def places(self) -> list[Place]:
        """Where the ranks are, as far as that is known on this node."""

    async def wait_dead(self) -> MoespanError:
        """The cause, when the ranks have ended and all their processes have gone."""

    async def close(self) -> None:
        """End the ranks. Idempotent."""


class _Live(NamedTuple):
    """A request that the engine has not finished."""

    inbox: Inbox
    course: Course


class LiveRequests:
    """All requests that the engine has not finished. A request that has no delta so far is queued.

    Args:
        metrics: hears of each request.
        tokenizer: makes the texts; None makes none.
        on_end: called with each request that has ended, and the time.

    Attributes:
        ranks: those that run; None while none do.
        num_queued_tokens: prompt tokens of queued requests.
        is_empty: set while there is no request.
    """

    def __init__(
        self,
        metrics: Metrics,
        tokenizer: Tokenizer | None,
        on_end: Callable[[Course, float], object],
    ) -> None:
        self._metrics = metrics
        self._texts = LiveTexts(tokenizer, self._drop)
        self._on_end = on_end
        self.ranks: Ranks | None = None
        self._live: dict[str, _Live] = {}
        self._queued: dict[str, int] = {}  # their prompt tokens
        self.num_queued_tokens = 0
        self.is_empty = asyncio.Event()
        self.is_empty.set()

    def __len__(self) -> int:
        return len(self._live)

    @property
    def num_queued(self) -> int:
        """Requests without a delta so far."""
        return len(self._queued)

    def hand_over(self, requests: Sequence[Request], traceparent: str) -> list[Inbox]:
        """Register requests and hand them over: all or none.

        Raises:
            EngineDeadError: the ranks are gone.
            RequestError: a request cannot be sent, or its id is in use.
        """
        inboxes: list[Inbox] = []
        try:
            for request in requests:
                inboxes.append(self._register(request, traceparent))
                self._running().add(request)
        except BaseException:
            for inbox in inboxes:
                self._remove(inbox.request.id)
                self._drop(inbox.request.id)
            raise
        return inboxes

    def hand_over_again(self) -> None:
        """Give all requests to new ranks."""
        for live in list(self._live.values()):
            self._running().add(live.inbox.request)

    def take_in(self, deltas: list[OutputDelta]) -> None:
        """Spread one word of the leader over the inboxes."""
        now = asyncio.get_running_loop().time()
        for delta in self._texts.complete(deltas):
            live = self._live.get(delta.id)
            if live is None:  # aborted meanwhile
                continue
            self._begin(delta.id)
            self._metrics.take(live.course, delta, now)
            live.inbox.put(delta)
            if not live.inbox.is_running:
                self._forget(delta.id)

    def fail(self, death: EngineDeadError, keeps_queued: bool = False) -> None:
        """End all requests, or all that are not queued."""
        for request_id, live in list(self._live.items()):
            if not (keeps_queued and request_id in self._queued):
                self._forget(request_id, "error")
                live.inbox.fail(death)

    def _running(self) -> Ranks:
        if self.ranks is None:
            raise EngineDeadError("no engine runs")
        return self.ranks

    def _register(self, request: Request, traceparent: str) -> Inbox:
        if request.id in self._live:
            raise RequestError(f"a request with the id {request.id} is running")
        now = asyncio.get_running_loop().time()
        inbox = Inbox(request, self._abort)
        self._live[request.id] = _Live(inbox, Course(request, now, traceparent=traceparent))
        self._texts.begin(request)
        num_tokens = len(request.prompt_token_ids)
        self._queued[request.id] = num_tokens
        self.num_queued_tokens += num_tokens
        self.is_empty.clear()
        return inbox

    def _begin(self, request_id: str) -> None:
        """The request does not wait any more."""
        self.num_queued_tokens -= self._queued.pop(request_id, 0)

    def _abort(self, inbox: Inbox, reason: str) -> None:
        self._forget(inbox.request.id, reason)
        self._drop(inbox.request.id)

    def _drop(self, request_id: str) -> None:
        """Tell the ranks that nobody wants the request any more."""
        if self.ranks is not None:
            with contextlib.suppress(EngineDeadError):
                self.ranks.abort(request_id)

    def _forget(self, request_id: str, reason: str = "") -> None:
        """The request has ended; `reason` is that of continuations without a finish."""
        inbox, course = self._remove(request_id)
        now = asyncio.get_running_loop().time()
        self._metrics.end(course, now, inbox.unfinished, reason)
        self._on_end(course, now)

    def _remove(self, request_id: str) -> _Live:
        self._begin(request_id)
        self._texts.drop(request_id)
        live = self._live.pop(request_id)
        if not self._live:
            self.is_empty.set()
        return live
