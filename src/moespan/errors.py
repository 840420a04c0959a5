"""Every error that moespan raises on purpose, with one base class, so that callers can catch all.

A message names the thing, its value, the rule that it breaks, and the fix. Values come from files
and users: `shown` and `shortened` bound what of a value gets into a message, and `printable`
escapes what would reach into a terminal.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable

_MOST_CHARACTERS = 80
_MOST_BITS = 256

# Control characters except newline and tab, halves of surrogate pairs, and the characters that
# reorder text or end a line where a terminal does not show it.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class _ShortRepr(reprlib.Repr):
    """Also takes integers that are too long for Python to write."""

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > _MOST_BITS:
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_short_repr = _ShortRepr()
_short_repr.maxlevel = 4
_short_repr.maxstring = _short_repr.maxother = _short_repr.maxlong = _MOST_CHARACTERS
_short_repr.maxlist = _short_repr.maxtuple = _short_repr.maxdict = _short_repr.maxset = 20


def shown(value: object) -> str:
    """`repr(value)` for a message, of at most 80 characters, for a value of any size."""
    return shortened(_short_repr.repr(value))


def shortened(text: object, most: int = _MOST_CHARACTERS) -> str:
    """`str(text)` for a message: printable, of at most `most` characters and one line."""
    whole = str(text)
    escaped = printable(whole[: most + 1]).replace("\n", r"\n").replace("\t", r"\t")
    return escaped if len(escaped) <= most else escaped[: most - 3] + "..."


def printable(text: str) -> str:
    """`text` with every character escaped that could control a terminal or reorder its text.

    Newlines and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def install_hint(extra: str) -> str:
    """The command that installs an extra of this project, which no package index has."""
    return f"pip install '.[{extra}]' in the folder of moespan's source"


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


class UnreachableError(MeetingError):
    """Node 0 cannot be reached, or does not answer as node 0 would."""


class JobOverError(MeetingError):
    """Node 0 does not start the ranks of the job again. The text is empty if it ends on purpose."""


class EngineDeadError(MoespanError, RuntimeError):
    """The ranks are gone; unfinished requests are lost."""
