"""Every error that moespan raises on purpose, with one base class, so that callers can catch all.

A message names the thing, its value, the rule that it breaks, and the fix.
"""

from __future__ import annotations

from collections.abc import Iterable


class MoespanError(Exception):
    """Base of all errors that moespan raises on purpose."""


class ConfigError(MoespanError, ValueError):
    """A model config, an engine setting or a flag that cannot be used."""


class LayoutError(ConfigError):
    """A layout that breaks a rule of the model's geometry or of the number of ranks."""


class CheckpointError(MoespanError):
    """A checkpoint that cannot be loaded. `problems` lists everything that is wrong with it."""

    def __init__(self, summary: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([summary, *self.problems]))


class TokenizerError(MoespanError):
    """A tokenizer or chat template that is broken or hostile."""


class RequestError(MoespanError, ValueError):
    """A request that cannot be served as asked. The engine goes on with the others."""


class MeetingError(MoespanError, RuntimeError):
    """The nodes of a job could not start together: one is missing, or they differ."""


class EngineDeadError(MoespanError, RuntimeError):
    """The ranks are gone; unfinished requests are lost."""
