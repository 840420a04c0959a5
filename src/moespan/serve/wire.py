"""HTTP/1.1 on a connection: uvicorn's protocol with limits in time and number.

| limit | otherwise |
|---|---|
| headers and body of a request arrive within `read_timeout_s` | 408, and the connection closes |
| a client reads something within `write_timeout_s` while data waits for it | it is dropped |
| at most `max_connections` at a time | 503 |
| what is not HTTP, or has headers without end | 400 or 431, in the envelope of all errors |
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal

_RETRY_S = 2
_LINGER_S = 1.0


class Wire(H11Protocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        options: ServeOptions,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._options = options
        self._reading: asyncio.TimerHandle | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._is_refused = False
        self._has_data = False  # of a request that is not complete
        self._unread_bytes = 0
        self._unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > self._options.max_connections:
            self._refuse(
                Refusal(
                    503,
                    f"the server has {self._options.max_connections} connections "
                    "(--max-connections); try again later",
                    code="too_many_connections",
                    retry_after_s=_RETRY_S,
                )
            )
            return
        self._start_reading()
        self._unread_since = self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_reading()
        if self._watching is not None:
            self._watching.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        if self._is_refused:
            return
        self._has_data = True
        super().data_received(data)
        self._follow_reading()

    def on_response_complete(self) -> None:
        """An answer is sent; the next request may have come already."""
        super().on_response_complete()
        self._follow_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) == 431:
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

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the application, and close when the client has, or soon after."""
        self._stop_reading()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way
            self.transport.abort()
            return
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
        self._is_refused = True
        if self.transport.can_write_eof():
            # A connection that is closed with data unread is reset, and the answer may be lost.
            self.transport.write_eof()
            self.loop.call_later(_LINGER_S, self.transport.close)
        else:
            self.transport.close()
