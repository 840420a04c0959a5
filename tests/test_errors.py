"""Errors can be caught by their common base class, and as built-in errors."""

from __future__ import annotations

import inspect

import pytest

from moespan import errors
from moespan.errors import (
    CheckpointError,
    ConfigError,
    LayoutError,
    MoespanError,
    RequestError,
    printable,
    shortened,
    shown,
)


def test_every_error_is_a_moespan_error():
    found = [member for _, member in inspect.getmembers(errors, inspect.isclass)]
    raised = [member for member in found if issubclass(member, Exception)]
    assert len(raised) > 5
    assert all(issubclass(member, MoespanError) for member in raised)


@pytest.mark.parametrize("error", [ConfigError, LayoutError, RequestError])
def test_wrong_values_are_value_errors(error: type[MoespanError]):
    assert issubclass(error, ValueError)


@pytest.mark.parametrize("value", [None, True, 7, 1.5, "it's", ["a", {"b": (1, 2)}], "表", 10**70])
def test_a_short_value_is_shown_as_it_is(value: object):
    assert shown(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        "x" * 1_000_000,
        ["x" * 1_000] * 1_000,
        [10**4000] * 50,
        {str(i): i for i in range(100_000)},
        10**100_000,
        "\x1b" * 1_000_000,
        [[[[[[[[["deep"]]]]]]]]],
        b"x" * 1_000_000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_value_is_shown_whole(value: object):
    assert 0 < len(shown(value)) <= 80
    assert 0 < len(shortened(str(value)[:1_000])) <= 80 if type(value) is not int else True


def test_a_long_integer_is_shown_by_its_size():
    assert shown(10**5000) == "an integer of 16610 bits"


def test_what_could_control_a_terminal_is_escaped():
    hostile = "\x1b[2J\r\x07\x00\x9b1m\u202egpj\u2028\udc00"
    assert printable(f"a\n\tb {hostile}") == (
        r"a" "\n\t" r"b \x1b[2J\r\x07\x00\x9b1m\u202egpj\u2028\udc00"
    )
    assert printable("混合专家 🙂 é") == "混合专家 🙂 é"
    assert shortened("one\ntwo\tthree\r") == r"one\ntwo\tthree\r"


def test_a_checkpoint_error_lists_its_problems_one_to_a_line():
    error = CheckpointError("two things", (problem for problem in ["one", "other"]))
    assert error.problems == ["one", "other"]
    assert str(error) == "two things\n  - one\n  - other"
    assert str(CheckpointError("alone")) == "alone"
