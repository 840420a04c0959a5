"""Outputs of a trained model in the form that a request asks for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moespan import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from moespan.engine.constraints import Constraint
from moespan.errors import RequestError
from moespan.front.batch import AnswerFile, run_batch
from moespan.text import grammar
from moespan.text.grammar import Matcher
from tests.support import QUICKSTART

SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 5000},
        "even": {"type": "boolean"},
        "digits": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["sum", "even", "digits"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        str(QUICKSTART), device="cpu", dtype="float32", max_num_seqs=4, async_scheduling=True
    ) as llm:
        yield llm


def params(form: dict[str, Any], **settings: Any) -> SamplingParams:
    settings = {"temperature": 0, "max_tokens": 100, **settings}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**form), **settings)


def ask(llm: LLM, form: dict[str, Any], **settings: Any) -> RequestOutput:
    (output,) = llm.generate("681+734=", params(form, **settings))
    return output


def assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"sum", "even", "digits"}
        and 0 <= value["sum"] <= 5000
        and isinstance(value["even"], bool)
        and 1 <= len(value["digits"]) <= 3
        and set(value["digits"]) <= {1, 2, 3}
    )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_of_a_schema_ends_by_itself(llm: LLM, temperature: float):
    form = {"json": SCHEMA, "disable_any_whitespace": True}
    output = ask(llm, form, temperature=temperature, n=4, seed=1, logprobs=1)
    assert {one.finish_reason for one in output.outputs} == {"stop"}
    for one in output.outputs:
        assert is_of_schema(one.text), one.text
        assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)
    assert_idle(llm)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{4}"}, "1415"),
        ({"choice": ["more", "less", "less so"]}, "more|less|less so"),
        ({"grammar": 'root ::= digit digit "!"\ndigit ::= [0-9]'}, "[0-9]{2}!"),
        ({"grammar": 'start: A "."\nA: /[a-c]{2}/'}, r"[a-c]{2}\."),
    ],
)
def test_every_form_ends_where_nothing_more_may_come(llm: LLM, form: dict[str, Any], pattern: str):
    one = ask(llm, form).outputs[0]
    assert re.fullmatch(pattern, one.text) and one.finish_reason == "stop"
    # Neither may EOS come earlier, nor is anything left after the end.
    for settings in ({"ignore_eos": True}, {"min_tokens": 90}):
        one = ask(llm, form, **settings).outputs[0]
        assert re.fullmatch(pattern, one.text) and one.finish_reason == "stop"


def test_the_limit_of_tokens_in_the_middle_is_length(llm: LLM):
    one = ask(llm, {"json": SCHEMA}, max_tokens=5).outputs[0]
    assert (one.finish_reason, len(one.token_ids)) == ("length", 5)
    whole = ask(llm, {"regex": "[0-9]{4}"}, max_tokens=4).outputs[0]
    assert (whole.finish_reason, whole.text) == ("stop", "1415")


def test_stop_strings_bad_words_and_allowed_ids_go_with_a_grammar(llm: LLM):
    one = ask(llm, {"regex": "[0-9]{4}"}, stop=["41"]).outputs[0]
    assert (one.text, one.finish_reason, one.stop_reason) == ("1", "stop", "41")
    one = ask(llm, {"regex": "[0-9]{4}"}, bad_words=["1"]).outputs[0]
    assert re.fullmatch("[02-9]{4}", one.text)
    one = ask(llm, {"regex": "[0-9]{4}"}, allowed_token_ids=one.token_ids[:1]).outputs[0]
    assert len(set(one.text)) == 1 and len(one.text) == 4


def test_a_grammar_without_a_token_left_ends_its_request_only(llm: LLM):
    (letter,) = llm.tokenizer.encode("a", add_special_tokens=False)  # type: ignore[union-attr]
    bad = params({"regex": "[0-9]{4}"}, allowed_token_ids=[letter])
    good = params({"regex": "[0-9]{4}"})
    outputs = llm.generate(["681+734="] * 2, [bad, good])
    assert outputs[0].error is not None and "no token can come next" in outputs[0].error
    assert outputs[1].outputs[0].text == "1415"
    assert_idle(llm)


@pytest.mark.parametrize("at", [0, 3])
def test_a_matcher_that_fails_ends_its_request_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, at: int
):
    allowed, calls = Matcher.allowed, 0

    def fail(self: Matcher) -> bytes:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise RequestError("too complex")
        return allowed(self)

    with monkeypatch.context() as patch:
        patch.setattr(Matcher, "allowed", fail)
        failed = ask(llm, {"regex": f"[0-9]{{{4 + at}}}"}, n=1)
    assert failed.error == "too complex"
    assert len(failed.outputs[0].token_ids) == at
    assert ask(llm, {"regex": "[0-9]{4}"}).outputs[0].text == "1415"
    assert_idle(llm)


def test_outputs_are_the_same_with_plans_ahead_and_under_preemption(llm: LLM):
    many = [params({"json": SCHEMA}, temperature=1, seed=seed, max_tokens=40) for seed in range(6)]
    free = SamplingParams(temperature=0, max_tokens=40)
    prompts = ["Story: Mia, mouse, forest.", "681+734="] * 6
    mixed = [one for form in many for one in (free, form)]
    expected = [output.outputs for output in llm.generate(prompts, mixed)]
    tight: dict[str, Any] = {
        "num_blocks": 10,
        "block_size": 8,
        "max_model_len": 72,
        "max_num_seqs": 4,
    }
    with LLM(str(QUICKSTART), device="cpu", dtype="float32", **tight) as other:
        outputs = other.generate(prompts, mixed)
        assert other.stats().num_preemptions > 0
    assert [[one.text for one in output.outputs] for output in outputs] == [
        [one.text for one in each] for each in expected
    ]


def test_others_go_on_while_a_grammar_is_compiled(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    go_on, compile = threading.Event(), Matcher.begin

    def slow(*args: Any) -> Matcher:
        assert go_on.wait(30)
        return compile(*args)

    monkeypatch.setattr(Matcher, "begin", slow)
    first = llm.request("681+734=", params({"regex": "[0-9]{3}5"}))
    second = llm.request("12+30=", SamplingParams(temperature=0))
    texts = []
    for output in llm.stream([first, second]):
        texts.append(output.outputs[0].text)
        go_on.set()
    assert texts == ["42", "1415"]


def test_lines_of_a_file_have_forms_of_their_own(llm: LLM, tmp_path: Path):
    lines = [
        {"prompt": "681+734=", "params": {"structured_outputs": {"regex": "[0-9]{2}"}}},
        {"prompt": "681+734=", "params": {"structured_outputs": None}},
        {"prompt": "681+734=", "params": {"structured_outputs": {"regex": "("}}},
        {"prompt": "681+734=", "params": {"structured_outputs": {"reg": "a"}}},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    failures: list[str] = []
    output = AnswerFile(tmp_path / "out.jsonl")
    defaults = {"temperature": 0}
    report = failures.append
    with source.open("rb") as lines_of_file:
        run_batch(
            llm,
            lines_of_file,
            output,
            defaults,
            name=str(source),
            chat=False,
            done=set(),
            report_failure=report,
        )
    output.close()
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {one["id"]: one["text"] for one in answers} == {1: "14", 2: "1415"}
    assert "regex cannot be used" in failures[0] and "'reg' is unknown" in failures[1]


def test_without_tokenizer_or_extra_there_is_one_clear_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    request = llm.request("1+1=", params({"regex": "a"}))[1]
    with pytest.raises(RequestError, match="need a tokenizer and an EOS token"):
        Constraint.of(request, 512, [1], None, None)
    monkeypatch.setattr(grammar, "has_grammar_extra", lambda: False)
    with pytest.raises(RequestError, match=r"pip install '\.\[grammar\]'"):
        Constraint.of(request, 512, [1], None, None)
    with pytest.raises(RequestError, match=r"pip install '\.\[grammar\]'"):
        llm.generate("1+1=", params({"regex": "a"}))
