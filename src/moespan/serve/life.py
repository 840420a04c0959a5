"""`Life`: the engine behind the server, over all its lives.

The ranks may die; the server does not. `Life` starts the ranks, admits requests or refuses them,
fails those that die with the ranks, starts the ranks again, and drains. `LiveRequests` has the
requests.

| state | what holds |
|---|---|
| starting | the ranks of the first life load the model |
| ready | requests are taken and answered |
| overloaded | as ready, but the queue is full: new requests are refused |
| recovering | the ranks have died; new ones start |
| draining | nothing new is taken; running requests have `drain_timeout_s` to finish |
| ended | no rank is left |

All methods belong to one event loop. All times are of its clock, which no clock of the day moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from moespan import log
from moespan.config import EngineOptions
from moespan.engine.info import EngineInfo, Pulse
from moespan.engine.questions import Question
from moespan.engine.request import OutputDelta, Request
from moespan.errors import EngineDeadError, MoespanError
from moespan.parallel.beats import Place
from moespan.serve.inbox import CutOffError, Inbox
from moespan.serve.live_requests import LiveRequests, OnNews, Ranks
from moespan.serve.metrics import Course, Metrics
from moespan.serve.options import LifeOptions
from moespan.serve.signs import LOOK_S, Signs
from moespan.text.tokenizer import Tokenizer

CACHES_QUEUED = 16
"""Default of `max_queued_tokens`, in KV caches."""

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 1.0, 60.0
_RETRY_FULL_S = 5
_RETRY_AWAY_S = 5  # draining: by then a load balancer knows another server
_RETRY_START_S = 10  # while no start has been measured

A = TypeVar("A")
T = TypeVar("T")


class State(enum.Enum):
    """The states of the first table; the value is the word for clients and operators."""

    STARTING = "starting"
    READY = "ready"
    OVERLOADED = "overloaded"
    RECOVERING = "recovering"
    DRAINING = "draining"
    ENDED = "ended"


class Unavailable(MoespanError):  # noqa: N818 (a state of the server, not a fault)
    """A request that cannot be taken now.

    Attributes:
        status: of the HTTP answer.
        code: `starting`, `engine_dead`, `draining` or `queue_full`.
        retry_after_s: seconds after which another try is sensible.
    """

    def __init__(self, status: int, code: str, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s


class Life:
    """The engine behind the server, over all its lives.

    Args:
        start: starts the ranks; may be cancelled. Every delta and pulse of these ranks goes to its
            argument, on the event loop.
        metrics: hears of requests and of the engine.
        tokenizer: makes the texts of outputs; None makes none.
        step_timeout_s: that of the engine.
        on_end: called with each request that has ended, and the time.

    Attributes:
        metrics: those given.
        info: facts about the newest engine; None before the first is ready.
        pulse: what the running engine told last about itself; None while none runs.
        last_error: why the last life ended; None while no life has ended.
        num_restarts: lives after the first.
    """

    def __init__(
        self,
        start: Callable[[OnNews], Awaitable[Ranks]],
        options: LifeOptions,
        metrics: Metrics,
        tokenizer: Tokenizer | None = None,
        step_timeout_s: float = EngineOptions.step_timeout_s,
        on_end: Callable[[Course, float], object] = lambda course, now: None,
    ) -> None:
        self._start = start
        self._options = options
        self.metrics = metrics
        self._step_timeout_s = step_timeout_s
        self.info: EngineInfo | None = None
        self.pulse: Pulse | None = None
        self.last_error: MoespanError | None = None
        self.num_restarts = 0
        self._phase = State.STARTING
        self._signs: Signs | None = None
        self._requests = LiveRequests(metrics, tokenizer, on_end)
        self._restarts: deque[float] = deque()  # times of those within the window
        self._restart_reason = ""  # one of `metrics.RESTART_REASONS`
        self._back_at: float | None = None  # when the next life is expected to be ready
        self._start_s: float | None = None  # how long the last start took
        self._away_since = asyncio.get_running_loop().time()
        self._is_draining = asyncio.Event()
        self._is_forced = asyncio.Event()

    # For the handlers of requests.

    @property
    def state(self) -> State:
        """See the table above."""
        if self._phase is State.READY and self._refusal_of_queue(1, 0) is not None:
            return State.OVERLOADED
        return self._phase

    @property
    def reason(self) -> str:
        """One word why nothing should be sent here now; empty if all is well."""
        state = self.state
        if state in (State.READY, State.OVERLOADED) and self.trouble:
            return "stalled"
        return "" if state is State.READY else state.value

    @property
    def trouble(self) -> str:
        """Which rank of the running engine shows no sign of life, in words; empty if all do."""
        return "" if self._signs is None else self._signs.trouble

    @property
    def beat_ages_s(self) -> dict[int, float]:
        """For each known rank of the running engine, seconds since it was last seen to run."""
        return {} if self._signs is None else self._signs.ages_s

    @property
    def silence_s(self) -> float:
        """Seconds since the leader's last word; infinite while no engine runs."""
        ranks = self._requests.ranks
        return math.inf if ranks is None else asyncio.get_running_loop().time() - ranks.heard_at

    @property
    def away_s(self) -> float:
        """Seconds since no engine has run: since its death, or since this object was made."""
        return asyncio.get_running_loop().time() - self._away_since

    def places(self) -> list[Place]:
        """Where the ranks are; empty while no engine runs."""
        return [] if self._requests.ranks is None else self._requests.ranks.places()

    @property
    def is_forced(self) -> bool:
        """Whether `force` has been called."""
        return self._is_forced.is_set()

    @property
    def num_live(self) -> int:
        """Requests that the engine has not finished."""
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        """Requests that wait for their first delta."""
        return self._requests.num_queued

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of requests that wait for their first delta."""
        return self._requests.num_queued_tokens

    def submit(self, request: Request) -> Inbox:
        """Register a request and hand it over; see `submit_all`."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request], traceparent: str = "") -> list[Inbox]:
        """Register requests and hand them over: all or none, in one step that nothing can cancel.

        Close every inbox in the end; closing aborts requests that are unfinished.

        Args:
            traceparent: the client's trace; empty for none.

        Raises:
            Unavailable: the server is not ready, or its queue is full.
            RequestError: a request cannot be sent, or its id is in use.
        """
        try:
            self._check_open(requests)
            try:
                return self._requests.hand_over(requests, traceparent)
            except EngineDeadError:
                raise self._away() from None
        except Unavailable as unavailable:
            self.metrics.reject(unavailable.code)
            raise

    async def ask(self, question: Question[A]) -> A:
        """The running engine's answer to a question, which comes after the steps in flight.

        Raises:
            Unavailable: no engine runs, or it dies before it answers.
            RequestError: the engine refuses to answer.
        """
        ranks = self._requests.ranks
        if ranks is None:
            self._check_open([])
            raise self._away()
        try:
            return await ranks.ask(question)
        except EngineDeadError:
            raise self._away() from None

    # For the program.

    async def run(self) -> None:
        """Keep an engine alive until `drain` or `force` has ended it.

        Raises:
            MoespanError: the first engine cannot start, or there were too many restarts.
        """
        over = asyncio.create_task(self._wait_until_over())
        try:
            await self._live_on(over)
        finally:
            over.cancel()
            self._requests.fail(CutOffError("the engine does not run any more"))
            self._phase = State.ENDED

    def drain(self) -> None:
        """Take no more requests; `run` returns when the live ones are finished or out of time."""
        if self._phase is not State.ENDED:
            self._phase = State.DRAINING
        self._is_draining.set()

    def force(self) -> None:
        """End now: live requests fail, and `run` returns within the bound of `Ranks.close`."""
        self.drain()
        self._is_forced.set()

    # Lives. `over` is done when draining has ended; nothing else cancels what runs here.

    async def _live_on(self, over: asyncio.Task[None]) -> None:
        """One life after the other, until `over`, or until draining leaves nothing to do."""
        cause = await self._live_once(over)
        while cause is not None and (self._requests or not self._is_draining.is_set()):
            await self._back_off(cause, over)
            if over.done():
                return
            self.num_restarts += 1
            try:
                cause = await self._live_once(over)
            except MoespanError as error:
                cause = error
                self._note(error, "cannot start")
                self._restart_reason = "start_failed"

    async def _live_once(self, over: asyncio.Task[None]) -> MoespanError | None:
        """Start ranks and serve until they are dead; returns the cause, or None if `over` is done.

        Raises:
            MoespanError: they do not start.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        is_over = False

        def take_in(deltas: list[OutputDelta], pulse: Pulse | None) -> None:
            if is_over:
                return
            if pulse is not None:
                self.pulse = pulse
                self.metrics.pulse(pulse)
            self._requests.take_in(deltas)

        ranks = await _unless(over, self._start(take_in))
        if ranks is None:
            return None
        self._start_s, self.info = loop.time() - began, ranks.info
        self.metrics.start(ranks.info)
        if self.num_restarts:
            log.logger.info("the engine is ready again, after %.0f s", self.away_s)
        try:
            self._resume(ranks)
            self._restart_reason = "died"
            cause = await _unless(over, self._wait_dead(ranks))
            if cause is not None:
                self._mourn(cause)
        finally:
            is_over = True
            self._away_since = loop.time()
            self._requests.ranks = self._signs = self.pulse = None
            self.metrics.stop()
            await ranks.close()
        return cause

    async def _wait_dead(self, ranks: Ranks) -> MoespanError:
        """The cause, when the ranks are dead, or when their leader has been silent for too long."""
        signs = Signs(self._step_timeout_s, asyncio.get_running_loop().time)
        self._signs = signs
        dead = asyncio.ensure_future(ranks.wait_dead())
        try:
            while not (await asyncio.wait((dead,), timeout=LOOK_S))[0]:
                signs.look(ranks.places(), ranks.heard_at, bool(self._requests))
                self.metrics.beats(signs.ages_s)
                if signs.is_lost:
                    self._restart_reason = "silent"
                    return EngineDeadError(f"{signs.trouble}, and its agent does not know why")
            return dead.result()
        finally:
            dead.cancel()

    def _resume(self, ranks: Ranks) -> None:
        """Take requests again, after those that were kept over a restart."""
        self._requests.ranks, self._back_at = ranks, None
        with contextlib.suppress(EngineDeadError):  # `wait_dead` tells
            self._requests.hand_over_again()
        if self._phase is not State.DRAINING:
            self._phase = State.READY

    def _mourn(self, cause: MoespanError) -> None:
        """The ranks are dead: fail the requests that died with them."""
        self._note(cause, "has died")
        if self._phase is not State.DRAINING:
            self._phase = State.RECOVERING
        death = EngineDeadError(f"the engine has died: {cause}")
        self._requests.fail(death, keeps_queued=self._options.retry_unstarted)

    def _note(self, cause: MoespanError, what: str) -> None:
        """Log, once, what ended a life: the rank, its place, and the traceback."""
        self.last_error = cause
        log.logger.error("the engine %s: %s", what, cause)

    async def _back_off(self, cause: MoespanError, over: asyncio.Task[None]) -> None:
        """Wait before the next start; the longer, the more there were.

        Raises:
            MoespanError: the cause, if there were too many.
        """
        loop = asyncio.get_running_loop()
        window_s, most = self._options.restart_window_s, self._options.max_restarts
        while self._restarts and loop.time() - self._restarts[0] > window_s:
            self._restarts.popleft()
        if len(self._restarts) >= most:
            log.logger.error(
                "the engine does not start again after %d restarts within %g s "
                "(--max-restarts, --restart-window)",
                len(self._restarts),
                window_s,
            )
            raise cause
        self._restarts.append(loop.time())
        self.metrics.restart(self._restart_reason)
        wait_s = min(_FIRST_BACKOFF_S * 2 ** (len(self._restarts) - 1), _LONGEST_BACKOFF_S)
        self._back_at = loop.time() + wait_s + (self._start_s or _RETRY_START_S)
        log.logger.info(
            "the engine starts again in %g s; restart %d of at most %d within %g s",
            wait_s,
            len(self._restarts),
            most,
            window_s,
        )
        await asyncio.wait((over,), timeout=wait_s)

    async def _wait_until_over(self) -> None:
        """Return when a drain has ended: nothing live, out of time, or forced."""
        await self._is_draining.wait()
        ends = [
            asyncio.create_task(end.wait()) for end in (self._requests.is_empty, self._is_forced)
        ]
        try:
            await asyncio.wait(
                ends,
                timeout=self._options.drain_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for task in ends:
                task.cancel()
        self._requests.fail(CutOffError("the server ends before the request is finished"))

    # Admission.

    def _check_open(self, requests: Sequence[Request]) -> None:
        if self._phase is State.STARTING:
            raise Unavailable(
                503, "starting", "the engine is starting; try again later", self._retry_after_s
            )
        if self._phase in (State.DRAINING, State.ENDED):
            raise Unavailable(
                503, "draining", "the server ends and takes no more requests", _RETRY_AWAY_S
            )
        if self._phase is State.RECOVERING:
            raise self._away()
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        message = self._refusal_of_queue(len(requests), num_tokens)
        if message is not None:
            raise Unavailable(429, "queue_full", message, _RETRY_FULL_S)

    def _away(self) -> Unavailable:
        message = "the engine has died and is being started again; try again later"
        return Unavailable(503, "engine_dead", message, self._retry_after_s)

    @property
    def _retry_after_s(self) -> int:
        """Whole seconds until the engine is expected to be ready."""
        if self._back_at is None:
            return _RETRY_START_S
        return max(1, math.ceil(self._back_at - asyncio.get_running_loop().time()))

    def _refusal_of_queue(self, num_requests: int, num_tokens: int) -> str | None:
        """Why so many more requests have no room in the queue; None if they have.

        An empty queue takes any request.
        """
        if not self._requests.num_queued:
            return None
        most_requests, most_tokens = self._options.max_queued_requests, self._most_queued_tokens
        for name, queued, more, most in (
            ("queued requests", self.num_queued, num_requests, most_requests),
            ("queued prompt tokens", self.num_queued_tokens, num_tokens, most_tokens),
        ):
            if queued + more > most:
                return f"the queue is full: {queued} {name}, at most {most}; try again later"
        return None

    @property
    def _most_queued_tokens(self) -> int:
        if self._options.max_queued_tokens is not None:
            return self._options.max_queued_tokens
        assert self.info is not None
        return CACHES_QUEUED * self.info.layout.dp * self.info.num_blocks * self.info.block_size


async def _unless(over: asyncio.Task[None], work: Awaitable[T]) -> T | None:
    """The result of `work`; None, after its cancellation, if `over` is done first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, over), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
    return None if task.cancelled() else task.result()
