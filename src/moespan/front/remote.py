"""Asks a server that speaks OpenAI's chat protocol, such as `moespan serve`. Imports no torch."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from moespan.errors import ConfigError, MoespanError, RequestError, shortened, shown
from moespan.front.api_key import API_KEY_VARIABLE
from moespan.front.conversation import Ending, Say

SILENCE_S = 60.0
"""Most seconds without a byte from the server, which sends a comment every 15 s."""

_MOST_ANSWER_BYTES = 2**20
_MOST_LINE_BYTES = 2**20


class ServerAnswerer:
    """Answers with the model of a server.

    Args:
        url: where the server is, with or without `/v1`.
        fields: further fields of each request, such as `temperature`.
        model: id of the model; None for the first that the server lists.
        api_key: the server's key, if it wants one.

    Raises:
        ConfigError: `url` is no address of a server, or the server has no such model.
        MoespanError: the server cannot be reached, or refuses.
    """

    def __init__(
        self,
        url: str,
        fields: Mapping[str, Any],
        *,
        model: str | None = None,
        api_key: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{shown(url)} is no address of a server; use http://HOST:PORT")
        self._parts = parts
        self._place = shortened(f"{parts.scheme}://{parts.netloc}")
        self._path = f"{parts.path.rstrip('/').removesuffix('/v1')}/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._fields = dict(fields)
        self.model = self._checked(model)

    def answer(self, messages: list[Mapping[str, str]], say: Say) -> Ending:
        """Stream the answer. Ctrl-C closes the connection, which ends the request."""
        body = {
            **self._fields,
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        ending = Ending(None, 0)
        with self._response("POST", "/chat/completions", body) as response:
            for event in self._events(response):
                with self._translated():
                    text, ending = _read(event, ending)
                if text:
                    say(text)
        if ending.finish_reason is None:
            raise MoespanError(f"{self._place} closed the connection before the answer's end")
        return ending

    def _checked(self, model: str | None) -> str:
        with self._response("GET", "/models") as response, self._translated():
            listed = json.loads(response.read(_MOST_ANSWER_BYTES))
            ids = [str(one["id"]) for one in listed["data"]]
        if not ids:
            raise ConfigError(f"{self._place} lists no model")
        if model is not None and model not in ids:
            raise ConfigError(
                f"{self._place} has no model {shown(model)}; it has {', '.join(map(shown, ids))}"
            )
        return model or ids[0]

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request, on a connection of its own.

        Raises:
            RequestError: status 400, 413 or 429, which another request may not get.
            MoespanError: any other failure.
        """
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        assert self._parts.hostname is not None
        connection = kinds[self._parts.scheme](
            self._parts.hostname, self._parts.port, timeout=SILENCE_S
        )
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(connection.close)
            with self._translated():
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, quote(self._path + path), data, self._headers)
                response = cleanup.enter_context(connection.getresponse())
                if response.status != 200:
                    raise self._refusal(response)
            yield response

    def _refusal(self, response: http.client.HTTPResponse) -> MoespanError:
        try:
            message = _message(json.loads(response.read(_MOST_ANSWER_BYTES)))
        except _NOT_THE_PROTOCOL:
            message = response.reason
        if response.status == 401:
            message += f"; give the key with --api-key-file or {API_KEY_VARIABLE}"
        kind = RequestError if response.status in (400, 413, 429) else MoespanError
        return kind(f"{self._place} refused ({response.status}): {message}")

    def _events(self, response: http.client.HTTPResponse) -> Iterator[Any]:
        """The events of a stream up to `[DONE]`, decoded."""
        while True:
            with self._translated():
                line = response.readline(_MOST_LINE_BYTES)
                data = line.removeprefix(b"data:").strip()
                if not line or data == b"[DONE]":
                    return
                event = json.loads(data) if line.startswith(b"data:") else None
            if event is not None:
                yield event

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn errors of the network and of what was received into one line."""
        try:
            yield
        except MoespanError as error:
            raise error from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise MoespanError(f"{self._place} cannot be reached: {reason}") from None
        except _NOT_THE_PROTOCOL:
            raise MoespanError(f"{self._place} does not speak OpenAI's protocol") from None


_NOT_THE_PROTOCOL = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def _read(event: Any, ending: Ending) -> tuple[str, Ending]:
    """The text of one event, and the ending after it."""
    if "error" in event:
        raise MoespanError(f"the server ended the answer: {_message(event)}")
    text, finish_reason, num_tokens = "", ending.finish_reason, ending.num_tokens
    if usage := event.get("usage"):
        num_tokens = int(usage["completion_tokens"])
    for choice in event["choices"]:
        text += choice["delta"].get("content") or ""
        finish_reason = choice["finish_reason"] or finish_reason
    return text, Ending(finish_reason, num_tokens)


def _message(event: Any) -> str:
    return shortened(event["error"]["message"], 400)
