"""Streams: their bytes, their ends, usage, and that their pieces join to the whole answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from moespan.engine.request import OutputDelta
from moespan.serve import delivery
from tests.serve.scene import Served, Wired, error_of, events, play, play_wired, post_bytes

TEXT = "森林 🙂 one two three"


def choices(stream: list[Any], index: int = 0) -> list[Any]:
    return [one for event in stream for one in event["choices"] if one["index"] == index]


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize("n", [1, 3])
def test_each_choice_has_one_finish_reason_and_it_comes_last(route: str, n: int):
    async def script(served: Served) -> None:
        ends: list[tuple[dict[str, Any], str]] = [
            ({}, "stop"),
            ({"max_tokens": 3}, "length"),
            ({"stop": "one"}, "stop"),
        ]
        for given, reason in ends:
            body: dict[str, Any] = {"n": n, "max_tokens": 100, **given}
            stream = events(await getattr(served, route)(stream=True, **body))
            for index in range(n):
                *before, last = choices(stream, index)
                assert last["finish_reason"] == reason
                assert all(one["finish_reason"] is None for one in before)
            whole = (await getattr(served, route)(**body)).json()
            assert [one["finish_reason"] for one in whole["choices"]] == [reason] * n

    play(script, texts=[TEXT])


def test_the_stop_reason_is_the_string_that_was_found():
    async def script(served: Served) -> None:
        body = {"max_tokens": 100, "stop": ["zz", "two"]}
        assert (await served.complete(**body)).json()["choices"][0]["stop_reason"] == "two"
        assert (
            choices(events(await served.complete(**body, stream=True)))[-1]["stop_reason"] == "two"
        )
        assert (await served.complete()).json()["choices"][0]["stop_reason"] is None

    play(script, texts=[TEXT])


def test_a_chat_begins_with_the_role():
    async def script(served: Served) -> None:
        stream = events(await served.chat(stream=True, n=2))
        for index in range(2):
            first, *rest = choices(stream, index)
            assert first["delta"] == {"role": "assistant", "content": ""}
            assert all("role" not in one["delta"] for one in rest)
        heads = [
            {key: event[key] for key in ("id", "created", "model", "object")} for event in stream
        ]
        assert all(head == heads[0] for head in heads)
        assert heads[0]["object"] == "chat.completion.chunk"

    play(script)


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"stop": ["three"]},
        {"stop": ["e two"], "include_stop_str_in_output": True},
        {"stop": [" threex", "q"]},
        {"max_tokens": 2},
        {"n": 4},
    ],
)
def test_the_pieces_join_to_the_answer_that_is_not_streamed(route: str, body: dict[str, Any]):
    async def script(served: Served) -> None:
        asked = {"max_tokens": 100, **body}
        whole = (await getattr(served, route)(**asked)).json()
        stream = events(await getattr(served, route)(**asked, stream=True))
        for choice in whole["choices"]:
            pieces = choices(stream, choice["index"])
            if route == "chat":
                text = "".join(one["delta"]["content"] for one in pieces)
                assert text == choice["message"]["content"]
            else:
                text = "".join(one["text"] for one in pieces)
                assert text == choice["text"]
            if asked["max_tokens"] == 100:  # no character was cut
                assert all("\ufffd" not in json.dumps(one, ensure_ascii=False) for one in pieces)

    play(script, texts=[TEXT, "other", "é" * 9])


def test_nothing_of_a_stop_string_leaves_and_nothing_is_lost_when_it_only_began():
    async def script(served: Served) -> None:
        for stop, text in (("two thr", "森林 🙂 one "), ("two thx", TEXT)):
            stream = events(await served.complete(stream=True, max_tokens=100, stop=stop))
            told = ""
            for one in choices(stream):
                told += one["text"]
                assert text.startswith(told)
            assert told == text

    play(script, texts=[TEXT])


def test_usage_comes_last_if_asked_for_and_is_null_before():
    async def script(served: Served) -> None:
        for route in (served.complete, served.chat):
            stream = events(await route(stream=True, n=2, stream_options={"include_usage": True}))
            *before, last = stream
            assert last["choices"] == []
            assert last["usage"] == (await route(n=2)).json()["usage"]
            assert last["usage"]["completion_tokens"] == 8, "the EOS counts"
            assert all(event["usage"] is None for event in before)
            for options in (None, {}, {"include_usage": False}):
                stream = events(await route(stream=True, stream_options=options))
                assert all("usage" not in event for event in stream)

    play(script)


def test_usage_is_in_every_event_if_asked_for():
    async def script(served: Served) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        stream = events(await served.complete(stream=True, stream_options=options))
        counts = [event["usage"]["completion_tokens"] for event in stream]
        assert counts == [1, 2, 3, 4, 4]
        assert {event["usage"]["prompt_tokens"] for event in stream} == {7}

    play(script)


def test_several_prompts_are_streamed_at_once():
    async def script(served: Served) -> None:
        stream = events(await served.complete(prompt=["a", "b", "c"], n=2, stream=True))
        texts = ["".join(one["text"] for one in choices(stream, index)) for index in range(6)]
        assert texts == ["x1", "y2"] * 3

    play(script, texts=["x1", "y2"])


def test_echo_streams_the_prompt_first():
    async def script(served: Served) -> None:
        bodies: list[dict[str, Any]] = [{}, {"logprobs": 0}]
        for body in bodies:
            stream = events(await served.complete(echo=True, stream=True, n=2, **body))
            for index in range(2):
                assert "".join(one["text"] for one in choices(stream, index)) == "12+30= 42"
                assert choices(stream, index)[0]["text"] == "12+30= "

    play(script)


def test_a_request_that_is_refused_is_no_stream():
    async def script(served: Served) -> None:
        response = await served.chat(stream=True, n=0)
        assert response.status_code == 400
        error_of(response)

    play(script)


def test_a_comment_comes_while_nothing_else_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(delivery, "COMMENT_S", 0.02)

    async def script(served: Served, server: Wired) -> None:
        line = await server.line()
        body = json.dumps({"prompt": "a", "stream": True}).encode()
        await line.send(post_bytes("/v1/completions", body))
        for _ in range(3):
            await line.read_until(b": waiting\n\n")
        served.ranks.holds = False
        await line.read_until(b"data: [DONE]\n\n")

    play_wired(script, holds=True)


def test_an_engine_that_gives_a_request_up_is_an_error():
    async def script(served: Served) -> None:
        async def give_up(after: int) -> None:
            while not served.life.num_live:
                await asyncio.sleep(0.001)
            *_, request = served.ranks.running.values()
            for _ in range(after):
                served.ranks.tell(OutputDelta(id=request.id, text="a", token_ids=[70]))
                await asyncio.sleep(0.01)
            error = "the logits at position 5 are not finite"
            served.ranks.tell(OutputDelta(id=request.id, finish_reason="error", error=error))

        for stream, after in ((False, 0), (False, 1), (True, 0)):
            giving_up = asyncio.create_task(give_up(after))
            response = await served.complete(stream=stream)
            await giving_up
            assert response.status_code == 500
            assert error_of(response)["code"] == "request_failed"
            assert "not finite" in error_of(response)["message"]
        giving_up = asyncio.create_task(give_up(1))
        response = await served.complete(stream=True)
        await giving_up
        assert response.status_code == 200 and "[DONE]" not in response.text
        assert '"finish_reason":"' not in response.text
        *_, last = response.text.removesuffix("\n\n").split("\n\n")
        assert json.loads(last[6:])["error"]["code"] == "request_failed"

    play(script, holds=True)


def test_a_slow_reader_gets_joined_pieces_with_every_log_probability():
    async def script(served: Served, server: Wired) -> None:
        body = {"prompt": "a", "stream": True, "n": 8, "max_tokens": 400, "logprobs": 5}
        whole = (await served.complete(**{**body, "stream": False})).json()
        line = await server.line(limit=1024)
        data = json.dumps(body).encode()
        await line.send(post_bytes("/v1/completions", data, b"connection: close"))
        while served.life.num_live:  # the engine is not held up by a client that does not read
            await asyncio.sleep(0.01)
        text = await line.until_closed()
        stream = [
            json.loads(event.partition(b"data: ")[2])
            for event in text.split(b"\n\n")
            if b"data: {" in event
        ]
        for choice in whole["choices"]:
            pieces = choices(stream, choice["index"])
            assert "".join(one["text"] for one in pieces) == choice["text"]
            told = [score for one in pieces for score in one["logprobs"]["token_logprobs"]]
            assert told == choice["logprobs"]["token_logprobs"]
        assert len(stream) < 8 * 400, "pieces were joined"

    play_wired(script, texts=["x1" * 150])
