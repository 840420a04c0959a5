"""Grammars: what is refused, what hostile ones cost, and that tokens follow them."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moespan.errors import RequestError
from moespan.text import grammar
from moespan.text.grammar import GrammarChecker, Grammars, Matcher, StructuredOutputsParams
from moespan.text.tokenizer import Tokenizer
from tests.support import QUICKSTART

VOCAB = 515  # more than the tokenizer has
EOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(QUICKSTART)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    grammars = Grammars.of(tokenizer, VOCAB, [EOS, 9999])
    assert grammars is not None
    return grammars


@pytest.fixture(scope="module")
def checker() -> GrammarChecker:
    return GrammarChecker()


def form(**kind: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**kind)


def allowed(matcher: Matcher) -> set[int]:
    mask = matcher.allowed()
    assert len(mask) == 65
    return {token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1}


def follow(
    grammars: Grammars, tokenizer: Tokenizer, params: StructuredOutputsParams, seed: int
) -> str | None:
    """The text of random allowed tokens up to the end; None if it grows too long."""
    rng, matcher, text = random.Random(seed), grammars.matcher(params), b""
    for _ in range(2000):
        token_ids = sorted(allowed(matcher))
        assert token_ids and token_ids[-1] < tokenizer.vocab_size
        # Closing tokens first, so that most texts end.
        closing = [t for t in token_ids if t == EOS or tokenizer.decode_bytes([t])[:1] in b'"]}']
        token_id = rng.choice(closing if closing and rng.random() < 0.5 else token_ids)
        if token_id == EOS:
            return text.decode()
        text += tokenizer.decode_bytes([token_id], skip_special_tokens=False)
        matcher.accept(token_id)
    return None


# What is asked for


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "has none of json, regex, choice, grammar, json_object; give exactly one"),
        ({"regex": "a", "json": {}}, "has json and regex of"),
        ({"json_object": False}, "has none of"),
        ({"json": "{"}, "json must be a JSON schema of at most 64 levels"),
        ({"json": 5}, "json=5 must be a JSON schema"),
        ({"json": [1]}, r"json=\[1\] must be a JSON schema"),
        ({"json": "[" * 5000 + "]" * 5000}, "json must be a JSON schema|json=.* must be"),
        ({"json": {"a": float("nan")}}, "json must be a JSON schema"),
        ({"json": {"a": object()}}, "json must be a JSON schema"),
        ({"json": {"enum": ["x" * 70000]}}, r"json has \d+ bytes; at most 65536 are allowed"),
        ({"json": {"a": "\ud83d"}}, "json has half of a surrogate pair"),
        ({"regex": 5}, "regex=5 must be text"),
        ({"regex": ""}, "regex is empty"),
        ({"regex": "a" * 65537}, "regex has 65537 bytes"),
        ({"grammar": ["a"]}, "grammar=.* must be text"),
        ({"choice": []}, "choice=.* must be a list of 1..4096 texts"),
        ({"choice": ["a", ""]}, "choice=.* must be a list"),
        ({"choice": "ab"}, "choice='ab' must be a list"),
        ({"json_object": 1}, "json_object=1 must be true"),
        ({"json_object": True, "strict": 1}, "strict=1 must be true or false"),
        ({"json_object": True, "structural_tag": "x"}, "'structural_tag' is unknown; known: json"),
    ],
)
def test_what_is_no_form_is_refused_with_its_rule(raw: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=f"^structured_outputs.*{message}") as error:
        StructuredOutputsParams.from_dict(raw)
    assert len(str(error.value)) < 400


def test_a_schema_of_64_levels_is_taken_and_one_of_65_is_not():
    def nested(levels: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for _ in range(levels - 1):
            schema = {"not": schema}
        return schema

    assert form(json=nested(63)).json is not None
    with pytest.raises(RequestError, match="at most 64 levels"):
        form(json=nested(65))


def test_a_schema_is_kept_as_text_and_a_null_is_not_set():
    params = StructuredOutputsParams.from_dict({"json": {"type": "null"}, "regex": None})
    assert (params.json, params.kind) == ('{"type":"null"}', "json")
    assert form(json=' {"type": "null"}') == params


# Checking


@pytest.mark.parametrize(
    "params",
    [
        form(json={"type": "object", "properties": {"a": {"type": "string"}}}),
        form(
            json={"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}
        ),
        form(json={"type": "array", "uniqueItems": True}, strict=False),
        form(regex="[a-z]{3,}"),
        form(choice=["a", 'b"\n', "ß/|"]),
        form(grammar='start: "a" B\nB: /[0-9]+/'),
        form(grammar='root ::= "a" b\nb ::= [0-9]+'),
        form(json_object=True),
    ],
    ids=lambda params: params.kind,
)
def test_forms_of_every_kind_pass(checker: GrammarChecker, params: StructuredOutputsParams):
    checker.check(params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (form(json={"type": "foo"}), "json cannot be used: .*Invalid type: foo"),
        (form(json={"uniqueItems": True}), "json .*Unimplemented keys: .*uniqueItems"),
        (form(json={"$ref": "http://localhost/x"}), "json .*not present"),
        (form(json={"$ref": "file:///etc/passwd"}), "json .*not present"),
        (form(regex="("), "regex .*unclosed group"),
        (form(grammar="nothing"), "grammar .*neither Lark nor GBNF"),
        (form(grammar="start: nowhere"), "grammar cannot be used"),
        (form(json={"allOf": [{"type": "string"}, {"type": "null"}]}), "json cannot be used"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(
    checker: GrammarChecker, params: StructuredOutputsParams, message: str
):
    for _ in range(2):  # the second time from memory
        with pytest.raises(RequestError, match=rf"^structured_outputs\.{message}") as error:
            checker.check(params)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def chain(count: int, link: str, name: str = "a") -> str:
    """Rules of which each names the next one, by `{0}`."""
    rules = "".join(f"{name}{i}: {link.format(f'{name}{i + 1}')}\n" for i in range(count))
    return f'start: {name}0\n{rules}{name}{count}: "x"\n'


def references(count: int) -> dict[str, Any]:
    def step(number: int) -> dict[str, Any]:
        return {"allOf": [{"$ref": f"#/$defs/a{number + 1}"}, {"pattern": f"x{number}"}]}

    return {
        "$defs": {**{f"a{i}": step(i) for i in range(count)}, f"a{count}": {"type": "string"}},
        "$ref": "#/$defs/a0",
    }


HOSTILE = {
    "patterns that all hold at once": form(json=references(300)),
    "terminals within terminals": form(grammar=chain(1500, '({0} "b")*', "A")),
    "repetitions of repetitions": form(regex="((((a{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "brackets": form(regex="(" * 30000 + "a" + ")" * 30000),
    "lark brackets": form(grammar="start: " + "(" * 30000 + '"a"' + ")" * 30000),
    "doubled terminals": form(grammar=chain(60, "{0} {0}", "A")),
    "combinations": form(
        json={
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"minimum": j}}} for j in range(6)]}
                for i in range(12)
            ]
        }
    ),
    "a loop": form(json={"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
}


@pytest.mark.parametrize("params", HOSTILE.values(), ids=HOSTILE)
def test_hostile_grammars_are_refused_in_bounded_time(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch, params: StructuredOutputsParams
):
    monkeypatch.setattr(grammar, "_CHECK_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(RequestError, match=r"^structured_outputs\.\w+ cannot be used: "):
        GrammarChecker().check(params)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("count", [2000, 7000])
def test_the_deepest_chain_of_rules_crashes_nothing(
    checker: GrammarChecker, grammars: Grammars, count: int
):
    """Such chains recurse in the library, and overflow a stack of the usual size."""
    text = chain(count, "{0}")
    if len(text) > grammar.MAX_GRAMMAR_BYTES:
        with pytest.raises(RequestError, match="at most 65536"):
            form(grammar=text)
        return
    params = form(grammar=text)
    checker.check(params)


def test_the_deepest_references_crash_nothing(checker: GrammarChecker):
    steps = {
        f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(1100)
    }
    deep = {"$defs": {**steps, "a1100": {"type": "string"}}, "$ref": "#/$defs/a0"}
    checker.check(form(json=deep))


def test_after_a_hostile_grammar_others_are_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar, "_CHECK_SECONDS", 0.3)
    monkeypatch.setattr(grammar, "_NUM_CHILDREN", 1)
    checker = GrammarChecker()
    with pytest.raises(RequestError, match=r"it takes longer than 0\.3 s"):
        checker.check(HOSTILE["patterns that all hold at once"])
    monkeypatch.setattr(grammar, "_CHECK_SECONDS", 10)
    checker.check(form(regex="a"))


def test_without_the_extra_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, checker: GrammarChecker, tokenizer: Tokenizer
):
    monkeypatch.setattr(grammar, "has_grammar_extra", lambda: False)
    with pytest.raises(RequestError, match=r"pip install '\.\[grammar\]'"):
        checker.check(form(regex="a"))
    assert Grammars.of(tokenizer, VOCAB, [EOS]) is None


# Following


def test_choices_come_as_they_are_written(grammars: Grammars, tokenizer: Tokenizer):
    choices = ['q"uo\\te\n', "é😀 /x/", " lead", "a|b", "a", "start: b"]
    found = {follow(grammars, tokenizer, form(choice=choices), seed) for seed in range(200)}
    assert found == set(choices)


def test_special_tokens_are_no_text(grammars: Grammars, tokenizer: Tokenizer):
    (special,) = tokenizer.special_token_ids - {EOS}
    assert special not in allowed(grammars.matcher(form(regex="(.|\n)*")))


def test_eos_comes_exactly_where_the_text_may_end(grammars: Grammars, tokenizer: Tokenizer):
    matcher = grammars.matcher(form(regex="a(bc)?"))
    may_end = []
    for letter in "abc":
        may_end.append(EOS in allowed(matcher))
        matcher.accept(tokenizer.encode(letter, add_special_tokens=False)[0])
    assert may_end == [False, True, False]
    assert allowed(matcher) == {EOS}


def test_a_token_that_is_ruled_out_fails_its_matcher_and_no_copy(
    grammars: Grammars, tokenizer: Tokenizer
):
    matcher = grammars.matcher(form(regex="ab"))
    twin = matcher.copy()
    (b,) = tokenizer.encode("b", add_special_tokens=False)
    with pytest.raises(RequestError, match=r"^the grammar fails: "):
        matcher.accept(b)
    with pytest.raises(RequestError, match=r"^the grammar fails: "):
        matcher.allowed()
    assert allowed(twin) == allowed(grammars.matcher(form(regex="ab")))


SCALARS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"type": "null"},
        {"type": "boolean"},
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "string", "maxLength": 5},
        {"enum": ["x", 3, None]},
        {"const": "é"},
        {"type": "string", "pattern": "^[ab]{2}$"},
    ]
)


def compound(parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": 3},
        parts,
        st.integers(0, 2),
    )
    objects = st.builds(
        lambda properties, count: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:count],
            "additionalProperties": False,
        },
        st.dictionaries(st.sampled_from("abc"), parts, min_size=1, max_size=3),
        st.integers(0, 3),
    )
    return arrays | objects | st.builds(lambda a, b: {"anyOf": [a, b]}, parts, parts)


def holds(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is one of a schema, for the schemas of these tests."""
    if "anyOf" in schema:
        return any(holds(one, value) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = schema["type"]
    if kind == "array":
        is_long_enough = isinstance(value, list) and schema["minItems"] <= len(value) <= 3
        return is_long_enough and all(holds(schema["items"], one) for one in value)
    if kind == "object":
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value)
            and all(holds(schema["properties"][name], one) for name, one in value.items())
        )
    if kind == "integer":
        return type(value) is int and -3 <= value <= 12
    if kind == "string":
        is_text = isinstance(value, str) and len(value) <= schema.get("maxLength", 2)
        return is_text and ("pattern" not in schema or bool(re.fullmatch("[ab]{2}", value)))
    return value is None if kind == "null" else isinstance(value, bool)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    schema=st.recursive(SCALARS, compound, max_leaves=6),
    blanks=st.booleans(),
    seed=st.integers(0, 9),
)
def test_whatever_tokens_come_the_text_is_json_of_the_schema(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], blanks: bool, seed: int
):
    params = form(json=schema, disable_any_whitespace=not blanks)
    text = follow(grammars, tokenizer, params, seed)
    assert text is not None
    assert holds(schema, json.loads(text)), text


def test_blanks_between_tokens_of_json_are_bounded(grammars: Grammars, tokenizer: Tokenizer):
    (bracket,), (line,), (space,) = (
        tokenizer.encode(one, add_special_tokens=False) for one in ("{", "\n", " ")
    )
    for blanks, is_full_for in (
        ([space] * 2, {space, line}),
        ([line], {line}),
        ([line, *[space] * 32], {space, line}),
    ):
        matcher = grammars.matcher(form(json_object=True))
        for token in (bracket, *blanks):
            matcher.accept(token)
        assert not is_full_for & set(allowed(matcher))


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_may_be_written_as_people_do(
    grammars: Grammars, tokenizer: Tokenizer, indent: int | str | None
):
    matcher = grammars.matcher(form(json_object=True))
    text = json.dumps({"a": [1, {"b": [True, None]}], "c": {}}, indent=indent)
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert token in allowed(matcher)
        matcher.accept(token)
