"""Routes of the whole application, and what holds for all of them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from tests.serve.scene import MAX_MODEL_LEN, Served, error_of, events, play


def test_a_completion_is_answered():
    async def script(served: Served) -> None:
        body = (await served.complete()).json()
        assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
        assert body["model"] == "models/quickstart"
        assert body["system_fingerprint"].startswith("fp_")
        assert body["choices"] == [
            {
                "index": 0,
                "text": " 42",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ]
        assert body["usage"] == {
            "prompt_tokens": 7,
            "completion_tokens": 4,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 1},
        }

    play(script)


def test_a_chat_is_answered():
    async def script(served: Served) -> None:
        body = (await served.chat()).json()
        assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
        assert body["choices"][0]["message"] == {
            "role": "assistant",
            "content": " 42",
            "refusal": None,
        }
        assert body["choices"][0]["finish_reason"] == "stop"

    play(script)


def test_models_are_listed_under_the_names_that_clients_use():
    async def script(served: Served) -> None:
        body = (await served.http.get("/v1/models")).json()
        assert body["object"] == "list"
        assert [card["id"] for card in body["data"]] == ["org/a-model", "b"]
        card = (await served.http.get("/v1/models/org/a-model")).json()
        assert card == body["data"][0]
        assert card["max_model_len"] == card["context_length"] == MAX_MODEL_LEN
        assert (card["object"], card["owned_by"], card["root"]) == (
            "model",
            "moespan",
            "models/quickstart",
        )
        assert (await served.complete(model="b")).json()["model"] == "b"
        assert (await served.complete()).json()["model"] == "org/a-model"
        for response in (
            await served.http.get("/v1/models/c"),
            await served.complete(model="models/quickstart"),
        ):
            assert response.status_code == 404
            error = error_of(response)
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert "'org/a-model', 'b'" in error["message"]

    play(script, model={"served_model_name": ("org/a-model", "b")})


def test_unknown_routes_and_methods_have_the_envelope():
    async def script(served: Served) -> None:
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("POST", "/v1/audio/speech", 404),
            ("POST", "/v1/embeddings", 404),
            ("GET", "/v1/completions", 405),
            ("DELETE", "/v1/models", 405),
            ("PATCH", "/v1/chat/completions", 405),
            ("OPTIONS", "/v1/completions", 405),
        ):
            response = await served.http.request(method, path, content=b"{}")
            assert response.status_code == status, (method, path)
            assert error_of(response)["message"]
        assert response.headers["allow"] == "POST"
        assert [end for end in served.ends if end[0] == "other"] == [("other", 404)] * 3

    play(script)


def test_a_body_must_be_json_and_say_so():
    async def script(served: Served) -> None:
        for kind in ("text/plain", "", "application/x-www-form-urlencoded"):
            response = await served.http.post(
                "/v1/completions", content=b"{}", headers={"content-type": kind}
            )
            assert response.status_code == 415
            assert "send application/json" in error_of(response)["message"]
        for content in (b"", b"{", b"[]", b'"x"', b"nul", b'{"prompt": "\xff"}', b'{"n": 1}}'):
            response = await served.http.post(
                "/v1/completions",
                content=content,
                headers={"content-type": "Application/JSON; charset=utf-8"},
            )
            assert response.status_code == 400, content
            error_of(response)

    play(script)


def test_request_ids_are_taken_or_made_and_given_back():
    async def script(served: Served) -> None:
        for given in ("a-request", "x" * 128):
            response = await served.http.get("/live", headers={"x-request-id": given})
            assert response.headers["x-request-id"] == given
        made = set()
        for given in ("x" * 129, "a b", "tab\t", ""):
            response = await served.http.get("/nothing", headers={"x-request-id": given})
            made.add(response.headers["x-request-id"])
        assert len(made) == 4 and all(len(one) == 32 for one in made)

    play(script)


def test_a_request_while_the_engine_is_dead_is_a_503_with_a_time_to_try_again():
    async def script(served: Served) -> None:
        served.ranks.die()
        while not served.life.last_error:
            await asyncio.sleep(0.001)
        response = await served.complete()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        error = error_of(response)
        assert (error["type"], error["code"]) == ("server_error", "engine_dead")

    play(script)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_before_the_first_token_is_a_503(stream: bool):
    async def script(served: Served) -> None:
        async def kill() -> None:
            while not served.life.num_live:
                await asyncio.sleep(0.001)
            served.ranks.die("rank 1 of /secret/path died")

        killing = asyncio.create_task(kill())
        response = await served.complete(stream=stream)
        await killing
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert error_of(response)["code"] == "engine_dead"
        assert "/secret" not in response.text

    play(script, holds=True)


def test_an_engine_that_dies_in_a_stream_is_an_error_event_and_no_end():
    async def script(served: Served) -> None:
        ranks = served.ranks
        speak = ranks.on_news

        def die_after_the_third(deltas: list[Any], pulse: Any) -> None:
            speak(deltas, pulse)
            if ranks.on_news is die_after_the_third and deltas[0].text == "3":
                ranks.die()

        ranks.on_news = die_after_the_third
        response = await served.chat(stream=True)
        assert response.status_code == 200
        *before, last = response.text.removesuffix("\n\n").split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        for line in before:
            assert json.loads(line[6:])["choices"][0]["finish_reason"] is None
        assert "[DONE]" not in response.text

    play(script, texts=["123456789"])


def test_a_request_that_takes_too_long_ends_with_an_error():
    async def script(served: Served) -> None:
        for stream in (False, True):
            response = await served.complete(stream=stream)
            assert response.status_code == 503
            assert error_of(response)["code"] == "request_timeout"
            assert served.life.num_live == 0
        ended = served.life.metrics.render().decode()
        assert 'moespan_request_success_total{finished_reason="timeout"' in ended
        for reason, count in (("timeout", 2.0), ("abort", 0.0)):
            found = re.search(rf'moespan_request_success_total{{.*"{reason}".*}} (.*)', ended)
            assert found is not None and float(found[1]) == count

    play(script, holds=True, request_timeout_s=0.05)


def test_the_ends_of_requests_are_told_with_their_route():
    async def script(served: Served) -> None:
        await served.complete()
        await served.chat(n=-1)
        await served.http.get("/v1/models/a/b/c")
        assert served.ends == [
            ("/v1/completions", 200),
            ("/v1/chat/completions", 400),
            ("/v1/models/{id:path}", 404),
        ]

    play(script)


def test_a_whole_answer_and_a_stream_say_the_same():
    async def script(served: Served) -> None:
        whole = (await served.chat(n=2)).json()
        texts = {0: "", 1: ""}
        for event in events(await served.chat(n=2, stream=True)):
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["delta"]["content"]
        assert texts == {one["index"]: one["message"]["content"] for one in whole["choices"]}

    play(script, texts=["one", "二 🙂"])


def test_requests_as_open_webui_makes_them_are_answered():
    """As its router of OpenAI's API makes them: a conversation, and the title that it asks for."""

    async def script(served: Served) -> None:
        name = (await served.http.get("/v1/models")).json()["data"][0]["id"]
        part = {"type": "text", "text": "12+30=", "cache_control": {"type": "ephemeral"}}
        messages = [
            {"role": "system", "content": "User Context:\n"},
            {"role": "user", "content": [part]},
        ]
        asked = {"temperature": 0, "frequency_penalty": 0, "reasoning": {"effort": "low"}}
        answer = await served.post(
            "/v1/chat/completions",
            **{"model": name, "messages": messages, "stream": True, **asked},
            stream_options={"include_usage": True},
        )
        *told, usage = events(answer)
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in told) == " 42"
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
        title = await served.chat("### Task:", model=name, max_completion_tokens=1000, stream=False)
        assert title.json()["choices"][0]["message"]["content"] == " 42"
        for one in (answer, title):
            assert "x-moespan-ignored-fields" not in one.headers

    play(script)
