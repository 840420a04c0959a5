"""Calls that `tool_choice` demands, and how forms of outputs are tried."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import msgspec
import pytest

from moespan import LLM, SamplingParams
from moespan.errors import RequestError
from moespan.serve import tools
from moespan.serve.bodies import ChatBody
from moespan.serve.tools import CallPieces, DemandedCall, demanded_call
from moespan.text.grammar import GrammarChecker, StructuredOutputsParams, has_grammar_extra
from tests.serve.scene import QUICKSTART, Served, error_of, events, play

needs_extra = pytest.mark.skipif(not has_grammar_extra(), reason="needs the extra grammar")

NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
NUMBERS = {"first": NUMBER, "second": NUMBER}


def tool(name: object = "add", **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": NUMBERS, "required": list(NUMBERS)}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def named(name: object = "add") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


ARGUMENTS = '{"first":12,"second":30}'
OF_ANY = f'{{"name":"add","arguments":{ARGUMENTS}}}'


def form_of(**body: Any) -> StructuredOutputsParams:
    call = demanded_call(ChatBody(messages=[], **body))
    assert call is not None
    return call.form


def test_tools_are_taken_and_answered_in_text_unless_a_call_is_demanded():
    async def script(served: Served) -> None:
        for choice in (None, "none", "auto"):
            response = await served.chat(tools=[tool()], tool_choice=choice)
            (choice,) = response.json()["choices"]
            assert choice["message"]["content"] == " 42" and "tool_calls" not in choice["message"]
            assert served.ranks.seen[-1].params.structured_outputs is None

    play(script)


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_wrong_tools_are_refused_also_if_no_call_is_demanded(choice: str | None):
    async def script(served: Served) -> None:
        for wrong, param in (({}, "tools[0].type"), (tool("a b"), "tools[0].function.name")):
            response = await served.chat(tools=[wrong], tool_choice=choice)
            assert response.status_code == 400 and error_of(response)["param"] == param
        assert (await served.chat(tools=[], tool_choice=choice)).status_code == 200

    play(script)


def test_without_the_extra_a_demanded_call_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tools, "has_grammar_extra", lambda: False)

    async def script(served: Served) -> None:
        for choice in ("required", named()):
            response = await served.chat(tools=[tool()], tool_choice=choice)
            assert response.status_code == 400
            assert "pip install '.[grammar]'" in error_of(response)["message"]
            assert error_of(response)["param"] == "tool_choice"

    play(script)


def whole(choice: Any) -> tuple[Any, Any]:
    """Name and arguments of the only call of a choice, and its finish reason."""
    message = choice["message"]
    assert message["content"] is None and message["role"] == "assistant"
    (call,) = message["tool_calls"]
    assert list(call) == ["id", "type", "function"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    return (call["function"]["name"], call["function"]["arguments"]), choice["finish_reason"]


def streamed(response: Any, index: int = 0) -> tuple[Any, Any, int]:
    """The same of the events of a stream, and the number of pieces of the arguments."""
    choices = [choice for event in events(response) for choice in event["choices"]]
    choices = [choice for choice in choices if choice["index"] == index]
    assert choices[0]["delta"] == {"role": "assistant", "content": None}
    deltas = [choice["delta"] for choice in choices[1:]]
    assert all(set(delta) <= {"tool_calls"} for delta in deltas)
    assert all(delta for delta in deltas[:-1]), "a piece without words before the name"
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert all(call["index"] == 0 for call in calls)
    first, *others = calls
    assert first["id"].startswith("call_") and first["type"] == "function"
    assert all(set(call) == {"index", "function"} for call in others)
    assert all(set(call["function"]) == {"arguments"} for call in others)
    arguments = "".join(call["function"]["arguments"] for call in calls)
    reasons = [choice["finish_reason"] for choice in choices]
    assert set(reasons[:-1]) == {None}
    return (first["function"]["name"], arguments), reasons[-1], len(calls)


@needs_extra
@pytest.mark.parametrize(
    ("choice", "text", "reason"), [(named(), ARGUMENTS, "stop"), ("required", OF_ANY, "tool_calls")]
)
def test_a_demanded_call_is_answered_whole_and_as_a_stream(choice: Any, text: str, reason: str):
    async def script(served: Served) -> None:
        body = {"tools": [tool(), tool("sub")], "tool_choice": choice}
        response = await served.chat(**body)
        assert response.status_code == 200, response.text
        expected = (("add", ARGUMENTS), reason)
        assert whole(response.json()["choices"][0]) == expected
        form = served.ranks.seen[-1].params.structured_outputs
        assert form is not None and form.kind == "json" and form == form_of(**body)
        call, ended, num_pieces = streamed(await served.chat(**body, stream=True))
        assert (call, ended) == expected and num_pieces > 3

    play(script, [text])


@needs_extra
def test_each_continuation_has_a_call_of_its_own():
    async def script(served: Served) -> None:
        body = {"tools": [tool(), tool("sub")], "tool_choice": "required", "n": 2}
        choices = (await served.chat(**body)).json()["choices"]
        assert [whole(choice)[0][0] for choice in choices] == ["add", "sub"]
        assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 2
        response = await served.chat(**body, stream=True)
        assert [streamed(response, index)[0][0] for index in (0, 1)] == ["add", "sub"]

    play(script, [OF_ANY, OF_ANY.replace("add", "sub")])


@needs_extra
@pytest.mark.parametrize(("choice", "text"), [(named(), ARGUMENTS), ("required", OF_ANY)])
def test_a_call_that_is_cut_has_the_finish_reason_length(choice: Any, text: str):
    async def script(served: Served) -> None:
        body: dict[str, Any] = {"tools": [tool()], "tool_choice": choice}
        num_tokens = (await served.chat(**body)).json()["usage"]["completion_tokens"]
        for limit in range(num_tokens):  # without EOS
            response = await served.chat(**body, max_tokens=limit)
            (one,) = response.json()["choices"]
            assert one["finish_reason"] == "length" and one["message"]["content"] is None
            calls = one["message"].get("tool_calls")
            if calls is not None:
                (name, arguments), _ = whole(one)
                assert name == "add" and ARGUMENTS.startswith(arguments)
            if limit > num_tokens // 2:
                assert calls, limit
                response = await served.chat(**body, max_tokens=limit, stream=True)
                assert streamed(response)[:2] == ((name, arguments), "length")

    play(script, [text])


def test_pieces_of_a_call_do_not_depend_on_where_its_text_is_cut():
    arguments = r'{"a":"}]\"\\","b":[{}],"c":{"name":"x","arguments":{}}}'
    text = f'{{"name":"f-1_x","arguments":{arguments}}}'
    call = DemandedCall(None, StructuredOutputsParams(json_object=True))
    for size in (1, 2, 7, len(text)):
        pieces, told = CallPieces(call), ""
        parts = [text[at : at + size] for at in range(0, len(text), size)] + [""]
        for number, part in enumerate(parts):
            delta = msgspec.to_builtins(pieces.push(part, number == len(parts) - 1))
            for piece in delta.get("tool_calls", []):
                told += piece["function"]["arguments"]
            assert arguments.startswith(told)
        assert told == arguments and pieces.is_complete


@pytest.mark.parametrize("cut", ["", "}", '{"a":"}}', '{"a":"\\', '{"a":{}}'])
def test_a_brace_of_the_arguments_is_not_taken_for_that_of_the_call(cut: str):
    pieces = CallPieces(DemandedCall(None, StructuredOutputsParams(json_object=True)))
    delta = msgspec.to_builtins(pieces.push('{"name":"f","arguments":' + cut, True))
    is_whole = cut == "}"  # no arguments at all never come from the grammar
    told = delta["tool_calls"][0]["function"]["arguments"]
    assert told == ("" if is_whole else cut) and pieces.is_complete == is_whole


@needs_extra
@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tool_choice": "requird"}, "tool_choice", "must be none, auto, required"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "must be none, auto"),
        ({"tool_choice": named(5)}, "tool_choice", "must be none, auto"),
        ({"tool_choice": named("nothing")}, "tool_choice", "must be one of tools: 'add'"),
        ({"tools": None}, "tools", "holds 0 tools"),
        ({"tools": [tool(f"f{n}") for n in range(129)]}, "tools", "needs 1..128"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "is there twice"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "'a b' must have 1..64"),
        ({"tools": [tool("a" * 65)]}, "tools[0].function.name", "must have 1..64"),
        ({"tools": [tool("a\n")]}, "tools[0].function.name", "must have 1..64"),
        ({"tools": [tool(None)]}, "tools[0].function.name", "must have 1..64"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "'custom' must be function"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "None must be an object"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "JSON schema"),
        (
            {"tools": [tool(parameters={"type": "string"})]},
            "tools[0].function.parameters",
            "must be object",
        ),
        (
            {"tools": [tool(parameters={"properties": {"a": {"type": "nothing"}}})]},
            "tools",
            "cannot be used",
        ),
        (
            {"tools": [tool(parameters={"not": {"required": ["a"]}}, strict=True)]},
            "tools",
            "cannot be used",
        ),
        ({"tools": [tool(parameters={"title": "a" * 70_000})]}, "tools", "at most 65536"),
        ({"response_format": {"type": "json_object"}}, "response_format", "exclude each other"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "exclude each other"),
    ],
)
def test_a_wrong_tool_is_refused_by_name(body: dict[str, Any], param: str, message: str):
    async def script(served: Served) -> None:
        response = await served.chat(**{"tools": [tool()], "tool_choice": "required", **body})
        error = error_of(response)
        assert response.status_code == 400
        assert error["param"] == param and message in error["message"], error
        assert "structured_outputs.json" not in error["message"]

    play(script)


@needs_extra
def test_a_form_that_cannot_be_used_is_refused_with_its_field():
    async def script(served: Served) -> None:
        schema = {"type": "nothing"}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        for field, value in (("response_format", form), ("structured_outputs", {"json": schema})):
            for ask in (served.complete, served.chat):
                response = await ask(**{field: value})
                assert response.status_code == 400
                assert error_of(response)["param"] == field
                assert f"{field}" in error_of(response)["message"]

    play(script)


@needs_extra
def test_references_inside_the_schema_of_a_function_hold_in_that_of_any_function():
    node = {
        "type": "object",
        "properties": {
            "next": {"$ref": "#"},
            "value": {"$ref": "#/$defs/Value"},
            "kind": {"const": {"$ref": "#"}},
        },
        "required": ["value"],
        "additionalProperties": False,
        "$defs": {"Value": {"type": "integer"}},
    }
    other = {**node, "$defs": {"Value": {"type": "boolean"}}}  # another schema of the same name
    form = form_of(
        tools=[tool("a", parameters=node), tool("b-2", parameters=other)], tool_choice="required"
    )
    GrammarChecker().check(form)
    schema = json.loads(str(form.json))
    moved = schema["$defs"]["b-2"]["properties"]
    assert moved["next"] == {"$ref": "#/$defs/b-2"}
    assert moved["value"] == {"$ref": "#/$defs/b-2/$defs/Value"}
    assert moved["kind"] == {"const": {"$ref": "#"}}


@needs_extra
@pytest.mark.parametrize(
    ("parameters", "is_closed"),
    [
        (None, True),
        ({"properties": {}}, True),
        ({"properties": NUMBERS, "required": ["first"]}, True),
        ({"properties": NUMBERS, "required": ["third"]}, False),
        ({"properties": NUMBERS, "additionalProperties": True}, False),
        ({"properties": NUMBERS, "allOf": [{"properties": {"third": NUMBER}}]}, False),
        ({}, False),
    ],
)
def test_a_function_gets_no_arguments_that_it_does_not_declare(parameters: Any, is_closed: bool):
    form = form_of(tools=[tool(parameters=parameters)], tool_choice=named())
    schema = json.loads(str(form.json))
    assert schema["type"] == "object"
    assert (schema.get("additionalProperties") is False) == is_closed


@needs_extra
def test_the_engine_holds_its_output_to_a_call():
    given = [tool("sub"), tool("empty", parameters=None)]
    choices = ("required", named("sub"), named("empty"))
    calls = [demanded_call(ChatBody(messages=[], tools=given, tool_choice=one)) for one in choices]
    params = [
        SamplingParams(max_tokens=200, temperature=0, structured_outputs=call.form)
        for call in calls
        if call is not None
    ]
    with LLM(QUICKSTART, dtype="float32") as llm:
        outputs = llm.generate(["12+30="] * len(params), params)
    for call, output in zip(calls, outputs, strict=True):
        assert call is not None
        pieces, (one,) = CallPieces(call), output.outputs
        delta = msgspec.to_builtins(pieces.push(one.text, True))
        function = delta["tool_calls"][0]["function"]
        assert one.finish_reason == "stop" and pieces.is_complete == (call.function is None)
        assert call.function in (None, function["name"])
        expected = list(NUMBERS) if function["name"] == "sub" else []
        assert list(json.loads(function["arguments"])) == expected


@needs_extra
def test_forms_that_are_tried_for_long_do_not_hold_up_other_requests(
    monkeypatch: pytest.MonkeyPatch,
):
    gate = threading.Event()

    def check(self: GrammarChecker, params: StructuredOutputsParams) -> None:
        gate.wait(20)
        raise RequestError("structured_outputs.regex cannot be used: it takes too long")

    monkeypatch.setattr(GrammarChecker, "check", check)

    async def script(served: Served) -> None:
        slow = [
            asyncio.create_task(served.complete(structured_outputs={"regex": f"a{number}"}))
            for number in range(8)
        ]
        await asyncio.sleep(0.05)
        response = await asyncio.wait_for(served.complete(), 10)
        assert response.status_code == 200 and not any(task.done() for task in slow)
        gate.set()
        assert {response.status_code for response in await asyncio.gather(*slow)} == {400}

    play(script)


def test_responses_refuse_a_demanded_call():
    async def script(served: Served) -> None:
        for choice in ("required", {"type": "function", "name": "add"}):
            response = await served.post("/v1/responses", input="a", tool_choice=choice)
            assert response.status_code == 400 and error_of(response)["param"] == "tool_choice"

    play(script)
