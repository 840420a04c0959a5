"""HTTP/1.1 on a connection: uvicorn's protocol with limits in time and number.

| limit | otherwise |
|---|---|
| headers and body of a request arrive within `read_timeout_s` | 408, and the connection closes |
| a client reads something within `write_timeout_s` while data waits for it | it is dropped |
| at most `max_connections` at a time | 503 |
| what is not HTTP, or has headers without end | 400 or 431, in the envelope of all errors |
| a request tells its length once: `Content-Length` or `Transfer-Encoding` | 400, and it closes |

A refusal may come while the client still sends. A socket that is closed with data unread is reset,
and the client may never see the answer. So such a connection *lingers*: it says that nothing more
comes, reads on within bounds, and keeps nothing.

A client may close its side of the connection once its request is out, and still read. To this side
that looks like a client that has gone. The two differ when something is sent: who has gone answers
with a reset. So the server sends `100 Continue`, which every client has to skip, and looks.
"""

from __future__ import annotations

import asyncio
import select
import socket
import sys
from collections import deque
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from moespan.serve.edge import OTHER, OnEnd
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal

_RETRY_S = 2
_LINGER_S, _LINGER_SILENT_S = 30.0, 2.0
"""How long a connection lingers at most, and while nothing comes."""

_LINGER_BODIES = 4
"""Bytes that a connection takes while it lingers, in bodies of the largest size."""

_PEER_LOOK_S = 0.1

_BEGUN_AT_ONCE = 8


class _TwoLengthsError(h11.RemoteProtocolError):
    """A request has `Content-Length` and `Transfer-Encoding`."""


class _Connection(h11.Connection):
    """h11's connection, which refuses a request of two lengths.

    A proxy may go by one length and a server by the other. The client could then hide a second
    request in the body of the first (RFC 9112, section 6.1: request smuggling).
    """

    def next_event(self) -> Any:
        """The next event; raises `_TwoLengthsError`."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name.lower() for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise _TwoLengthsError("Content-Length and Transfer-Encoding exclude each other")
        return event


class Turns:
    """Begins a few requests in each turn of the event loop, in the order in which they came.

    Otherwise hundreds that arrive together would begin in one turn, and probes would wait for all.
    """

    def __init__(self) -> None:
        self._waiting: deque[Wire] = deque()

    def take(self, wire: Wire) -> None:
        """Let `wire` begin its request in a turn that is near."""
        if not self._waiting:
            wire.loop.call_soon(self._turn)
        self._waiting.append(wire)

    def _turn(self) -> None:
        for _ in range(min(_BEGUN_AT_ONCE, len(self._waiting))):
            wire = self._waiting.popleft()
            wire.begin()
        if self._waiting:
            wire.loop.call_soon(self._turn)


class _Transport:
    """The transport as uvicorn sees it: `close` asks the protocol."""

    def __init__(self, transport: asyncio.Transport, protocol: Wire) -> None:
        self._transport = transport
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._protocol.close()

    def is_closing(self) -> bool:
        return self._protocol.is_lingering or self._transport.is_closing()


class Wire(H11Protocol):
    """One connection.

    Args:
        on_end: called for refusals that the application does not hear of.

    Attributes:
        is_lingering: what arrives is read and dropped; see above.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        options: ServeOptions,
        turns: Turns,
        on_end: OnEnd,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Connection(h11.SERVER, options.max_header_kib << 10)
        self._options = options
        self._on_end = on_end
        self._turns = turns
        self._held = b""  # the first bytes of a request that waits for its turn
        self._reading: asyncio.TimerHandle | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._socket_transport: asyncio.Transport = None  # type: ignore[assignment]
        self.is_lingering = False
        self._linger_until = 0.0
        self._lingering: asyncio.TimerHandle | None = None
        self._linger_bytes = options.max_body_mib * _LINGER_BODIES << 20
        self._looking: asyncio.TimerHandle | None = None
        self._has_data = False  # of a request that is not complete
        self._unread_bytes = 0
        self._unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        self._socket_transport = transport
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self._options.max_connections:
            self._refuse(
                Refusal(
                    503,
                    f"the server has {self._options.max_connections} connections "
                    "(--max-connections); try again later",
                    code="too_many_connections",
                    retry_after_s=_RETRY_S,
                ),
                linger_s=_LINGER_SILENT_S,
            )
            return
        self._start_reading()
        self._unread_since = self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_reading()
        for timer in (self._watching, self._lingering, self._looking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        if self.conn.their_state is h11.IDLE and data.startswith(b"POST"):
            self._has_data = True
            self._held = data
            self.flow.pause_reading()
            self._turns.take(self)
        else:
            self._read(data)

    def begin(self) -> None:
        """The turn of this connection has come."""
        held, self._held = self._held, b""
        if not self._socket_transport.is_closing():
            self.flow.resume_reading()
            self._read(held)

    def _read(self, data: bytes) -> None:
        if self.is_lingering:
            self._linger_on(len(data))
            return
        self._has_data = True
        super().data_received(data)
        self._follow_reading()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more; returns whether the connection stays open."""
        cycle = self.cycle
        waits = cycle is not None and not (cycle.more_body or cycle.response_started)
        if not waits or self.is_lingering or self.scheme == "https":
            return False
        cycle.keep_alive = False  # the answer closes the connection
        if self.scope["method"] == "POST":  # other answers come at once
            if self.scope["http_version"] != "1.1":  # HTTP/1.0 has no 100
                return False
            going_on = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self._socket_transport.write(self.conn.send(going_on) or b"")
        self._look_for_peer()
        return True

    def _look_for_peer(self) -> None:
        """Drop the connection if the client has closed it altogether."""
        if _is_reset(self._socket_transport.get_extra_info("socket")):
            self._socket_transport.abort()
        else:
            self._looking = self.loop.call_later(_PEER_LOOK_S, self._look_for_peer)

    def close(self) -> None:
        """Close, once the answer is out; linger if the request is not complete."""
        if self.conn.their_state is h11.SEND_BODY and not self.is_lingering:
            self._linger(_LINGER_S)
        else:
            self._socket_transport.close()

    def on_response_complete(self) -> None:
        """An answer is sent; the next request may have come already."""
        super().on_response_complete()
        self._follow_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        error = sys.exc_info()[1]
        if isinstance(error, _TwoLengthsError):
            self._refuse(Refusal(400, f"{error}; send one of them"))
        elif getattr(error, "error_status_hint", 400) == 431:
            most = self._options.max_header_kib << 10
            self._refuse(Refusal(431, f"the headers have more than {most} bytes"))
        else:
            self._refuse(Refusal(400, "this is not a valid HTTP/1.1 request"))

    # Reading.

    def _start_reading(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(self._options.read_timeout_s, self._end_reading)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _follow_reading(self) -> None:
        """Let the time run while a request is incomplete."""
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._start_reading()
            return
        if state is not h11.IDLE:  # the request is complete, or the client has finished
            self._has_data = False
            self._stop_reading()
        elif self.conn.trailing_data[0]:
            self._start_reading()

    def _end_reading(self) -> None:
        """Time has run out for the request that is incomplete, or that never came."""
        self._reading = None
        if self.transport.is_closing():
            return
        if not self._has_data:
            self.transport.close()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whatever the application still says
            self.scope["state"]["status"] = 408
            self.cycle.message_event.set()
        seconds = self._options.read_timeout_s
        self._refuse(Refusal(408, f"the request did not arrive within {seconds:g} s"))

    # Writing.

    def _watch(self) -> None:
        """Drop a client that has read nothing for too long while data waits for it."""
        now, unread_bytes = self.loop.time(), self.transport.get_write_buffer_size()
        is_growing = not self.flow.write_paused and not self.transport.is_closing()
        if unread_bytes == 0 or unread_bytes < self._unread_bytes or is_growing:
            self._unread_since = now
        self._unread_bytes = unread_bytes
        if now - self._unread_since >= self._options.write_timeout_s:
            self.transport.abort()
            return
        self._watching = self.loop.call_later(self._options.write_timeout_s / 4, self._watch)

    def _refuse(self, refusal: Refusal, linger_s: float = _LINGER_S) -> None:
        """Answer without the application, and close when the client has, or soon after."""
        self._stop_reading()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way
            self.transport.abort()
            return
        if self.cycle is None or self.cycle.response_complete:
            self._on_end(OTHER, refusal.status)
        body = refusal.body
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *((name.encode(), value.encode()) for name, value in refusal.headers.items()),
        ]
        reason = STATUS_PHRASES[refusal.status]
        for event in (
            h11.Response(status_code=refusal.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._linger(linger_s)

    # Lingering.

    def _linger(self, most_s: float) -> None:
        """Say that nothing more comes, and drop what arrives, until the client closes."""
        self.is_lingering = True
        self._linger_until = self.loop.time() + most_s
        if self._socket_transport.can_write_eof():  # TLS cannot
            self._socket_transport.write_eof()
        self.flow.resume_reading()
        self._linger_on(0)

    def _linger_on(self, num_bytes: int) -> None:
        self._linger_bytes -= num_bytes
        if self._lingering is not None:
            self._lingering.cancel()
        left_s = min(self._linger_until - self.loop.time(), _LINGER_SILENT_S)
        if left_s <= 0 or self._linger_bytes < 0:
            self._socket_transport.close()
        else:
            self._lingering = self.loop.call_later(left_s, self._socket_transport.close)


def _is_reset(sock: socket.socket) -> bool:
    """Whether the peer has closed both directions, as far as this side has heard."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)  # POLLHUP and POLLERR are always told
    return bool(poll.poll(0))
