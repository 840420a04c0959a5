"""`/v1/responses`: a chat in another form, without state."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.serve.scene import Served, error_of, play, quickstart


async def respond(served: Served, **body: Any) -> httpx.Response:
    return await served.post("/v1/responses", **{"input": "12+30=", **body})


def named_events(response: httpx.Response) -> list[Any]:
    """The events of a stream, whose names are those in their data."""
    assert response.status_code == 200 and "[DONE]" not in response.text
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_response_has_one_message():
    async def script(served: Served) -> None:
        body = (await respond(served, instructions="Add.")).json()
        assert body["id"].startswith("resp_") and body["object"] == "response"
        assert (body["status"], body["error"], body["store"]) == ("completed", None, False)
        (item,) = body["output"]
        assert (item["type"], item["role"], item["status"]) == (
            "message",
            "assistant",
            "completed",
        )
        assert item["content"] == [{"type": "output_text", "text": " 42", "annotations": []}]
        assert body["usage"]["output_tokens"] == 4
        usage = body["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

    play(script)


def test_input_is_text_or_messages_of_text_parts():
    async def script(served: Served) -> None:
        tokenizer = quickstart().tokenizer
        assert tokenizer is not None
        items = [
            {"role": "developer", "content": "Add."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": []},
            {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
            {"role": "user", "content": "c"},
            {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "x", "output": "y"},
        ]
        response = await respond(served, input=items)
        assert response.status_code == 200, response.text
        text = tokenizer.decode(served.ranks.seen[-1].prompt_token_ids)
        assert text == "Add.\n\nUser: a\n\nAssistant: bUser: c\n\n" + (
            'Assistant: {"name":"f","arguments":{}}User: Result of f:\ny\n\nAssistant:'
        )
        for item in (
            {"type": "function_call_output", "call_id": "x", "output": 5},
            {"type": "function_call", "call_id": "x", "name": "f"},
            {"type": "web_search_call", "id": "x"},
            {"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]},
            {"role": "user"},
            {"content": "x"},
        ):
            response = await respond(served, input=[item])
            assert response.status_code == 400, item
            error_of(response)

    play(script)


def test_what_max_output_tokens_cuts_is_incomplete():
    async def script(served: Served) -> None:
        body = (await respond(served, max_output_tokens=2)).json()
        assert body["status"] == "incomplete"
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        assert named_events(await respond(served, max_output_tokens=2, stream=True))[-1][
            "type"
        ] == ("response.incomplete")

    play(script)


def test_a_stream_has_events_that_make_the_whole():
    async def script(served: Served) -> None:
        whole = (await respond(served)).json()
        found = named_events(await respond(served, stream=True))
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        kinds = [event["type"].removeprefix("response.") for event in found]
        assert list(dict.fromkeys(kinds)) == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
        text = "".join(one["delta"] for one in found if one["type"].endswith("text.delta"))
        last = found[-1]["response"]
        assert text == last["output"][0]["content"][0]["text"] == " 42"
        assert last["usage"] == whole["usage"]
        assert {key for key in last if last[key] != whole[key]} <= {"id", "output", "created_at"}

    play(script)


def test_what_needs_state_is_refused_by_name():
    async def script(served: Served) -> None:
        for name, value in (
            ("store", True),
            ("previous_response_id", "resp_1"),
            ("conversation", "conv_1"),
            ("background", True),
            ("truncation", "auto"),
            ("max_tokens", 5),
            ("stop", "x"),
        ):
            response = await respond(served, **{name: value})
            assert response.status_code == 400 and error_of(response)["param"] == name
        taken = {"store": False, "include": [], "reasoning": {}, "truncation": "disabled"}
        response = await respond(served, **taken, text={"format": {"type": "text"}})
        assert response.status_code == 200, response.text
        assert "x-moespan-ignored-fields" not in response.headers

    play(script)


def test_a_schema_in_text_format_holds_the_output():
    async def script(served: Served) -> None:
        form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
        assert (await respond(served, text={"format": form})).status_code == 200
        held = served.ranks.seen[-1].params.structured_outputs
        assert held is not None and held.kind == "json" and held.strict
        response = await respond(served, text={"format": {"type": "xml"}})
        assert response.status_code == 400

    play(script)


def test_tools_are_taken_if_they_are_right_and_answered_in_text():
    function = {"type": "function", "name": "add", "parameters": {"type": "object"}}

    async def script(served: Served) -> None:
        right = [function, {"type": "web_search"}]
        answer = (await respond(served, tools=right)).json()
        assert answer["tools"] == right and answer["output"][0]["type"] == "message"
        for wrong, param in (
            ([function] * 129, "tools"),
            ([{}], "tools[0].type"),
            ([function, {"type": "function"}], "tools[1].name"),
            ([{**function, "name": "a b"}], "tools[0].name"),
            ([{**function, "parameters": []}], "tools[0].parameters"),
        ):
            response = await respond(served, tools=wrong)
            assert response.status_code == 400 and error_of(response)["param"] == param

    play(script)
