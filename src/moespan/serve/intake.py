"""Bodies of requests, read within limits of size and memory; `wire` bounds the time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request

from moespan.errors import shown
from moespan.serve.edge import ClientGoneError
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal

_MOST_HELD = 32
"""Bodies of the largest size that all requests together may hold before they are encoded."""

_RETRY_S = 2


class Intake:
    """Reads bodies, and counts the bytes that are held: from the first byte until the request is
    made of them, which may wait for a thread.

    Args:
        on_full: called with each 429.
    """

    def __init__(self, options: ServeOptions, on_full: Callable[[], object] = lambda: None) -> None:
        self._on_full = on_full
        self._most_bytes = options.max_body_mib << 20
        self._held_bytes = 0

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request that must be JSON, which is held meanwhile.

        Raises:
            Refusal: 413, 415, or 429 if all requests together are too large.
            ClientGoneError: the client has gone.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(
                415,
                f"content-type {shown(kind)} is refused; send application/json",
                headers={"connection": "close"},
            )
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        held_bytes, has_more = 0, True
        try:
            while has_more:
                chunk, has_more = await _next_chunk(request)
                chunks.append(chunk)
                held_bytes += len(chunk)
                self._held_bytes += len(chunk)
                if held_bytes > self._most_bytes:
                    raise self._too_large()
                if self._held_bytes > self._most_bytes * _MOST_HELD:
                    self._on_full()
                    raise Refusal(
                        429,
                        "too many large requests arrive at once; try again later",
                        code="queue_full",
                        retry_after_s=_RETRY_S,
                        headers={"connection": "close"},
                    )
            yield b"".join(chunks)
        finally:
            self._held_bytes -= held_bytes

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            f"the body has more than {self._most_bytes} bytes (--max-body-mib); send fewer prompts "
            "at a time",
            headers={"connection": "close"},
        )


async def _next_chunk(request: Request) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError("the client has gone")
    return message.get("body", b""), message.get("more_body", False)
