"""A tokenizer.json that asks for too much is refused before the library sees it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moespan.errors import TokenizerError
from moespan.text.tokenizer_file import check
from tests.text.tokenizer_files import DEEPSEEK, DEEPSEEK_CONFIG, PLAIN, load, write

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split(pattern: object) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def nested(key: str, component: dict[str, Any], depth: int) -> dict[str, Any]:
    for _ in range(depth):
        component = {"type": "Sequence", key: [component]}
    return component


def refusal(**changes: object) -> str:
    with pytest.raises(ValueError) as caught:
        check({**json.loads(DEEPSEEK), **changes})
    assert len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize("content", [PLAIN, DEEPSEEK])
def test_the_tokenizers_of_this_family_are_accepted(content: str):
    check(json.loads(content))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 60}},
            "a normalizer of type 'Replace' is not accepted",
        ),
        ({"normalizer": {"type": "x" * 10**6}}, "a normalizer of type 'xxx"),
        ({"normalizer": {"type": "Precompiled"}}, "type 'Precompiled' is not accepted"),
        ({"normalizer": 7}, "normalizer holds int, not an object"),
        ({"normalizer": nested("normalizers", {"type": "NFC"}, 100)}, "has over 64 components"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 10**5}},
            "normalizer has over 64 components",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 2}},
            "normalizer has NFKD 2 times",
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 30}},
            "pre_tokenizer has ByteLevel 30 times",
        ),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 1}}, "'FixedLength' is not accepted"),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [{}] * 65}},
            "the template 'single' has over 64 items",
        ),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 3,
                }
            },
            "the template 'single' repeats the text",
        ),
        ({"added_tokens": {"a": 1}}, "added_tokens is dict, not a list"),
        ({"added_tokens": [{"content": "x"}] * 40_000}, "it has 40000 added tokens"),
        ({"added_tokens": [{"content": "x" * 2_000_000}]}, "have 2000000 characters"),
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "(a+)+"}}}, "repeats a group"),
    ],
)
def test_what_could_take_all_memory_is_refused(changes: dict[str, object], said: str):
    assert said in refusal(**changes)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"[一-龥ࠀ-一가-퟿]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"""
        r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    ],
)
def test_patterns_of_published_tokenizers_are_accepted(pattern: str):
    check({"pre_tokenizer": split(pattern)})


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*",
        "(?:a*)+",
        "((a+)b){2}",
        r"\s*\s*\s*x",
        r"(\s*)(\s*)(\s*)x",
        r"(a|\s*\s*|\s*\s*)b",
        "a?" * 30 + "a" * 30,
        "(a|a)" * 30 + "x",
        "a{1,64}+",
        "a{2}{3}",
        "a+*",
        "a{1,100000}",
        r"(a)\1",
        r"\g<0>",
        "(?R)",
        "(?~x)",
        "[[a]b]",
        "x" * 2000,
        7,
    ],
)
def test_patterns_that_may_take_for_ever_are_refused(pattern: object):
    assert "pattern" in refusal(pre_tokenizer=split(pattern))


def test_the_refusal_names_the_file_and_the_fix(tmp_path: Path):
    content = {**json.loads(DEEPSEEK), "normalizer": nested("normalizers", DOUBLE, 30)}
    with pytest.raises(TokenizerError) as caught:
        load(write(tmp_path, json.dumps(content), DEEPSEEK_CONFIG))
    message = str(caught.value)
    assert f"{tmp_path}/tokenizer.json is refused: a normalizer of type 'Replace'" in message
    assert "Use the tokenizer.json of the original checkpoint" in message


NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"]
)
def test_a_file_that_is_none_is_refused_at_once(
    tmp_path: Path, name: str, make: Callable[[Path], object]
):
    write(tmp_path, PLAIN, {})
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(TokenizerError, match=f"cannot read .*{name}: it is .* not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_file_that_is_too_large_is_refused(tmp_path: Path, name: str):
    write(tmp_path, PLAIN, {})
    (tmp_path / name).write_bytes(b" " * (17 << 20))
    with pytest.raises(TokenizerError, match=f"cannot read .*{name}: it has over 16777216 bytes"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"[" * 1_000_000, b"[" + b"0," * (5 << 20) + b"0]", b'{"added_tokens":' + b"9" * 9999 + b"}"],
    ids=["deep", "wide", "digits"],
)
def test_a_file_of_millions_of_values_is_refused(tmp_path: Path, content: bytes):
    write(tmp_path, PLAIN)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is"):
        load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "\x1b[2J" + "x" * 1_000_000},
        {"bos_token": ["x" * 1_000_000] * 3},
        {"add_bos_token": "x" * 1_000_000},
    ],
)
def test_a_value_is_never_echoed_whole(tmp_path: Path, config: dict[str, object]):
    with pytest.raises(TokenizerError) as caught:
        load(write(tmp_path, PLAIN, config))
    assert len(str(caught.value)) < 400 and "\x1b" not in str(caught.value)
