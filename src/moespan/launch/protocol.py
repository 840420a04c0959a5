"""The messages between front and leader, and their frames on a local socket.

A frame is a length of four bytes (big-endian) and one message in msgpack. `Framing` turns messages
into bytes and back. `Connection` is a socket for threads; `async_ranks` has one for an event loop.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
from typing import Any, Generic, TypeVar

import msgspec

from moespan.config import EngineConfig
from moespan.engine.info import EngineInfo, Pulse
from moespan.engine.questions import AnyQuestion
from moespan.engine.request import OutputDelta, Request
from moespan.errors import EngineDeadError, RequestError

# The largest message is one step's prompt logits: 5,000 rows of 102,400 float32 are just below.
MAX_FRAME_BYTES = 2**31

_HEADER_BYTES = 4
_READ_BYTES = 2**20


class Add(msgspec.Struct, frozen=True, tag=True):
    """Front to leader: start these requests, in this order and before the next step."""

    requests: list[Request]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Front to leader: drop this request."""

    request_id: str


class Reload(msgspec.Struct, frozen=True, tag=True):
    """Front to leader: end this engine and build one of this config on the same ranks."""

    config: EngineConfig


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Front to leader: answer this question; `number` comes back with the answer."""

    number: int
    question: AnyQuestion


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Leader to front, once for each engine: the model is loaded."""

    info: EngineInfo


class News(msgspec.Struct, frozen=True, tag=True):
    """Leader to front: the deltas of a step, and the state of the engine.

    The leader also sends news without deltas: after messages of the front, and `PULSE_S` after the
    last news. Only a step that lasts longer delays them.
    """

    deltas: list[OutputDelta]
    pulse: Pulse


class Answered(msgspec.Struct, frozen=True, tag=True):
    """Leader to front: the answer to a question.

    Attributes:
        number: that of the question.
        answer: in msgpack, of the question's `answer_type`; empty if it is refused.
        refusal: why there is no answer.
    """

    number: int
    answer: bytes = b""
    refusal: str | None = None


FromFront = Add | Abort | Reload | Ask
FromLeader = Ready | News | Answered

Received = TypeVar("Received")


class PeerGoneError(Exception):
    """The other end has closed or died, and everything that it had sent has been read."""


class Framing(Generic[Received]):
    """Messages to bytes, and bytes as they come to messages.

    Args:
        received: the union of the messages that the other end sends.
    """

    def __init__(self, received: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)
        self._incoming = bytearray()

    def frame(self, message: msgspec.Struct) -> bytearray:
        """The frame of a message.

        Raises:
            RequestError: the message is larger than a frame may be.
        """
        frame = bytearray(_HEADER_BYTES)
        msgspec.msgpack.Encoder().encode_into(message, frame, _HEADER_BYTES)
        size_bytes = len(frame) - _HEADER_BYTES
        if size_bytes > self._max_frame_bytes:
            raise RequestError(
                f"a message of {size_bytes} bytes exceeds the limit of {self._max_frame_bytes}"
            )
        frame[:_HEADER_BYTES] = size_bytes.to_bytes(_HEADER_BYTES, "big")
        return frame

    def feed(self, data: bytes | bytearray) -> None:
        """Take in bytes from the other end."""
        self._incoming += data

    def take(self) -> list[Received]:
        """The messages that are complete; the rest stays.

        Raises:
            EngineDeadError: a frame is longer than the limit.
        """
        messages = []
        while len(self._incoming) >= _HEADER_BYTES:
            size_bytes = int.from_bytes(self._incoming[:_HEADER_BYTES], "big")
            if size_bytes > self._max_frame_bytes:
                raise EngineDeadError(
                    f"a frame of {size_bytes} bytes exceeds the limit of {self._max_frame_bytes}"
                )
            end = _HEADER_BYTES + size_bytes
            if len(self._incoming) < end:
                break
            with memoryview(self._incoming) as view:
                messages.append(self._decoder.decode(view[_HEADER_BYTES:end]))
            del self._incoming[:end]
        return messages


class Connection(Generic[Received]):
    """One end of the socket. Only `receive` blocks, up to its timeout.

    Any thread may send; one thread at a time may receive. Bytes that do not fit into the socket
    are kept and sent by later calls of `send` or `receive`; a `receive` that waits wakes for them.
    """

    def __init__(
        self, sock: socket.socket, received: Any, max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        """Talk over `sock`; `received` is the union of the messages that the other end sends."""
        sock.setblocking(False)
        self._socket = sock
        self._framing: Framing[Received] = Framing(received, max_frame_bytes)
        self._outgoing = bytearray()
        self._outgoing_lock = threading.Lock()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._peer_reads = True
        self._peer_writes = True

    @property
    def is_behind(self) -> bool:
        """Whether the other end has not read for so long that messages wait here."""
        return bool(self._outgoing)

    def send(self, message: msgspec.Struct) -> None:
        """Send without waiting.

        Raises:
            RequestError: the message is larger than a frame may be; nothing was sent.
            PeerGoneError: the other end has gone.
        """
        frame = self._framing.frame(message)
        with self._outgoing_lock:
            self._outgoing += frame
        self._flush()
        if not self._peer_reads:
            raise PeerGoneError
        if self._outgoing:
            with contextlib.suppress(BlockingIOError):  # there are enough calls already
                self._wake.send(b"\0")

    def receive(self, timeout_s: float | None) -> list[Received]:
        """All messages that have come; [] if none comes within `timeout_s`.

        Raises:
            PeerGoneError: the other end has gone.
            EngineDeadError: a frame is longer than the limit.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            remaining_s = max(0.0, deadline - time.monotonic())
            self._flush()
            self._read(remaining_s)
            messages = self._framing.take()
            if messages or (remaining_s == 0 and self._peer_writes):
                return messages
            if not self._peer_writes:
                raise PeerGoneError

    def close(self) -> None:
        """End the connection, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):  # the other end has closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        for sock in (self._socket, self._wake, self._woken):
            sock.close()

    def _flush(self) -> None:
        with self._outgoing_lock:
            while self._outgoing and self._peer_reads:
                try:
                    sent_bytes = self._socket.send(self._outgoing)
                except BlockingIOError:
                    return
                except OSError:
                    self._peer_reads = False
                else:
                    del self._outgoing[:sent_bytes]

    def _read(self, wait_s: float) -> None:
        """Take in what has come. Waits for it, for a call of `_wake`, or for room to send."""
        try:
            self._wait(wait_s)
            while data := self._socket.recv(_READ_BYTES):
                self._framing.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError):  # ValueError: closed by another thread of this process
            pass
        self._peer_writes = False

    def _wait(self, wait_s: float) -> None:
        poll = select.poll()
        writing = self._outgoing and self._peer_reads
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if writing else 0))
        poll.register(self._woken, select.POLLIN)
        ready = poll.poll(None if wait_s == math.inf else math.ceil(wait_s * 1000))
        if any(descriptor == self._woken.fileno() for descriptor, _ in ready):
            self._woken.recv(_READ_BYTES)
