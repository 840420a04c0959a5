"""The client for ranks in processes of their own: starts them, sends requests, receives deltas.

Imports no torch, so that the user's process starts fast.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import cast

import msgspec

from moespan.config import EngineConfig, Nodes
from moespan.engine.info import EngineInfo
from moespan.engine.interrupts import hold_interrupts
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
    Connection,
    FromFront,
    FromLeader,
    News,
    PeerGoneError,
    Ready,
    Reload,
)
from moespan.parallel.beats import Place

_ONE_NODE = Nodes()

_LONGEST_WAIT_S = 0.5  # between two looks at the agent


class RanksClient:
    """The ranks of one engine, in processes of their own.

    Any thread may call any method; only one at a time may `receive`, and none may do anything else
    while `reload` runs. One of the threads that wait, in `receive` or `ask`, reads the socket for
    all of them. The ranks never outlive this process, however it ends, and its signals and its
    Ctrl-C do not reach them.

    Bounds: `start_timeout_s` for the start; `EngineDeadError` within 10 s of the death of a rank;
    12 s for `close`, most of it only if ranks do not answer. The answer to `ask` comes after the
    steps in flight. While a thread waits in `receive` or `ask`, `EngineDeadError` also comes within
    10 s of a stop of a rank or of the agent, and soon after `config.step_timeout_s` without
    progress in a step (`moespan.launch.stall`).
    """

    def __init__(
        self,
        config: EngineConfig,
        start_timeout_s: float | None = None,
        *,
        nodes: Nodes = _ONE_NODE,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        """Start the ranks and wait until the model is loaded.

        Args:
            config: what to run, on as many ranks as its layout has.
            start_timeout_s: most seconds to wait; None for `START_TIMEOUT_S`.
            nodes: the machines to run on; this one is node 0. The others run `serve_node`.
            program: arguments of Python in each rank.

        Raises:
            LayoutError: the nodes cannot have equally many ranks.
            MeetingError: the nodes did not come together.
            MoespanError: the error that a rank raised on purpose while loading.
            EngineDeadError: a rank died otherwise (with its traceback), or the time is over.
        """
        deadline = time.monotonic() + (start_timeout_s or START_TIMEOUT_S)
        cleanup = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, only_here(cleanup.close))
        self._death: MoespanError | None = None
        self._numbers = itertools.count()
        # The waiting threads share the next three attributes, under the lock of `_arrived`.
        self._arrived = threading.Condition()
        self._is_being_read = False
        self._deltas: list[OutputDelta] = []
        self._answers: dict[int, Answered | None] = {}  # by number; None until it comes
        try:
            self._agent = AgentProcess(config, nodes, program, cleanup)
            sock = self._accept_leader(deadline)
            self._connection: Connection[FromLeader] = Connection(sock, FromLeader)
            cleanup.callback(self._connection.close)
            cleanup.callback(self._agent.announce_end)
            self.info = self._wait_until_ready(deadline)
        except BaseException:
            self.close()
            raise

    def add(self, *requests: Request) -> None:
        """Send requests; returns at once. A refused request comes back as error deltas.

        Raises:
            RequestError: the requests are too large to be sent together; none was.
            EngineDeadError: the client knows that the ranks are gone.
        """
        self._send(Add(list(requests)))

    def abort(self, request_id: str) -> None:
        """Tell the engine to drop a request; returns at once.

        Raises:
            EngineDeadError: the client knows that the ranks are gone.
        """
        self._send(Abort(request_id))

    def receive(self, timeout_s: float | None = None) -> list[OutputDelta]:
        """Wait for deltas: at least one, or [] when `timeout_s` is over.

        Raises:
            EngineDeadError: the ranks died; has the traceback of the first one that failed. All
                deltas that they had sent before have been received.
        """
        with self._arrived:
            self._wait_for(lambda: bool(self._deltas), timeout_s)
            deltas, self._deltas = self._deltas, []
        return deltas

    def ask(self, question: Question[A]) -> A:
        """Wait for the answer to a question; deltas that come meanwhile are kept for `receive`.

        Raises:
            RequestError: the engine refuses to answer, and goes on.
            EngineDeadError: the ranks died.
        """
        with self._arrived:
            number = next(self._numbers)
            self._send(Ask(number, cast(AnyQuestion, question)))
            self._answers[number] = None
            try:
                self._wait_for(lambda: self._answers[number] is not None, None)
                answered = self._answers[number]
            finally:
                del self._answers[number]
        assert answered is not None  # without a timeout
        if answered.refusal is not None:
            raise RequestError(answered.refusal)
        answer: A = msgspec.msgpack.decode(answered.answer, type=question.answer_type())
        return answer

    def reload(self, config: EngineConfig, timeout_s: float | None = None) -> None:
        """End the engine and build one of `config` on the same ranks, which saves their start. The
        layout must have as many ranks; unfinished requests are lost.

        Raises:
            MoespanError, EngineDeadError: as from the constructor; the ranks are gone then.
        """
        self._send(Reload(config))
        self._deltas.clear()
        self.info = self._wait_until_ready(time.monotonic() + (timeout_s or START_TIMEOUT_S))

    def places(self) -> list[Place]:
        """Where each rank of this node is in its work, without asking the ranks."""
        return self._agent.places()

    def close(self) -> None:
        """End all ranks and remove their directory. Idempotent. A second Ctrl-C kills the ranks."""
        with hold_interrupts():
            self._death = self._death or EngineDeadError("the engine is closed")
            self._finalizer()

    def __enter__(self) -> RanksClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_for(self, has_come: Callable[[], bool], timeout_s: float | None) -> None:
        """Wait until `has_come`, or until `timeout_s` is over; called with the lock of `_arrived`.

        The first thread that waits reads for all others, without the lock, and wakes them after
        each read. When its own wait is over, one of them goes on reading.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        has_looked = False
        while not has_come():
            self._check_alive()
            left_s = max(0.0, deadline - time.monotonic())
            if has_looked and left_s == 0:
                return
            has_looked = True
            wait_s = min(left_s, _LONGEST_WAIT_S)
            if self._is_being_read:
                self._arrived.wait(wait_s)
                continue
            self._is_being_read = True
            self._arrived.release()
            messages: list[FromLeader] = []
            try:
                messages = self._read(wait_s)
            finally:
                self._arrived.acquire()
                self._is_being_read = False
                self._sort(messages)
                self._arrived.notify_all()

    def _read(self, timeout_s: float) -> list[FromLeader]:
        try:
            self._agent.check()
            return self._connection.receive(timeout_s)
        except EngineDeadError as death:
            self._death = death
            raise
        except PeerGoneError:
            # If another thread closes the client meanwhile, that is the cause.
            self._death = self._death or self._agent.learn_death(starting=False)
            raise self._death from None

    def _sort(self, messages: list[FromLeader]) -> None:
        for message in messages:
            if isinstance(message, News):
                self._deltas += message.deltas
            elif isinstance(message, Answered) and message.number in self._answers:
                self._answers[message.number] = message

    def _send(self, message: FromFront) -> None:
        self._check_alive()
        with contextlib.suppress(PeerGoneError):  # `receive` finds the cause
            self._connection.send(message)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death

    def _accept_leader(self, deadline: float) -> socket.socket:
        listener = self._agent.listener
        listener.settimeout(0.1)
        try:
            while True:
                self._agent.check_start(deadline)
                with contextlib.suppress(TimeoutError):
                    return listener.accept()[0]
        except BaseException:
            self._agent.terminate()  # ranks that load weights do not watch the socket
            raise
        finally:
            listener.close()

    def _wait_until_ready(self, deadline: float) -> EngineInfo:
        while True:
            self._agent.check_start(deadline)
            try:
                for message in self._connection.receive(_LONGEST_WAIT_S):
                    if isinstance(message, Ready):
                        return self._agent.with_binding(message.info)
            except PeerGoneError:
                raise self._agent.learn_death(starting=True) from None
