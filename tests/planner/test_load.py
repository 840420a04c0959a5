"""Loads: drawn from distributions, and read from traces."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moespan.errors import ConfigError
from moespan.planner.load import HASHED_TOKENS, Load, LoadRequest, drawn, encoded, read

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.0000000,12,0
"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
    {"timestamp": 3000, "input_length": 700, "output_length": 6, "hash_ids": [7, 10]},
]
OURS: list[dict[str, object]] = [
    {"arrival_s": 0, "prompt_tokens": 3, "output_tokens": 4},
    {"arrival_s": 0.5, "prompt": "two words", "output_tokens": 2},
]


def written(folder: Path, text: str | list[dict[str, object]]) -> Path:
    path = folder / "load"
    path.write_text(text if isinstance(text, str) else "\n".join(map(json.dumps, text)))
    return path


def test_a_trace_of_azure_is_sorted_and_starts_at_0(tmp_path: Path):
    load = read(written(tmp_path, AZURE))
    assert [(one.prompt_tokens, one.output_tokens) for one in load.requests] == [
        (374, 44),
        (12, 1),
        (396, 109),
    ]
    arrivals = [one.arrival_s for one in load.requests]
    assert arrivals == pytest.approx([0, 1.31941, 4.314579], abs=1e-6)


def test_speed_compresses_arrivals(tmp_path: Path):
    path = written(tmp_path, AZURE)
    slow, fast = read(path), read(path, speed=2)
    assert [one.arrival_s / 2 for one in slow.requests] == [one.arrival_s for one in fast.requests]


@pytest.mark.parametrize("instead", [{"rate": 2.0}, {"concurrency": 3}])
def test_a_speed_is_refused_where_arrival_times_do_not_count(
    tmp_path: Path, instead: dict[str, Any]
):
    with pytest.raises(ConfigError, match="--speed 2 is for the arrival times of a trace"):
        read(written(tmp_path, AZURE), speed=2, **instead)


def test_equal_blocks_of_mooncake_are_equal_tokens(tmp_path: Path):
    first, second = read(written(tmp_path, MOONCAKE)).requests
    assert (first.arrival_s, second.arrival_s) == (0, 2)
    one, other = first.token_ids(0, 1000), second.token_ids(1, 1000)
    assert (len(one), len(other)) == (1100, 700)
    assert one[:HASHED_TOKENS] == other[:HASHED_TOKENS]
    assert one[HASHED_TOKENS:700] != other[HASHED_TOKENS:]
    assert one == first.token_ids(0, 1000)
    plain = LoadRequest(0, 40, 1)
    assert plain.token_ids(0, 1000) != plain.token_ids(1, 1000)


def test_our_own_form_takes_text_that_a_tokenizer_encodes(tmp_path: Path):
    load = read(written(tmp_path, OURS))
    with pytest.raises(ConfigError, match="no tokenizer"):
        encoded(load, None)
    whole = encoded(load, lambda text: [5] * len(text.split()))
    assert [one.prompt_tokens for one in whole.requests] == [3, 2]
    assert whole.requests[1].token_ids(1, 9) == [5, 5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither JSON Lines nor a CSV"),
        ("a,b\n1,2\n", "neither JSON Lines nor a CSV with the columns TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,x,2\n", "line 2: invalid literal"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,2\n", "line 2: Invalid isoformat"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,0,2\n", "line 2: 0 prompt tokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnan,1,2\n", "line 2: the arrival time nan"),
        ('{"prompt_tokens": 3}', "line 1: output_tokens is missing"),
        ('{"output_tokens": 3}', "line 1: give one of prompt and prompt_tokens"),
        ('{"timestamp": 1}', "line 1: timestamp needs input_length"),
        ('{"prompt_tokens": "3", "output_tokens": 1}', "line 1: Expected"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, words: str):
    with pytest.raises(ConfigError, match=words):
        read(written(tmp_path, text))


def test_drawn_lengths_and_arrivals_have_their_means_and_repeat():
    load = drawn("lognormal:1000:0.6", "uniform:10:30", 4000, rate=5, seed=3)
    assert load.mean_prompt_tokens == pytest.approx(1000, rel=0.05)
    assert load.mean_output_tokens == pytest.approx(20, rel=0.03)
    assert load.rate == pytest.approx(5, rel=0.05)
    assert load == drawn("lognormal:1000:0.6", "uniform:10:30", 4000, rate=5, seed=3)
    assert load != drawn("lognormal:1000:0.6", "uniform:10:30", 4000, rate=5, seed=4)
    middle = statistics.median(one.prompt_tokens for one in load.requests)
    assert middle == pytest.approx(1000 * 2.718281828 ** (-0.18), rel=0.05)


@pytest.mark.parametrize(
    "text", ["0", "-3", "x", "uniform:5", "uniform:9:2", "lognormal:0:1", "1e9"]
)
def test_a_length_that_is_none_is_named(text: str):
    with pytest.raises(ConfigError, match="is not a number of at least 1"):
        drawn(text, "8", 1)


def test_a_load_is_named_in_plain_words():
    assert drawn("8", "4", 3, rate=1).name == "8 tokens in, 4 out, 1 request a second (Poisson)"
    assert drawn("8", "4", 3, rate=2.5).name.endswith("2.5 requests a second (Poisson)")


def test_an_engine_gets_its_share():
    load = drawn("8", "8", 4000, rate=40)
    share = load.share(4, seed=1)
    assert share.rate == pytest.approx(10, rel=0.05)
    assert len(share.requests) == 4000  # any part of Poisson arrivals is Poisson
    trace = replace(load, poisson_rate=None).share(4, seed=1)
    assert len(trace.requests) == pytest.approx(1000, rel=0.1)
    assert trace.rate == pytest.approx(10, rel=0.1)
    assert drawn("8", "8", 9, concurrency=64).share(4).concurrency == 16


def test_prompts_that_are_too_long_are_refused_or_cut_and_counted():
    load = Load((LoadRequest(0, 90, 5), LoadRequest(1, 100, 20), LoadRequest(2, 10, 500)))
    with pytest.raises(ConfigError, match="request 1 has 100 prompt and 20 output tokens"):
        load.fitting(110, clip=False)
    cut = load.fitting(110, clip=True)
    assert cut.num_clipped == 2
    assert [(one.prompt_tokens, one.output_tokens) for one in cut.requests] == [
        (90, 5),
        (90, 20),
        (1, 109),
    ]
