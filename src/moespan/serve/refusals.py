"""Errors as clients see them: one envelope for all, with OpenAI's names.

A message names the field, the value (at most 80 characters of it), the rule and the way out. It
holds no path of this machine and no traceback, and the whole envelope stays below 4 KiB.
"""

from __future__ import annotations

import http
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from moespan import log
from moespan.errors import EngineDeadError, MoespanError, RequestError, shortened
from moespan.serve.inbox import CutOffError

_FIELD = re.compile(r"(\w+(?:\[\d+\])?)[=:]")
"""What a message of `RequestError` begins with, if it is about one field."""

_MOST_CHARACTERS = 640  # up to 6 bytes each, as JSON
_RETRY_DEAD_S = 5

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(MoespanError):  # noqa: N818 (a client's mistake, or a state of the server)
    """An answer with a status other than 200.

    Attributes:
        status: of the HTTP answer.
        param: the field of the request at fault, if there is one.
        code: a word for programs, such as `context_length_exceeded`.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)

    @property
    def envelope(self) -> dict[str, Any]:
        """The body of the answer, and the content of an event in a stream."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status)
        return {
            "error": {
                "message": shortened(self, _MOST_CHARACTERS),
                "type": kind or "invalid_request_error",
                "param": None if self.param is None else shortened(self.param),
                "code": self.code,
            }
        }

    @property
    def body(self) -> bytes:
        """The envelope as JSON."""
        return msgspec.json.encode(self.envelope)


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A 400."""
    return Refusal(400, message, param=param, code=code)


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told about any error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestError):
        named = _FIELD.match(str(error))
        return bad(str(error), None if named is None else named[1])
    if isinstance(error, CutOffError):
        return Refusal(
            503,
            "the server has ended before the answer was complete; send the request again, to "
            "another server or when this one is back",
            code="draining",
            retry_after_s=_RETRY_DEAD_S,
        )
    if isinstance(error, EngineDeadError):
        log.logger.debug("%s", error)  # may quote paths and tracebacks of ranks
        return Refusal(
            503,
            "the engine has died before the answer was complete; it is being started again",
            code="engine_dead",
            retry_after_s=_RETRY_DEAD_S,
        )
    if all(hasattr(error, name) for name in ("status", "code", "retry_after_s")):
        return Refusal(
            error.status,  # type: ignore[attr-defined]
            str(error),
            code=error.code,  # type: ignore[attr-defined]
            retry_after_s=error.retry_after_s,  # type: ignore[attr-defined]
        )
    log.logger.error("a request failed unexpectedly", exc_info=error)
    return Refusal(500, "the server failed to answer; its log says why", code="internal_error")


def of_status(status: int, message: str = "") -> Refusal:
    """A refusal for a status that comes with no more than a phrase."""
    phrase = message or http.HTTPStatus(status).phrase.lower()
    return Refusal(status, phrase)
