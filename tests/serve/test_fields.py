"""Each field of a request is honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h11
import httpx
import pytest

from moespan.engine.request import SamplingParams
from moespan.serve.bodies import (
    HARMLESS,
    REFUSED,
    SAMPLING,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ResponsesBody,
    TokenizeBody,
)
from moespan.serve.delivery import ignored_header
from moespan.text.grammar import StructuredOutputsParams
from tests.serve.scene import MAX_MODEL_LEN, Served, error_of, play, quickstart

IGNORED = "x-moespan-ignored-fields"

HONOURED: dict[str, tuple[Any, Any]] = {
    "n": (2, 2),
    "temperature": (0.5, 0.5),
    "top_p": (0.5, 0.5),
    "top_k": (5, 5),
    "min_p": (0.1, 0.1),
    "seed": (-1, 2**63 - 1),
    "repetition_penalty": (1.1, 1.1),
    "presence_penalty": (-1, -1.0),
    "frequency_penalty": (1, 1.0),
    "logit_bias": ({"5": 2}, {5: 2.0}),
    "stop": ("x", ["x"]),
    "stop_token_ids": ([7], [7]),
    "allowed_token_ids": ([20, 21], [20, 21]),
    "bad_words": (["no"], ["no"]),
    "include_stop_str_in_output": (True, True),
    "max_tokens": (3, 3),
    "min_tokens": (2, 2),
    "ignore_eos": (True, True),
    "skip_special_tokens": (False, False),
    "prompt_logprobs": (2, 2),
}
"""Sampling field → a value, and what the engine gets."""


CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x":1}'}}


async def ask(served: Served, route: str, **body: Any) -> httpx.Response:
    return await (served.chat(**body) if route == "chat" else served.complete(**body))


def test_every_sampling_parameter_is_a_field():
    others = {"logprobs", "structured_outputs"}
    assert set(SamplingParams.__struct_fields__) - others == SAMPLING
    assert set(HONOURED) == SAMPLING
    for kind in (CompletionBody, ChatBody):
        assert set(kind.__struct_fields__) >= SAMPLING


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_sampling_fields_reach_the_engine(route: str):
    async def script(served: Served) -> None:
        for name, (given, got) in HONOURED.items():
            response = await ask(served, route, **{name: given})
            assert response.status_code == 200, response.text
            assert IGNORED not in response.headers
            assert getattr(served.ranks.seen[-1].params, name) == got, name

    play(script)


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_null_is_the_same_as_a_missing_field(route: str):
    async def script(served: Served) -> None:
        assert (await ask(served, route)).status_code == 200
        kind = ChatBody if route == "chat" else CompletionBody
        names = set(kind.__struct_fields__) - {"prompt", "messages"}
        nothing = dict.fromkeys([*names, *HARMLESS, *REFUSED])
        response = await ask(served, route, **nothing)
        assert response.status_code == 200, response.text
        assert IGNORED not in response.headers
        before, after = served.ranks.seen
        assert before.params == after.params

    play(script)


def test_the_defaults_are_those_of_openai():
    async def script(served: Served) -> None:
        await served.complete()
        await served.chat()
        completion, chat = (request.params for request in served.ranks.seen)
        assert completion == SamplingParams(max_tokens=16)
        assert chat == SamplingParams(max_tokens=None)

    play(script)


def test_the_defaults_of_generation_config_hold_if_asked_for():
    async def script(served: Served) -> None:
        await served.complete()
        await served.complete(temperature=0.7)
        assert [request.params.temperature for request in served.ranks.seen] == [0, 0.7]

    play(script, model={"generation_config": "auto"})


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_fields_without_effect_on_this_model_are_taken(route: str):
    async def script(served: Served) -> None:
        response = await ask(served, route, **dict.fromkeys(HARMLESS, "x"))
        assert response.status_code == 200
        assert IGNORED not in response.headers

    play(script)


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_fields_that_would_change_the_answer_are_refused_by_name(route: str):
    async def script(served: Served) -> None:
        for name, (neutral, _) in REFUSED.items():
            response = await ask(served, route, **{name: {"something": [1]}})
            error = error_of(response)
            assert response.status_code == 400 and error["param"] == name, name
            assert f"{name}={{'something': [1]}} is refused: " in error["message"]
            for value in neutral:
                response = await ask(served, route, **{name: value})
                assert response.status_code == 200, (name, response.text)
        assert served.life.num_live == 0

    play(script)


@pytest.mark.parametrize("name", ["", " ", " a ", "a\tb", "\x7f", "\x00", "ö", "\u2028", "a, "])
def test_a_header_can_name_any_field(name: str):
    header = ignored_header([name, "x" * 40] * 16 + [name])
    response = h11.Response(status_code=200, headers=[header])
    assert response.headers[0] == header
    assert h11.Response(status_code=200, headers=[ignored_header(["a", name])])


def test_unknown_fields_are_named_in_a_header():
    async def script(served: Served) -> None:
        body = {"my_client_tag": 1, "extra_headers": {"deep": [[[]]]}}
        for response in (await served.complete(**body), await served.chat(**body, stream=True)):
            assert response.status_code == 200
            assert response.headers[IGNORED] == "my_client_tag, extra_headers"
        response = await served.complete(**{"a\nb\u202eö": 1})
        assert response.headers[IGNORED].isascii()

    play(script)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("max_token", "max_tokens"),
        ("max_tokenss", "max_tokens"),
        ("mxa_tokens", "max_tokens"),
        ("max_tokans", "max_tokens"),
        ("Max_Tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("stops", "stop"),
        ("top-p", "top_p"),
        ("usr", "user"),
        ("best_off", "best_of"),
    ],
)
def test_a_typo_is_refused_with_the_name_that_was_meant(typo: str, meant: str):
    async def script(served: Served) -> None:
        error = error_of(await served.complete(**{typo: 1}))
        assert error["param"] == typo
        assert error["message"] == f"'{typo}' is not a field; did you mean {meant}?"

    play(script)


def test_strict_fields_refuses_every_unknown_one():
    async def script(served: Served) -> None:
        assert (await served.complete(user="me")).status_code == 200
        response = await served.complete(my_client_tag=1)
        assert response.status_code == 400
        assert error_of(response)["param"] == "my_client_tag"

    play(script, strict_fields=True)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("n", 0, "n=0 must be an integer within 1..128"),
        ("n", 129, "within 1..128"),
        ("n", "2", "n='2' must be an integer"),
        ("n", [[1]], "n=[[1]] must be an integer"),
        ("temperature", 2.1, "temperature=2.1 must be within 0..2"),
        ("temperature", -1, "temperature=-1 must be within 0..2"),
        ("top_p", 0, "top_p=0 must be a number above 0 and at most 1"),
        ("seed", 2**63, "must be an integer within -2**63..2**63-1"),
        ("logit_bias", {"x": 1}, "logit_bias={'x': 1} must be at most"),
        ("logit_bias", {"512": 1}, "logit_bias: token id 512 is not within 0..511"),
        ("stop", ["x"] * 65, "stop="),
        ("stop", "x" * 1025, "stop="),
        ("stop", "", "stop='' must be"),
        ("max_tokens", -1, "max_tokens=-1 must be"),
        ("min_tokens", 17, "min_tokens=17 exceeds max_tokens=16"),
        ("max_completion_tokens", "x", "max_completion_tokens='x' must be an integer"),
        ("stream", "yes", "stream='yes' must be true or false"),
        ("stream_options", {"include_usage": True}, "stream_options needs stream=true"),
        ("stream_options", 5, "stream_options=5 must be an object"),
        ("echo", 1, "echo=1 must be true or false"),
        ("logprobs", 21, "logprobs=21 must be within 0..20"),
        ("logprobs", True, "logprobs=True must be an integer"),
        ("prompt_logprobs", 21, "prompt_logprobs=21 must be within 0..20"),
        ("priority", 1, "priority=1 must be 0"),
        ("model", 5, "model=5 must be a string"),
        ("truncate_prompt_tokens", 0, "truncate_prompt_tokens=0 must be -1 or within 1..511"),
        ("response_format", {"type": "json_schema"}, "json_schema.schema is missing"),
        ("response_format", {"type": "xml"}, "response_format.type='xml' must be text"),
        ("structured_outputs", {"regx": "a+"}, "structured_outputs.'regx' is unknown"),
        ("structured_outputs", {"regex": "a+", "choice": ["b"]}, "give exactly one"),
        ("structured_outputs", {"regex": "("}, "regex"),
        ("structured_outputs", {"json": {"type": "nothing"}}, "json"),
        ("prompt", 5, "prompt must be a string, a list of strings"),
        ("prompt", ["a", 1], "prompt must be a string, a list of strings"),
        ("prompt", [1, "a"], "prompt must be a string, a list of strings"),
        ("prompt", [1.5], "prompt must be a string, a list of strings"),
        ("prompt", [True], "prompt must be a string, a list of strings"),
        ("prompt", [[1], 2], "prompt must be a string, a list of strings"),
        ("prompt", [[[1]]], "prompt must be a string, a list of strings"),
        ("prompt", {"text": "a"}, "prompt must be a string, a list of strings"),
        ("prompt", None, "prompt is missing"),
        ("prompt", [], "prompt is empty"),
        ("prompt", [[]], "prompt[0] is empty"),
        ("prompt", [1, 512], "prompt: token id 512 is not within 0..511"),
        ("prompt", [1, -1], "prompt: token id -1 is not within 0..511"),
    ],
)
def test_a_value_that_breaks_a_rule_is_named_with_the_rule(field: str, value: Any, rule: str):
    async def script(served: Served) -> None:
        response = await served.complete(**{field: value})
        error = error_of(response)
        assert response.status_code == 400 and rule in error["message"], error
        assert error["type"] == "invalid_request_error"
        assert served.ranks.seen == []

    play(script)


def test_half_a_character_is_refused():
    async def script(served: Served) -> None:
        for field in ('"prompt": "\\ud800"', '"prompt": "a", "stop": "\\udfff"'):
            response = await served.http.post(
                "/v1/completions",
                content=f"{{{field}}}".encode(),
                headers={"content-type": "application/json"},
            )
            assert response.status_code == 400
            error_of(response)

    play(script)


def test_an_error_names_its_field():
    async def script(served: Served) -> None:
        for body, param in (
            ({"n": 0}, "n"),
            ({"stream": 1}, "stream"),
            ({"stop": [1]}, "stop"),
            ({"prompt": 5}, "prompt"),
            ({"temperature": 3}, "temperature"),
            ({"prompt": [1, 512]}, "prompt"),
            ({"prompt": [[1], [512]]}, "prompt"),
            ({"stop_token_ids": [512]}, "stop_token_ids"),
        ):
            assert error_of(await served.complete(**body))["param"] == param
        for message, param in (
            ({"role": "robot", "content": "x"}, "messages[0].role"),
            ({"role": "tool"}, "messages[0].content"),
            ({"role": "tool", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls"),
            ({"role": "user", "content": "x", "tool_call_id": "a"}, "messages[0].tool_call_id"),
            ({"role": "user"}, "messages[0].content"),
            ({"role": "user", "content": None}, "messages[0].content"),
            ({"content": "x"}, "messages[0]"),
            ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ""),
            ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls"),
            ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]"),
            ({"role": "assistant", "tool_calls": 5}, "messages[0].tool_calls"),
        ):
            response = await served.post("/v1/chat/completions", messages=[message])
            error = error_of(response)
            assert response.status_code == 400
            assert not param or error["param"] == param, error

    play(script)


def test_a_salt_and_no_tokens_reach_the_engine():
    async def script(served: Served) -> None:
        assert (await served.complete(cache_salt="tenant")).status_code == 200
        assert served.ranks.seen[-1].cache_salt == "tenant"
        for wrong in (5, ""):
            response = await served.complete(cache_salt=wrong)
            assert response.status_code == 400 and error_of(response)["param"] == "cache_salt"
        response = await served.complete(max_tokens=0, echo=True, logprobs=1)
        choice = response.json()["choices"][0]
        assert choice["text"] == "12+30=" and choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == 7
        assert response.json()["usage"]["completion_tokens"] == 0

    play(script)


def test_max_completion_tokens_is_max_tokens_on_both_routes():
    async def script(served: Served) -> None:
        for route in ("completions", "chat"):
            await ask(served, route, max_completion_tokens=300)
            assert served.ranks.seen[-1].params.max_tokens == 300
            await ask(served, route, max_completion_tokens=3, max_tokens=3)
            assert served.ranks.seen[-1].params.max_tokens == 3
            response = await ask(served, route, max_completion_tokens=3, max_tokens=4)
            assert response.status_code == 400
            assert "mean the same and differ" in error_of(response)["message"]

    play(script)


def test_prompts_are_taken_in_four_forms():
    async def script(served: Served) -> None:
        tokenizer = quickstart().tokenizer
        assert tokenizer is not None
        plain = tokenizer.encode("ab", add_special_tokens=False)
        begin = tokenizer.bos_token_id
        for prompt, ids in (
            ("ab", [[begin, *plain]]),
            (["ab", "ab"], [[begin, *plain]] * 2),
            (plain, [plain]),
            ([plain, [5]], [plain, [5]]),
        ):
            served.ranks.seen.clear()
            response = await served.complete(prompt=prompt, n=2)
            assert [request.prompt_token_ids for request in served.ranks.seen] == ids
            assert [one["index"] for one in response.json()["choices"]] == list(range(2 * len(ids)))
            assert response.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
        served.ranks.seen.clear()
        await served.complete(prompt="ab", add_special_tokens=False)
        assert served.ranks.seen[0].prompt_token_ids == plain

    play(script)


def test_a_choice_has_the_index_of_its_prompt_times_n_and_its_own():
    async def script(served: Served) -> None:
        body = (await served.complete(prompt=["a", "b"], n=3)).json()
        assert [one["text"] for one in body["choices"]] == ["x", "y", "z"] * 2
        assert len(served.ranks.seen) == 2, "one request to the engine for each prompt"

    play(script, texts=["x", "y", "z"])


def test_a_prompt_that_leaves_no_room_is_told_with_both_numbers():
    async def script(served: Served) -> None:
        for prompt in ([5] * MAX_MODEL_LEN, [5] * 9999, "5+" * MAX_MODEL_LEN, "x" * 5_000_000):
            response = await served.complete(prompt=prompt)
            error = error_of(response)
            assert response.status_code == 400
            assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
            assert "maximum context length is 512 tokens, and prompt has " in error["message"]
        assert "513" in error_of(await served.complete(prompt=[5] * 513))["message"]
        response = await served.chat("x7" * 400)
        assert error_of(response)["code"] == "context_length_exceeded"
        assert error_of(response)["param"] == "messages"
        assert (await served.complete(prompt=[5] * 511)).status_code == 200

    play(script)


def test_max_tokens_beyond_the_room_are_cut_to_it():
    async def script(served: Served) -> None:
        response = await served.complete(prompt=[5] * 500, max_tokens=10_000)
        assert response.json()["usage"]["completion_tokens"] == 12
        assert response.json()["choices"][0]["finish_reason"] == "length"

    play(script, texts=["x" * 600])


def test_prompts_are_cut_from_the_left_if_asked():
    async def script(served: Served) -> None:
        ids = list(range(5, 205))
        await served.complete(prompt=ids, truncate_prompt_tokens=10)
        assert served.ranks.seen[-1].prompt_token_ids == ids[-10:]
        await served.complete(prompt=[5] * 600, truncate_prompt_tokens=-1, max_tokens=30)
        assert len(served.ranks.seen[-1].prompt_token_ids) == MAX_MODEL_LEN - 30
        await served.complete(prompt="ab" * 600, truncate_prompt_tokens=7)
        assert len(served.ranks.seen[-1].prompt_token_ids) == 7
        await served.chat("ab", truncate_prompt_tokens=3)
        assert len(served.ranks.seen[-1].prompt_token_ids) == 3

    play(script)


def test_messages_are_text_or_parts_and_developers_are_systems():
    async def script(served: Served) -> None:
        tokenizer = quickstart().tokenizer
        assert tokenizer is not None

        async def rendered(*messages: Any, **body: Any) -> str:
            response = await served.post("/v1/chat/completions", messages=messages, **body)
            assert response.status_code == 200, response.text
            assert IGNORED not in response.headers
            return tokenizer.decode(served.ranks.seen[-1].prompt_token_ids)

        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert await rendered({"role": "user", "content": parts}) == "User: a\nb\n\nAssistant:"
        user = {"role": "user", "content": "hi"}
        for role in ("system", "developer"):
            text = await rendered({"role": role, "content": "S"}, user)
            assert text == "S\n\nUser: hi\n\nAssistant:"
        back: dict[str, Any] = {
            "role": "assistant",
            "content": "yo",
            "refusal": None,
            "audio": None,
            "tool_calls": None,
            "function_call": None,
            "annotations": [],
            "reasoning_content": "hm",
            "name": "bot",
        }
        text = await rendered(user, back, user)
        assert text == "User: hi\n\nAssistant: yoUser: hi\n\nAssistant:"
        assert await rendered(user, add_generation_prompt=False) == "User: hi\n\n"
        started = {"role": "assistant", "content": "I th"}
        text = await rendered(user, started, continue_final_message=True)
        assert text == "User: hi\n\nAssistant: I th"
        response = await served.post(
            "/v1/chat/completions", messages=[{**user, "weird": 1}, {**user, "weird": 2}]
        )
        assert response.headers[IGNORED] == "messages[].weird"

    play(script)


def test_calls_and_results_that_agents_send_back_become_text():
    async def script(served: Served) -> None:
        tokenizer = quickstart().tokenizer
        assert tokenizer is not None
        user = {"role": "user", "content": "hi"}
        other = {"function": {"name": 'a"b', "arguments": {"y": [2]}}, "id": "b"}
        messages = [
            user,
            {"role": "assistant", "content": None, "tool_calls": [CALL, other]},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "two"}]},
            {"role": "tool", "tool_call_id": "a", "content": "one"},
            {"role": "assistant", "content": "So.", "function_call": {"name": "f"}},
            {"role": "function", "name": "f", "content": ""},
            {"role": "tool", "content": "nameless", "tool_call_id": "cut away"},
        ]
        for path in ("/v1/chat/completions", "/tokenize"):
            response = await served.post(path, messages=messages)
            assert response.status_code == 200, response.text
            assert IGNORED not in response.headers
        assert tokenizer.decode(served.ranks.seen[-1].prompt_token_ids) == (
            "User: hi\n\n"
            'Assistant: {"name":"add","arguments":{"x":1}}\n'
            '{"name":"a\\"b","arguments":{"y":[2]}}'
            'User: Result of a"b:\ntwo\nResult of add:\none\n\n'
            'Assistant: So.\n{"name":"f","arguments":{}}'
            "User: Result of f:\n\nResult:\nnameless\n\n"
            "Assistant:"
        )

    play(script)


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_forms_of_the_output_reach_the_engine(route: str):
    async def script(served: Served) -> None:
        schema = {"type": "object", "properties": {"sum": {"type": "integer"}}}
        named = {"name": "a", "schema": schema}
        for field, value, form in (
            ("response_format", {"type": "text"}, None),
            ("structured_outputs", {}, None),
            ("response_format", {"type": "json_object"}, {"json_object": True}),
            ("structured_outputs", {"regex": "[0-9]{4}"}, {"regex": "[0-9]{4}"}),
            ("structured_outputs", {"choice": ["a", "b"]}, {"choice": ["a", "b"]}),
            *(
                (
                    "response_format",
                    {"type": "json_schema", "json_schema": {**named, "strict": strict}},
                    {"json": schema, "strict": strict is True},
                )
                for strict in (True, False, None)
            ),
        ):
            response = await ask(served, route, **{field: value})
            assert response.status_code == 200, response.text
            expected = None if form is None else StructuredOutputsParams.from_dict(form)
            assert served.ranks.seen[-1].params.structured_outputs == expected
        both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
        response = await ask(served, route, **both)
        assert response.status_code == 400 and "exclude each other" in response.text

    play(script)


def test_chats_take_the_number_of_best_tokens_with_logprobs_only():
    async def script(served: Served) -> None:
        response = await served.chat(top_logprobs=2)
        assert "top_logprobs=2 needs logprobs=true" in error_of(response)["message"]
        assert (await served.chat(logprobs=False)).json()["choices"][0]["logprobs"] is None
        response = await served.chat(logprobs=True, top_logprobs=21)
        assert "within 0..20" in error_of(response)["message"]

    play(script)


@pytest.mark.parametrize("page", ["serving.md", "serving.zh.md"])
def test_the_pages_name_every_field(page: str):
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text(encoding="utf-8")
    fields = {*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, *HARMLESS}
    assert not [name for name in fields if f"`{name}`" not in text]


ODD: tuple[Any, ...] = (
    *(True, False, 0, -1, 1, 1.5, 2.0, 10**30, 1e300, "", "x", "5", "none", "auto"),
    *([], [[]], [5], ["a"], [None], [5, "a"], [[5]], [{}], {}, {"a": 1}, {"type": "text"}),
    *(
        {"type": "json_schema"},
        {"role": "user", "content": "x"},
        [{"role": "user", "content": "x"}],
    ),
)


@pytest.mark.parametrize(
    ("path", "kind", "base"),
    [
        ("/v1/completions", CompletionBody, {"prompt": "a"}),
        (
            "/v1/completions",
            CompletionBody,
            {"prompt": "a", "echo": True, "logprobs": 1, "stream": True},
        ),
        ("/v1/chat/completions", ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", ResponsesBody, {"input": "a"}),
        ("/tokenize", TokenizeBody, {"prompt": "a"}),
        ("/detokenize", DetokenizeBody, {"tokens": [5]}),
    ],
)
def test_no_value_of_any_field_is_more_than_a_400(path: str, kind: Any, base: dict[str, Any]):
    async def script(served: Served) -> None:
        known = kind.__struct_fields__
        limits = {name: 2 for name in ("max_tokens", "max_output_tokens") if name in known}
        for name in known:
            for value in ODD:
                response = await served.post(path, **{**base, **limits, name: value})
                assert response.status_code < 500, (name, value, response.text)
                if response.status_code >= 400:
                    assert error_of(response)["message"], (name, value)

    play(script)
