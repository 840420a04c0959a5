"""The outermost layer of the application: what holds for every answer.

Request ids, headers for browsers, the size of headers, errors as envelopes, and one line of the log
for each request.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moespan import log
from moespan.errors import MoespanError, shortened
from moespan.serve.metrics import CLIENT_GONE
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal, of_status, refusal_of

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

OTHER = "other"
"""The route of requests that reached none."""

OnEnd = Callable[[str, int], object]
"""Takes the route of a request and the status of its answer; 499 if the client has gone."""


_PROBES = frozenset(
    {
        *("/live", "/health", "/ping", "/ready", "/load", "/metrics"),
        *("/v2/health/live", "/v2/health/ready", "/v2/models/{model:path}/ready"),
        *("/health/timed", "/health/timed-{seconds:int}"),
    }
)
"""Routes that programs ask every few seconds; --log-requests leaves them out."""


class ClientGoneError(MoespanError):
    """The client has closed the connection; nobody reads the answer."""


class Edge:
    """ASGI: the outermost layer.

    Args:
        on_end: called at the end of every request.
    """

    def __init__(
        self, app: ASGIApp, options: ServeOptions, on_end: OnEnd = lambda route, status: None
    ) -> None:
        self._app = app
        self._options = options
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens."""
        if scope["type"] != "http":
            return
        scope["root_path"] = self._options.prefix
        scope["app"] = self  # so that Starlette raises HTTPException
        answer = _Answer(send, _request_id(scope))
        scope.setdefault("state", {})["request_id"] = answer.request_id
        began = time.monotonic()
        try:
            self._check_headers(scope)
            await self._app(scope, receive, answer.send)
        except ClientGoneError:
            answer.status = scope["state"].get("status", CLIENT_GONE)
        except Exception as error:
            if answer.is_started:  # the end of the body would pass for the end of the answer
                log.logger.error("an answer broke off", exc_info=error)
                raise
            await answer.refuse(_refusal(error))
        finally:
            self._finish(scope, answer, time.monotonic() - began)

    def _check_headers(self, scope: Scope) -> None:
        most = self._options.max_header_kib << 10
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > most:
            raise Refusal(
                431,
                f"the headers have more than {most} bytes; send fewer or shorter ones",
                headers={"connection": "close"},
            )

    def _finish(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        state = scope["state"]
        self._on_end(state.get("route", OTHER), answer.status)
        is_told = self._options.log_requests and state.get("route") not in _PROBES
        level = log.logger.info if is_told else log.logger.debug
        level(
            "%s %s: %d in %.3f s, request %s%s",
            scope["method"],
            shortened(scope["path"]),
            answer.status,
            seconds,
            answer.request_id,
            "".join(f", {name} {value}" for name, value in state.get("told", {}).items()),
        )


class _Answer:
    """The answer to one request, as it is sent."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.is_started = False
        self.status = 0

    async def send(self, message: Message) -> None:
        """Pass a message of the application on, with the headers of all answers."""
        if message["type"] == "http.response.start":
            self.is_started = True
            self.status = message["status"]
            own = (*_HEADERS, (b"x-request-id", self.request_id.encode()))
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an envelope."""
        body = refusal.body
        headers: list[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode("latin-1")) for name, value in refusal.headers.items()),
        ]
        await self.send(
            {"type": "http.response.start", "status": refusal.status, "headers": headers}
        )
        await self.send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    """The client's id for the request if it can be shown, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return secrets.token_hex(16)


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, HTTPException):  # of Starlette: no such route or method
        refusal = of_status(error.status_code, _PHRASES.get(error.status_code, ""))
        refusal.headers.update(
            {name.lower(): value for name, value in (error.headers or {}).items()}
        )
        return refusal
    return refusal_of(error)


_PHRASES: dict[int, Any] = {
    404: "there is no such route; docs/serving.md lists them all",
    405: "the route exists, but not with this method",
}
