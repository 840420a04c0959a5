"""The client for ranks in processes of their own, for programs with an event loop.

`ranks` has the one for threads. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar, cast

import msgspec

from moespan.config import EngineConfig, Nodes
from moespan.engine.info import EngineInfo, Pulse
from moespan.engine.questions import A, AnyQuestion, Question
from moespan.engine.request import OutputDelta, Request
from moespan.errors import EngineDeadError, MoespanError, RequestError
from moespan.forks import only_here
from moespan.launch.agent_process import PROGRAM, START_TIMEOUT_S, AgentProcess
from moespan.launch.protocol import (
    Abort,
    Add,
    Answered,
    Ask,
    Framing,
    FromFront,
    FromLeader,
    News,
    Ready,
)
from moespan.machine.binding import Binding
from moespan.parallel.beats import Place

OnNews = Callable[[list[OutputDelta], Pulse], object]

_TICK_S = 0.25  # between two looks at the agent
_ONE_NODE = Nodes()

T = TypeVar("T")


class AsyncRanks:
    """The ranks of one life of an engine, for one event loop; `start` makes it.

    All methods belong to the loop's thread. None of them blocks the loop: files and processes are
    handled in threads of the loop's default executor. The ranks never outlive this process.

    Bounds: `wait_lost` within 10 s of the death or stop of a rank or of the agent, and soon after
    `config.step_timeout_s` without progress in a step; `wait_dead` after that within seconds.

    Attributes:
        info: facts about the engine.
        binding: the cores of this node's ranks.
        pulse: the newest state of the engine; None before the first.
        has_ended_well: `close` has ended ranks that worked, on all nodes.
        heard_at: `loop.time()` of the leader's last message. While the engine runs a step the
            leader is silent, otherwise it speaks every `PULSE_S`; `places` shows both.
    """

    info: EngineInfo
    binding: Binding

    def __init__(self, on_news: OnNews) -> None:
        """Use `start`."""
        self._loop = asyncio.get_running_loop()
        self._on_news = on_news
        self._cleanup = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, only_here(self._cleanup.close))
        self._framing: Framing[FromLeader] = Framing(FromLeader)
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Answered]] = {}
        self._death: MoespanError | None = None
        self._transport: asyncio.Transport | None = None
        self._agent: AgentProcess | None = None
        self._end: asyncio.Task[MoespanError] | None = None
        self.has_ended_well = False
        self.pulse: Pulse | None = None
        self.heard_at = self._loop.time()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        nodes: Nodes = _ONE_NODE,
        on_news: OnNews,
        start_timeout_s: float | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> AsyncRanks:
        """Start the ranks and wait until the model is loaded. Cancelling it ends the ranks.

        Args:
            config: what to run, on as many ranks as its layout has.
            nodes: the machines to run on; this one is node 0. The others run `serve_node`.
            on_news: called on the loop with each message of the leader: deltas and the new pulse.
            start_timeout_s: most seconds to wait; None for `START_TIMEOUT_S`.
            program: arguments of Python in each rank.

        Raises:
            LayoutError: the nodes cannot have equally many ranks.
            MeetingError: the nodes did not come together.
            MoespanError: the error that a rank raised on purpose while loading.
            EngineDeadError: a rank died otherwise (with its traceback), or the time is over.
        """
        ranks = cls(on_news)
        try:
            await ranks._start(config, nodes, program, start_timeout_s or START_TIMEOUT_S)
        except BaseException:
            if ranks._agent is not None:
                ranks._agent.terminate()  # ranks that load weights do not watch the socket
            await ranks.close()
            raise
        return ranks

    def add(self, request: Request) -> None:
        """Send a request; never waits. A refused request comes back as error deltas.

        Raises:
            RequestError: the request is too large to be sent.
            EngineDeadError: the leader has gone.
        """
        self._send(Add([request]))

    def abort(self, request_id: str) -> None:
        """Tell the engine to drop a request; never waits. Does nothing if the leader has gone."""
        with contextlib.suppress(EngineDeadError):
            self._send(Abort(request_id))

    async def ask(self, question: Question[A]) -> A:
        """The answer to a question, which comes after the steps in flight.

        Raises:
            RequestError: the engine refuses to answer, and goes on.
            EngineDeadError: the leader has gone.
        """
        number = next(self._numbers)
        self._send(Ask(number, cast(AnyQuestion, question)))
        self._answers[number] = self._loop.create_future()
        try:
            answered = await self._answers[number]
        finally:
            del self._answers[number]
        if answered.refusal is not None:
            raise RequestError(answered.refusal)
        answer: A = msgspec.msgpack.decode(answered.answer, type=question.answer_type())
        return answer

    def places(self) -> list[Place]:
        """Where each rank is in its work, without asking the ranks."""
        return [] if self._agent is None else self._agent.places()

    async def wait_lost(self) -> None:
        """Return when the ranks can do nothing more; no news comes after that."""
        await asyncio.wait([self._lost])

    async def wait_dead(self) -> MoespanError:
        """The cause of the end, when all processes of this node's ranks have gone."""
        assert self._end is not None  # of a start that succeeded
        return await asyncio.shield(self._end)

    async def close(self, timeout_s: float = 12.0) -> None:
        """End all ranks within `timeout_s`, and remove their folder. Idempotent."""
        until = self._loop.time() + timeout_s
        if self._agent is not None:
            self._agent.announce_end()
        self._lose(EngineDeadError("the engine is closed"))
        if self._agent is not None:
            self.has_ended_well = await asyncio.to_thread(self._agent.end, timeout_s) == 0
        await asyncio.to_thread(self._finalizer)
        if self._end is not None:
            await asyncio.wait([self._end], timeout=max(until - self._loop.time(), _TICK_S))

    async def _start(
        self, config: EngineConfig, nodes: Nodes, program: Sequence[str], timeout_s: float
    ) -> None:
        deadline = time.monotonic() + timeout_s
        starting = asyncio.ensure_future(
            asyncio.to_thread(AgentProcess, config, nodes, program, self._cleanup)
        )
        try:
            self._agent = agent = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._agent = await starting
            raise
        agent.listener.setblocking(False)
        sock, _ = await self._while_alive(self._loop.sock_accept(agent.listener), agent, deadline)
        agent.listener.close()
        await self._loop.connect_accepted_socket(lambda: _Leader(self), sock)
        self.binding = agent.job.read_binding()
        self.info = agent.with_binding(await self._while_alive(self._ready, agent, deadline))
        self._end = self._loop.create_task(self._watch(agent))

    async def _while_alive(self, awaited: Awaitable[T], agent: AgentProcess, deadline: float) -> T:
        """The result of `awaited`, unless the ranks end first."""
        task = asyncio.ensure_future(awaited)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_TICK_S)
                if self._lost.done() and not task.done():
                    raise await asyncio.to_thread(agent.learn_death, True)
                if not task.done():
                    agent.check_start(deadline)
            return task.result()
        finally:
            task.cancel()

    async def _watch(self, agent: AgentProcess) -> MoespanError:
        """Wait for the end of the ranks; → its cause."""
        while not self._lost.done():
            await asyncio.wait([self._lost], timeout=_TICK_S)
            try:
                agent.check()
            except EngineDeadError as death:
                self._lose(death)
        if self._death is None:
            learnt = await asyncio.to_thread(agent.learn_death, False)
            self._death = self._death or learnt  # closed meanwhile
        await asyncio.to_thread(agent.end)
        if remaining := await asyncio.to_thread(agent.wait_until_gone):
            return EngineDeadError(
                f"{self._death}\nprocesses {remaining} of the ranks have not ended; they may hold "
                "memory of devices"
            )
        return self._death

    def _send(self, message: FromFront) -> None:
        if self._death is not None:
            raise self._death
        if self._transport is None or self._lost.done():
            raise EngineDeadError("the leader has gone")
        self._transport.write(self._framing.frame(message))

    def _hear(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        self._framing.feed(data)
        for message in self._framing.take():
            if isinstance(message, News):
                self.pulse = message.pulse
                self._on_news(message.deltas, message.pulse)
            elif isinstance(message, Ready):
                self._ready.set_result(message.info)
            elif (waiting := self._answers.get(message.number)) and not waiting.done():
                waiting.set_result(message)

    def _lose(self, cause: MoespanError | None) -> None:
        """The ranks can do nothing more; `cause` is None if only the agent knows it."""
        self._death = self._death or cause
        if self._transport is not None:
            self._transport.abort()
        if not self._lost.done():
            self._lost.set_result(None)
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(self._death or EngineDeadError("the leader has gone"))


class _Leader(asyncio.Protocol):
    """The socket to the leader."""

    def __init__(self, ranks: AsyncRanks) -> None:
        self._ranks = ranks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._ranks._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._ranks._hear(data)

    def connection_lost(self, error: Exception | None) -> None:
        cause = None
        if error is not None and not isinstance(error, OSError):  # raised by `data_received`
            name = type(error).__name__
            cause = EngineDeadError(
                f"the front cannot take in what the leader sends: {name}: {error}"
            )
        self._ranks._lose(cause)
