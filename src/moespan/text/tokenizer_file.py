"""The contents of tokenizer.json, checked before the `tokenizers` library takes them in.

A tokenizer.json is a small program: normalizers rewrite the text, pre-tokenizers split it with
regular expressions, a post-processor adds tokens. 24 kB of nested rewriting rules can ask for all
memory, at load or for the first text that meets a rule, and a regular expression can take years for
one line. Only the parts that the byte-level tokenizers of this family are built from are accepted.
None of them makes a text longer by more than a small factor, or takes more than a small power of
its length. Everything is counted before the library sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from moespan.errors import shown

MOST_BYTES: Final = 64 << 20
"""Bytes of tokenizer.json; those of a vocabulary of 256,000 tokens are half of it."""

_MOST_VALUES: Final = 4 << 20
_MOST_COMPONENTS: Final = 64
_MOST_ADDED_TOKENS: Final = 1 << 15
_MOST_ADDED_CHARACTERS: Final = 1 << 20
_MOST_TEMPLATE_ITEMS: Final = 64
_MOST_PATTERN_CHARACTERS: Final = 1024

# What may stand in each place. Normalizers that replace or insert text are left out: any tokenizer
# that has one loses or changes text, which no tokenizer of this family does.
_COMPONENTS: Final = {
    "normalizer": ("Sequence", "NFC", "NFD", "NFKC", "NFKD"),
    "pre_tokenizer": (
        "Sequence",
        "Split",
        "Digits",
        "ByteLevel",
        "Metaspace",
        "Punctuation",
        "Whitespace",
        "WhitespaceSplit",
        "CharDelimiterSplit",
        "UnicodeScripts",
    ),
    "post_processor": (
        "Sequence",
        "ByteLevel",
        "TemplateProcessing",
        "BertProcessing",
        "RobertaProcessing",
    ),
}

_CHECKED: Final = (*_COMPONENTS, "decoder", "added_tokens")

# Parts of which each application makes the text longer again. One of each is allowed.
_EXPANDING: Final = ("NFKC", "NFKD", "ByteLevel", "Metaspace", "TemplateProcessing")

# A part of a regular expression: the beginning of a group, an escape, a set, a count, a character.
_PART: Final = re.compile(
    r"\((?:\?(?:[imx]*:|<?[=!]|>))?|\\[pP]\{\^?\w+\}|\\.|"
    r"\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\\[])*\]|\{\d*,?\d*\}|.",
    re.S,
)
_MOST_REPETITIONS: Final = 64
_MOST_LOOPS, _MOST_OPTIONS, _MOST_CHOICES = 2, 4, 2


def parse(data: bytes) -> dict[str, Any]:
    """The parts of tokenizer.json that `check` looks at; the vocabulary is passed over, unparsed.

    Raises:
        ValueError: `data` is not a JSON object in UTF-8, or holds too many values.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise ValueError(f"it holds over {_MOST_VALUES} values")
    try:
        parts = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return {name: msgspec.json.decode(parts[name]) for name in _CHECKED if name in parts}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None


def check(content: Mapping[str, Any]) -> None:
    """Refuse what could take more memory or time than a tokenizer of this family needs.

    Args:
        content: the parts of tokenizer.json, as `parse` returns them.

    Raises:
        ValueError: names the part and the rule that it breaks.
    """
    for place, known in _COMPONENTS.items():
        types = []
        for component in _components(content.get(place), place):
            types.append(component.get("type"))
            if types[-1] not in known:
                raise ValueError(f"a {place} of type {shown(types[-1])} is not accepted")
            _check_template(component)
        for type_ in _EXPANDING:
            if types.count(type_) > 1:
                raise ValueError(f"{place} has {type_} {types.count(type_)} times")
    for pattern in _patterns([content.get(place) for place in (*_COMPONENTS, "decoder")]):
        _check_pattern(pattern)
    _check_added_tokens(content.get("added_tokens"))


def _components(value: object, place: str) -> Iterator[Mapping[str, Any]]:
    """The components of one place and, of sequences, their components."""
    left, waiting = _MOST_COMPONENTS, [value]
    while waiting:
        component = waiting.pop()
        if component is None:
            continue
        if not isinstance(component, dict):
            raise ValueError(f"{place} holds {type(component).__name__}, not an object")
        left -= 1
        if left < 0:
            raise ValueError(f"{place} has over {_MOST_COMPONENTS} components")
        yield component
        for inner in component.values():
            if isinstance(inner, list) and component.get("type") == "Sequence":
                waiting += inner


def _check_template(component: Mapping[str, Any]) -> None:
    if component["type"] != "TemplateProcessing":
        return
    for name in ("single", "pair"):
        template = component.get(name)
        if not isinstance(template, list):
            continue
        if len(template) > _MOST_TEMPLATE_ITEMS:
            raise ValueError(f"the template {name!r} has over {_MOST_TEMPLATE_ITEMS} items")
        if sum("Sequence" in item for item in template if isinstance(item, dict)) > 2:
            raise ValueError(f"the template {name!r} repeats the text")


def _patterns(value: object) -> Iterator[object]:
    """Every regular expression in `value`."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if "Regex" in item:
                yield item["Regex"]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _check_pattern(pattern: object) -> None:
    """Refuse a regular expression that could take long.

    The library tries one choice after another. The number of tries is the product of the choices
    that follow each other, so each alternative may have few loops (`*`, `+`, `{n,m}`), few optional
    parts, and few groups of alternatives. A loop over a group, a reference back to one, and what
    only few dialects know are refused.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"a pattern is {shown(pattern)}, not a string")
    if len(pattern) > _MOST_PATTERN_CHARACTERS:
        raise ValueError(f"a pattern has over {_MOST_PATTERN_CHARACTERS} characters")
    loops = options = choices = 0
    open_groups: list[bool] = []  # whether each group has alternatives
    previous = ""
    for part in _PART.findall(pattern):
        is_count = part[0] == "{" and len(part) > 1
        follows = previous in ("*", "+", "?") or (previous[:1] == "{" and len(previous) > 1)
        if part == "[" or re.fullmatch(r"\\[1-9gk]", part) or (part == "?" and previous == "("):
            raise ValueError(f"the pattern {shown(pattern)} has {part!r}, which is not accepted")
        if part in ("*", "+") or is_count:
            if (
                previous == ")"
                or max(map(int, re.findall(r"\d+", part)), default=0) > _MOST_REPETITIONS
            ):
                raise ValueError(f"the pattern {shown(pattern)} repeats a group, or too often")
            if follows and (part, previous[0]) not in (("+", "*"), ("+", "+"), ("+", "?")):
                raise ValueError(f"the pattern {shown(pattern)} repeats a repetition")
            loops += not follows
        elif part == "?":
            options += not follows
        elif part[0] == "(":
            open_groups.append(False)
        elif part == ")" and open_groups:
            choices += open_groups.pop()
        elif part == "|" and open_groups:
            open_groups[-1] = True
        elif part == "|":
            loops = options = choices = 0
        if loops > _MOST_LOOPS or options > _MOST_OPTIONS or choices > _MOST_CHOICES:
            raise ValueError(
                f"the pattern {shown(pattern)} has over {_MOST_LOOPS} loops, {_MOST_OPTIONS} "
                f"optional parts or {_MOST_CHOICES} groups of alternatives in a row"
            )
        previous = part


def _check_added_tokens(tokens: object) -> None:
    if tokens is None:
        return
    if not isinstance(tokens, list):
        raise ValueError(f"added_tokens is {type(tokens).__name__}, not a list")
    if len(tokens) > _MOST_ADDED_TOKENS:
        raise ValueError(
            f"it has {len(tokens)} added tokens; at most {_MOST_ADDED_TOKENS} are read"
        )
    contents = [token.get("content") for token in tokens if isinstance(token, dict)]
    characters = sum(len(content) for content in contents if isinstance(content, str))
    if characters > _MOST_ADDED_CHARACTERS:
        raise ValueError(
            f"its added tokens have {characters} characters; at most {_MOST_ADDED_CHARACTERS} are "
            "read"
        )
