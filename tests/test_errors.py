"""Errors can be caught by their common base class, and as built-in errors."""

from __future__ import annotations

import inspect

import pytest

from moespan import errors
from moespan.errors import CheckpointError, ConfigError, LayoutError, MoespanError, RequestError


def test_every_error_is_a_moespan_error():
    found = [member for _, member in inspect.getmembers(errors, inspect.isclass)]
    raised = [member for member in found if issubclass(member, Exception)]
    assert len(raised) > 5
    assert all(issubclass(member, MoespanError) for member in raised)


@pytest.mark.parametrize("error", [ConfigError, LayoutError, RequestError])
def test_wrong_values_are_value_errors(error: type[MoespanError]):
    assert issubclass(error, ValueError)


def test_a_checkpoint_error_lists_its_problems_one_to_a_line():
    error = CheckpointError("two things", (problem for problem in ["one", "other"]))
    assert error.problems == ["one", "other"]
    assert str(error) == "two things\n  - one\n  - other"
    assert str(CheckpointError("alone")) == "alone"
