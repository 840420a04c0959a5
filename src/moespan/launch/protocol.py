"""The messages between front and leader, and their frames on a local socket.

A frame is a length of four bytes (big-endian) and one message in msgpack. Imports no torch.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from typing import Any, Generic, TypeVar

import msgspec

from moespan.config import EngineConfig
from moespan.engine.info import EngineInfo
from moespan.engine.questions import AnyQuestion
from moespan.engine.request import OutputDelta, Request
from moespan.errors import EngineDeadError, RequestError

# The largest message is one step's prompt logits: 5,000 rows of 102,400 float32 are just below.
MAX_FRAME_BYTES = 2**31

_HEADER_BYTES = 4
_READ_BYTES = 2**20
_LONGEST_POLL_S = 0.1  # the rest of another thread's message waits no longer


class Add(msgspec.Struct, frozen=True, tag=True):
    """Front to leader: start this request."""

    request: Request


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


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """Leader to front: the deltas of a step."""

    deltas: list[OutputDelta]


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
FromLeader = Ready | Deltas | Answered

Received = TypeVar("Received")


class PeerGoneError(Exception):
    """The other end has closed or died, and everything that it had sent has been read."""


class Connection(Generic[Received]):
    """One end of the socket. Only `receive` blocks, up to its timeout.

    Any thread may send; one thread at a time may receive. Bytes that do not fit into the socket
    are kept and sent by later calls of `send` or `receive`.
    """

    def __init__(
        self, sock: socket.socket, received: Any, max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        """Talk over `sock`; `received` is the union of the messages that the other end sends."""
        sock.setblocking(False)
        self._socket = sock
        self._max_frame_bytes = max_frame_bytes
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._outgoing_lock = threading.Lock()
        self._peer_reads = True
        self._peer_writes = True

    def send(self, message: msgspec.Struct) -> None:
        """Send without waiting.

        Raises:
            RequestError: the message is larger than a frame may be; nothing was sent.
            PeerGoneError: the other end has gone.
        """
        frame = bytearray(_HEADER_BYTES)
        msgspec.msgpack.Encoder().encode_into(message, frame, _HEADER_BYTES)
        size_bytes = len(frame) - _HEADER_BYTES
        if size_bytes > self._max_frame_bytes:
            raise RequestError(
                f"a message of {size_bytes} bytes exceeds the limit of {self._max_frame_bytes}"
            )
        frame[:_HEADER_BYTES] = size_bytes.to_bytes(_HEADER_BYTES, "big")
        with self._outgoing_lock:
            self._outgoing += frame
        self._flush()
        if not self._peer_reads:
            raise PeerGoneError

    def receive(self, timeout_s: float | None) -> list[Received]:
        """All messages that have come; [] if none comes within `timeout_s`.

        Raises:
            PeerGoneError: the other end has gone.
            EngineDeadError: a frame is longer than the limit.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while True:
            remaining_s = max(0.0, deadline - time.monotonic())
            self._flush()
            self._read(wait_s=min(remaining_s, _LONGEST_POLL_S))
            messages = self._take_messages()
            if messages or (remaining_s == 0 and self._peer_writes):
                return messages
            if not self._peer_writes:
                raise PeerGoneError

    def close(self) -> None:
        """End the connection, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):  # the other end has closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

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
        try:
            poll = select.poll()
            writing = self._outgoing and self._peer_reads
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if writing else 0))
            poll.poll(wait_s * 1000)
            while data := self._socket.recv(_READ_BYTES):
                self._incoming += data
        except BlockingIOError:
            return
        except (OSError, ValueError):  # ValueError: closed by another thread of this process
            pass
        self._peer_writes = False

    def _take_messages(self) -> list[Received]:
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
