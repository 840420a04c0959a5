"""Every error that moespan raises on purpose. One base class, so that a caller can catch them all.

A message names the thing, its value, the rule it breaks and the way out.
"""

from __future__ import annotations

from collections.abc import Iterable


class MoespanError(Exception):
    """Base of all errors that moespan raises on purpose."""


class ConfigError(MoespanError, ValueError):
    """A model config, an engine setting or a flag that cannot be used."""


class LayoutError(ConfigError):
    """A layout that breaks a rule of the model's geometry or of the world it runs in."""


class CheckpointError(MoespanError):
    """A checkpoint that cannot be loaded. `problems` lists everything found wrong with it."""

    def __init__(self, summary: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([summary, *self.problems]))


class TokenizerError(MoespanError):
    """A tokenizer or chat template that is broken or hostile."""


class RequestError(MoespanError, ValueError):
    """A request that cannot be served as asked; the engine goes on with the others."""


class MeetingError(MoespanError, RuntimeError):
    """The nodes of one job did not come together: one is missing, or they differ."""


class EngineDeadError(MoespanError, RuntimeError):
    """The ranks are gone; nothing that was not finished will be."""
