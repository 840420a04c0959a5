"""`POST /v1/responses`, without state: what it takes is a chat, what it answers has another form.

Nothing is stored, so a field that needs an earlier response or a later look is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from moespan.engine.request import OutputDelta
from moespan.errors import shown
from moespan.serve.answers import Answer, check_went_on
from moespan.serve.bodies import (
    ChatBody,
    Message,
    Part,
    PastCall,
    PastFunction,
    ResponsesBody,
    decode,
)
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import bad
from moespan.serve.sampling import Job, job_of_chat
from moespan.serve.served import ServedModel
from moespan.serve.tools import check_uncalled

_TEXT_PARTS = ("input_text", "output_text", "text")


def response_job(body: bytes, model: ServedModel, options: ServeOptions) -> ResponsesAnswer:
    """The job of `POST /v1/responses`, in the form of its answer.

    Raises:
        Refusal, RequestError: the request cannot be served as asked.
    """
    asked, ignored = decode(body, ResponsesBody, options.strict_fields)
    if asked.store:
        raise bad("store=True is refused: nothing is stored; send store=false", "store")
    if asked.truncation not in (None, "disabled"):
        raise bad(f"truncation={shown(asked.truncation)} must be disabled", "truncation")
    if asked.tool_choice not in (None, "none", "auto"):
        raise bad(
            f"tool_choice={shown(asked.tool_choice)} must be none or auto here; "
            "/v1/chat/completions answers with calls",
            "tool_choice",
        )
    check_uncalled(asked.tools or [])
    chat = ChatBody(
        messages=_messages(asked),
        model=asked.model,
        stream=asked.stream,
        temperature=asked.temperature,
        top_p=asked.top_p,
        max_tokens=asked.max_output_tokens,
        response_format=_format(asked.text),
    )
    job = job_of_chat(chat, ignored, model, options, kind="resp")
    return ResponsesAnswer(job, asked)


def _messages(asked: ResponsesBody) -> list[Message]:
    """The conversation that `instructions` and `input` make."""
    messages = [] if asked.instructions is None else [Message("system", asked.instructions)]
    if isinstance(asked.input, str):
        return [*messages, Message("user", asked.input)]
    for number, item in enumerate(asked.input):
        name = f"input[{number}]"
        kind = item.get("type", "message")
        if kind == "reasoning":  # of an earlier answer; this model has none
            continue
        if kind in ("function_call", "function_call_output"):
            messages.append(_call(item, name) if kind == "function_call" else _result(item, name))
        elif kind == "message":
            messages.append(_message(item, name))
        else:
            raise bad(
                f"{name}.type={shown(kind)} is refused; messages, calls of functions and their "
                "results are taken",
                name,
            )
    return messages


def _call(item: dict[str, Any], name: str) -> Message:
    call = _text_field(item, "call_id", name)
    function = PastFunction(_text_field(item, "name", name), _text_field(item, "arguments", name))
    return Message("assistant", tool_calls=[PastCall(function, call)])


def _result(item: dict[str, Any], name: str) -> Message:
    call = _text_field(item, "call_id", name)
    return Message("tool", _content(item.get("output"), f"{name}.output"), tool_call_id=call)


def _text_field(item: dict[str, Any], key: str, name: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise bad(f"{name}.{key}={shown(value)} must be a string", f"{name}.{key}")
    return value


def _message(item: dict[str, Any], name: str) -> Message:
    role = _text_field(item, "role", name)
    return Message(role, _content(item.get("content"), f"{name}.content"))


def _content(content: Any, name: str) -> str | list[Part]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(f"{name} must be a string or text parts", name)
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") in _TEXT_PARTS
        if not is_text or not isinstance(part.get("text"), str):
            raise bad(f"{name} has {shown(part)}; the model takes text only", name)
    return [Part("text", part["text"]) for part in content]


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    """`text.format` in the words of chats."""
    form = None if text is None else text.get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": form}


class ResponsesAnswer(Answer):
    """The answer of one response, whole or as events."""

    def __init__(self, job: Job, asked: ResponsesBody) -> None:
        super().__init__(job)
        self._asked = asked
        self._text = ""
        self._number = 0

    def whole(self, deltas: Iterable[tuple[int, OutputDelta]]) -> Any:
        """The answer that is not streamed."""
        ((_, delta),) = deltas
        self._take(delta)
        return self._response(delta.finish_reason)

    def events(self, number: int, deltas: Sequence[OutputDelta]) -> Iterator[Any]:
        """The events that deltas add to a stream."""
        for delta in deltas:
            if self._number == 0:
                yield from self._opening()
            self._take(delta)
            if delta.text:
                yield self._named("response.output_text.delta", **self._part, delta=delta.text)
            if delta.finish_reason is not None:
                yield from self._closing(delta.finish_reason)

    def last_event(self) -> None:
        """The events of `_closing` end the stream."""

    def line(self, event: Any) -> bytes:
        """An event with its name."""
        name: str = event["type"]
        return b"event: " + name.encode() + b"\n" + super().line(event)

    def _take(self, delta: OutputDelta) -> None:
        check_went_on(delta)
        self.count(0, delta)
        self._text += delta.text

    def _opening(self) -> Iterator[Any]:
        yield self._named("response.created", response=self._response(None))
        yield self._named("response.in_progress", response=self._response(None))
        item = {**self._item("in_progress"), "content": []}
        yield self._named("response.output_item.added", output_index=0, item=item)
        yield self._named("response.content_part.added", **self._part, part=_text_part(""))

    def _closing(self, finish_reason: str) -> Iterator[Any]:
        yield self._named("response.output_text.done", **self._part, text=self._text)
        part = _text_part(self._text)
        yield self._named("response.content_part.done", **self._part, part=part)
        response = self._response(finish_reason)
        (item,) = response["output"]
        yield self._named("response.output_item.done", output_index=0, item=item)
        yield self._named(f"response.{response['status']}", response=response)

    @property
    def _part(self) -> dict[str, Any]:
        """Where the text of the only item is."""
        return {"item_id": self._item("")["id"], "output_index": 0, "content_index": 0}

    def _named(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _item(self, status: str) -> dict[str, Any]:
        return {
            "id": self.job.id.replace("resp-", "msg_"),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_text_part(self._text)],
        }

    def _response(self, finish_reason: str | None) -> dict[str, Any]:
        """The whole answer as far as it is known."""
        job, asked, params = self.job, self._asked, self.job.requests[0].params
        is_cut = finish_reason == "length"
        status = "in_progress" if finish_reason is None else "completed"
        if is_cut:
            status = "incomplete"
        return {
            "id": job.id.replace("resp-", "resp_"),
            "object": "response",
            "created_at": job.created,
            "status": status,
            "model": job.name,
            "output": [] if finish_reason is None else [self._item(status)],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "text": asked.text or {"format": {"type": "text"}},
            "tools": asked.tools or [],
            "tool_choice": asked.tool_choice or "auto",
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "metadata": {},
            "usage": None if finish_reason is None else self._usage,
        }

    @property
    def _usage(self) -> dict[str, Any]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": msgspec.to_builtins(usage.prompt_tokens_details),
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
