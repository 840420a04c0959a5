"""The interface between a front and an engine, and the client for an engine in this process.

The client for ranks in other processes is `moespan.launch.ranks.RanksClient`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from moespan.config import EngineConfig
from moespan.engine.engine import Engine
from moespan.engine.info import EngineInfo
from moespan.engine.interrupts import hold_interrupts
from moespan.engine.questions import A, Question
from moespan.engine.request import OutputDelta, Request, refusal
from moespan.errors import RequestError


class EngineClient(Protocol):
    """Requests in, deltas out. A request that the engine refuses comes back as an error delta.

    Any thread may add, abort and ask while another one receives. One thread at a time may receive,
    and none may do anything else while `reload` runs.
    """

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""

    def add(self, *requests: Request) -> None:
        """Hand over requests, of which no step sees only some; does not wait for deltas.

        Raises:
            RequestError: the requests are too large to be sent together; none was.
        """

    def abort(self, request_id: str) -> None:
        """Drop a request; at most deltas that are on their way still come."""

    def receive(self, timeout_s: float | None = None) -> list[OutputDelta]:
        """Wait for deltas; nothing after `timeout_s` seconds.

        Raises:
            EngineDeadError: the ranks are gone.
        """

    def ask(self, question: Question[A]) -> A:
        """Wait for the answer to a question, which the engine gives between two steps.

        Deltas that come meanwhile are kept for `receive`.

        Raises:
            RequestError: the engine refuses to answer, and goes on.
            EngineDeadError: the ranks are gone.
        """

    def reload(self, config: EngineConfig) -> None:
        """End the engine and build one of `config` on the same ranks; unfinished requests are lost.

        Raises:
            MoespanError: the reason why it cannot start; the ranks are gone then.
        """

    def close(self) -> None:
        """End the ranks. Idempotent."""


class LocalClient:
    """An engine in this process: it computes while `receive` waits.

    Calls from several threads take turns, each for one step at most. Ctrl-C in the main thread is
    raised after the turn, so it never cuts a step; a second Ctrl-C does, and ends the engine.

    Args:
        build: makes an engine of a config; the followers build theirs meanwhile.
        on_close: called once, after the followers are released.
    """

    def __init__(
        self,
        config: EngineConfig,
        build: Callable[[EngineConfig], Engine],
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        self._build = build
        self._engine = build(config)
        self._on_close = on_close
        self._refused: list[OutputDelta] = []
        self._queue, self._use = threading.RLock(), threading.RLock()

    def add(self, *requests: Request) -> None:
        """Queue requests."""
        with self._turn() as engine:
            for request in requests:
                try:
                    engine.add(request)
                except RequestError as error:
                    self._refused += refusal(request, error)

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        with self._turn() as engine:
            engine.abort(request_id)

    def receive(self, timeout_s: float | None = None) -> list[OutputDelta]:
        """Run steps until one brings deltas; nothing if there is no work, or time is over."""
        ends_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._turn() as engine:
                deltas, self._refused = self._refused, []
                if not deltas and engine.has_unfinished:
                    deltas = engine.step()
                if deltas or not engine.has_unfinished or time.monotonic() >= ends_s:
                    return deltas

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._engine.info

    def ask(self, question: Question[A]) -> A:
        """Answer a question after the step under way, if another thread receives."""
        with self._turn() as engine:
            answer: A = engine.answer(question)
        return answer

    def reload(self, config: EngineConfig) -> None:
        """Replace the engine by one of `config`."""
        with self._turn() as engine:
            engine.close(config)
            self._engine = self._build(config)

    def close(self) -> None:
        """Release the followers. Idempotent."""
        with self._turn() as engine:
            engine.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[Engine]:
        """The engine, for this thread only. Ctrl-C waits until the turn is over.

        One lock would not be fair: a thread that runs step after step would take it again before
        another thread wakes up. With two, the next thread holds the queue until its turn comes.
        """
        with hold_interrupts():
            with self._queue:
                self._use.acquire()
            try:
                yield self._engine
            finally:
                self._use.release()
