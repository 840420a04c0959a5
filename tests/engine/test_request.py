"""Sampling parameters and requests are checked once, where they are made, by value and by type."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespan.engine.request import Request, SamplingParams, check_request
from moespan.errors import RequestError

FIELDS = SamplingParams.__struct_fields__
DEFAULTS = {name: getattr(SamplingParams(), name) for name in FIELDS}

INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
LISTS = ("stop_token_ids",)

HUGE = 10**6000
"""An integer that Python refuses to write as text."""


def wrong(name: str, *values: Any) -> list[tuple[str, Any]]:
    """Values that the field `name` refuses."""
    return [(name, value) for value in values]


WRONG: list[tuple[str, Any]] = [
    *(
        one
        for name in INTEGERS
        for one in wrong(name, True, "1", "x", [1], {}, 1.5, math.nan, HUGE)
    ),
    *(one for name in INTEGERS for one in wrong(name, -2, -math.inf, 2**70, 1j, b"1", object())),
    *(one for name in NUMBERS for one in wrong(name, True, "1", [], {}, math.nan, HUGE, 1j)),
    *(one for name in NUMBERS for one in wrong(name, math.inf, -math.inf, -3, -HUGE)),
    *(one for name in FLAGS for one in wrong(name, 0, 1, "true", [], 0.0, "")),
    *wrong("stop", "", [""], [1], [None], ["a", b"b"], b"a", 5, True, {"a": 1}),
    *wrong("stop", "\ud83d", ["a", "\ud83d"], ["x"] * 65, "x" * 1025, [["a"]]),
    *wrong("stop_token_ids", 5, "5", [True], ["5"], [-1], [1.5], [HUGE], [0] * 65),
    *wrong("stop_token_ids", [None], {5: 1}, True, [math.nan], [[1]]),
    *wrong("allowed_token_ids", 5, "5", [], [True], ["5"], [-1], [1.5], {5: 1}, [None]),
    *wrong("bad_words", "", [""], [" "], [1], ["a", b"b"], b"a", 5, "x" * 65, ["x"] * 257),
    *wrong("bad_words", "\ud83d", ["a", "\ud83d"], ["   "]),
    *wrong("structured_outputs", 5, "x", [], True, ["a"]),
    *wrong("logit_bias", 5, "5", [], [(5, 1)], True, {5: "1"}, {5: None}, {5: True}),
    *wrong("logit_bias", {5: math.nan}, {5: 101}, {5: HUGE}, {-1: 0}, {"-1": 0}),
    *wrong("logit_bias", {"x": 0}, {True: 0}, {None: 0}, {(): 0}, {"1" * 5000: 0}),
    ("logit_bias", dict.fromkeys(range(1025), 0)),
    ("n", 0),
    ("n", 129),
    ("top_p", 0),
    ("top_p", 1.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.1),
    ("max_tokens", -1),
    ("logprobs", 21),
]


@pytest.mark.parametrize(
    ("name", "bad"), WRONG, ids=[f"{name}-{index}" for index, (name, _) in enumerate(WRONG)]
)
def test_a_wrong_value_is_one_error_that_names_field_value_and_rule(name: str, bad: Any):
    for make in (
        lambda: SamplingParams(**{name: bad}),
        lambda: SamplingParams.from_dict({name: bad}),
    ):
        with pytest.raises(RequestError) as caught:
            make()
        message = str(caught.value)
        assert message.startswith(f"{name}=")
        value, _, rule = message.removeprefix(f"{name}=").partition(" must be ")
        assert 0 < len(value) <= 80
        assert rule
        assert len(message) < 300
        assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("stop", "food", ["food"]),
        ("stop", ("a", "b"), ["a", "b"]),
        ("stop", [], []),
        ("allowed_token_ids", (1, 2), [1, 2]),
        ("bad_words", "x", ["x"]),
        ("bad_words", ("\n", " x"), ["\n", " x"]),
        ("stop_token_ids", (1, 2), [1, 2]),
        ("stop_token_ids", {7}, [7]),
        ("stop_token_ids", [np.int64(3)], [3]),
        ("temperature", 1, 1.0),
        ("temperature", 0, 0.0),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", Fraction(1, 2), 0.5),
        ("top_k", 40.0, 40),
        ("top_k", np.int32(5), 5),
        ("top_k", -1, -1),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("n", 2.0, 2),
        ("max_tokens", 5.0, 5),
        ("logprobs", 0, 0),
        ("logit_bias", {"5": 1, 6: -2.5}, {5: 1.0, 6: -2.5}),
        ("logit_bias", {}, {}),
        ("ignore_eos", True, True),
    ],
)
def test_an_obvious_meaning_is_taken(name: str, value: Any, meant: Any):
    for params in (SamplingParams(**{name: value}), SamplingParams.from_dict({name: value})):
        found = getattr(params, name)
        assert found == meant
        assert type(found) is type(meant)
    if name == "logit_bias":
        assert params.logit_bias is not None
        assert all(type(bias) is float for bias in params.logit_bias.values())


@pytest.mark.parametrize("name", FIELDS)
def test_none_means_that_a_parameter_is_not_set(name: str):
    meant = None if name == "max_tokens" else DEFAULTS[name]
    unset: dict[str, Any] = {name: None}
    for params in (SamplingParams(**unset), SamplingParams.from_dict(unset)):
        assert getattr(params, name) == meant


def test_a_null_of_a_client_is_ignored_and_an_unknown_name_refused():
    assert SamplingParams.from_dict({"best_of": None, "user": None}) == SamplingParams()
    with pytest.raises(RequestError, match=r"^'heat' is not a sampling parameter; known are n, "):
        SamplingParams.from_dict({"heat": 1})
    with pytest.raises(RequestError, match="is not a sampling parameter") as caught:
        SamplingParams.from_dict({"x" * 10**6: 1})
    assert len(str(caught.value)) < 500
    values: list[Any] = [None, [], "n", 5]
    for bad in values:
        with pytest.raises(RequestError, match="must be an object"):
            SamplingParams.from_dict(bad)


def test_every_parameter_has_a_rule_and_parameters_that_contradict_are_refused():
    assert {name for name, _ in WRONG} == set(FIELDS)
    with pytest.raises(RequestError, match="min_tokens=5 exceeds max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_lists_of_a_caller_are_copied():
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append(5)  # type: ignore[arg-type]
    assert params.stop == ["a"]
    assert SamplingParams().stop is not SamplingParams().stop


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
def test_parameters_that_are_taken_cross_to_the_ranks_as_they_are(raw: dict[str, Any]):
    try:
        params = SamplingParams(**raw)
    except RequestError:
        return
    request = Request(id="a", prompt_token_ids=[1], params=params)
    wire = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(wire, type=Request) == request


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("id", 5),
        ("prompt_token_ids", "12"),
        ("prompt_token_ids", [1, "2"]),
        ("prompt_token_ids", [True]),
        ("prompt_token_ids", [1.0]),
        ("prompt_token_ids", None),
        ("params", {"n": 1}),
        ("params", None),
        ("prompt_logits", 1),
        ("cache_salt", ""),
        ("cache_salt", 1),
        ("cache_salt", "x" * 1025),
    ],
)
def test_a_request_made_by_hand_is_checked_too(name: str, bad: Any):
    good: dict[str, Any] = {"id": "a", "prompt_token_ids": [1], "params": SamplingParams()}
    with pytest.raises(RequestError, match=f"^{name}=.* must be "):
        Request(**{**good, name: bad})


@pytest.mark.parametrize(
    "huge",
    ["x" * 10**6, ["x" * 10**6], [["a"]] * 10**5, {"a" * 10**6: 1}, HUGE, [HUGE] * 9],
    ids=["text", "texts", "lists", "object", "number", "numbers"],
)
def test_an_error_shows_little_of_a_huge_value(huge: Any):
    good: dict[str, Any] = {"id": "a", "prompt_token_ids": [1], "params": SamplingParams()}
    makes: list[Any] = [partial(SamplingParams, **{name: huge}) for name in FIELDS]
    makes += [partial(Request, **{**good, name: huge}) for name in Request.__struct_fields__]
    texts: list[str] = []
    for make in makes:
        try:
            make()  # some fields take it, such as the id of a request
        except RequestError as error:
            texts.append(str(error))
    assert len(texts) > 20
    assert max(map(len, texts)) < 400


def test_a_huge_token_id_is_refused_in_one_line():
    request = Request(id="a", prompt_token_ids=[HUGE], params=SamplingParams())
    with pytest.raises(RequestError, match=r"prompt_token_ids: token id .* is not within 0\.\.9"):
        check_request(request, 10, 10)
