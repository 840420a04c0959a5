"""The OpenAPI document of the server, from the structs of bodies and replies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from moespan.serve import bodies, replies
from moespan.version import __version__

_REF = "#/components/schemas/{name}"

_POSTS: Mapping[str, tuple[type[Any], tuple[type[Any], ...]]] = {
    "/v1/completions": (bodies.CompletionBody, (replies.Completion,)),
    "/v1/chat/completions": (
        bodies.ChatBody,
        (replies.ChatCompletion, replies.ChatCompletionChunk),
    ),
    "/v1/responses": (bodies.ResponsesBody, ()),
    "/tokenize": (bodies.TokenizeBody, (replies.Tokens,)),
    "/detokenize": (bodies.DetokenizeBody, (replies.Detokenized,)),
}
"""Route → its body; its answer, and the event of its stream if that differs."""

_STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")

_GETS: Mapping[str, type[Any] | None] = {
    "/v1/models": replies.ModelList,
    "/v1/models/{id}": replies.ModelCard,
    "/tokenizer_info": None,
    "/live": None,
    "/health": None,
    "/ready": None,
    "/ping": None,
    "/load": None,
    "/version": None,
    "/metrics": None,
}
"""Route → its answer; None for a text or a free form."""


def document() -> str:
    """The document as JSON."""
    return msgspec.json.format(msgspec.json.encode(openapi()), indent=2).decode()


def openapi() -> dict[str, Any]:
    """The document."""
    kinds = [replies.Error, *(kind for kind in _GETS.values() if kind is not None)]
    for body, answers in _POSTS.values():
        kinds += [body, *answers]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    refs = dict(zip(kinds, schemas, strict=True))
    error = {"description": "An error.", "content": _json(refs[replies.Error])}
    paths: dict[str, Any] = {}
    for path, (body, answers) in _POSTS.items():
        forms = [refs[answer] for answer in answers] or [{"type": "object"}]
        content = _json(forms[0])
        if path in _STREAMED:
            content["text/event-stream"] = {"schema": _event(forms[-1])}
        paths[path] = {
            "post": {
                "requestBody": {"required": True, "content": _json(refs[body])},
                "responses": {
                    "200": {"description": "The answer.", "content": content},
                    "default": error,
                },
            }
        }
    for path, answer in _GETS.items():
        ok: dict[str, Any] = {"description": "The answer."}
        if answer is not None:
            ok["content"] = _json(refs[answer])
        paths[path] = {"get": {"responses": {"200": ok, "default": error}}}
        if "{id}" in path:
            paths[path]["parameters"] = [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "moespan", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            },
        },
        "security": [{}, {"bearer": []}, {"basic": []}],
    }


def _event(data: dict[str, Any]) -> dict[str, Any]:
    """One event of a stream: JSON, or `[DONE]` at the end."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, text]}}}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
