"""Text is returned as soon as it is certain, and ends at the first stop string, with any cuts."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moespan.engine.request import SamplingParams
from moespan.engine.text import TextStream
from tests.tiers import examples

SPECIAL = 999


class BytesTokenizer:
    """Token i stands for the i-th of some runs of bytes; `SPECIAL` is hidden on request."""

    def __init__(self, runs: Iterable[bytes] = ()) -> None:
        self.runs = list(runs) or [bytes([byte]) for byte in range(256)]

    def decode_bytes(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> bytes:
        special = b"" if skip_special_tokens else b"<end>"
        return b"".join(special if i == SPECIAL else self.runs[i] for i in token_ids)


def stream_of(
    runs: Iterable[bytes] = (), prompt: Iterable[int] = (), **settings: object
) -> TextStream:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    return TextStream(BytesTokenizer(runs), params, list(prompt))  # type: ignore[arg-type]


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Start and text of the stop string that is complete first, the longest of equals."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return end - len(longest), longest
    return None


def undecided(text: str, stops: list[str]) -> int:
    """Number of characters at the end of `text` that may begin a stop string."""
    lengths = {n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])}
    return max(lengths, default=0)


letters = st.text(alphabet="ab中", max_size=25)
stop_strings = st.lists(st.text(alphabet="ab中", min_size=1, max_size=4), max_size=4)


@st.composite
def cut_texts(draw: st.DrawFn) -> list[list[bytes]]:
    """A text as steps of some tokens each; cuts may fall inside characters, the end as well."""
    data = draw(letters).encode() + draw(st.sampled_from([b"", b"\xe4", b"\xe4\xb8"]))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    tokens = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    steps: list[list[bytes]] = [[]]
    for token in tokens:
        if draw(st.booleans()):
            steps.append([])
        steps[-1].append(token)
    return steps


@settings(max_examples=examples(1000))
@given(steps=cut_texts(), stops=stop_strings, include=st.booleans())
def test_the_pieces_join_to_the_text_cut_at_its_first_stop_string(
    steps: list[list[bytes]], stops: list[str], include: bool
):
    runs = [run for step in steps for run in step]
    stream = stream_of(runs, stop=stops, include_stop_str_in_output=include)
    text, at = "", 0
    for number, step in enumerate(steps, 1):
        token_ids = list(range(at, at + len(step)))
        at += len(step)
        text += stream.push(token_ids, may_stop=True, is_last=number == len(steps))
        if stream.stopped_by is not None:
            break
    whole = b"".join(runs).decode("utf-8", "replace")
    found = first_stop(whole, stops)
    if found is None:
        assert (text, stream.stopped_by) == (whole, None)
    else:
        start, stop = found
        assert (text, stream.stopped_by) == (whole[: start + len(stop) * include], stop)


@settings(max_examples=examples(1000))
@given(steps=cut_texts(), stops=stop_strings)
def test_exactly_the_possible_beginning_of_a_stop_string_is_held_back(
    steps: list[list[bytes]], stops: list[str]
):
    stream = stream_of([run for step in steps for run in step], stop=stops)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoded, text, at = "", "", 0
    for step in steps:
        text += stream.push(list(range(at, at + len(step))), may_stop=True, is_last=False)
        at += len(step)
        if stream.stopped_by is not None:
            return
        decoded += decoder.decode(b"".join(step))
        assert text == decoded[: len(decoded) - undecided(decoded, stops)]


def push_all(stream: TextStream, text: str, **flags: bool) -> str:
    return stream.push(list(text.encode()), **{"may_stop": True, "is_last": False, **flags})


def test_a_stop_string_may_span_steps_and_is_left_out():
    stream = stream_of(stop=["END"])
    assert [push_all(stream, part) for part in ("one E", "N", "D two")] == ["one ", "", ""]
    assert stream.stopped_by == "END"


def test_a_stop_string_is_kept_on_request_but_nothing_after_it():
    stream = stream_of(stop=["END"], include_stop_str_in_output=True)
    assert push_all(stream, "one E") + push_all(stream, "ND two") == "one END"


def test_a_beginning_that_does_not_continue_is_returned():
    stream = stream_of(stop=["abab!"])
    assert [push_all(stream, part) for part in ("xab", "ab", "ab", "?")] == ["x", "", "ab", "abab?"]


def test_the_stop_string_that_is_complete_first_counts():
    for parts in (["abcd"], ["abc", "d"], ["a", "b", "c", "d"]):
        stream = stream_of(stop=["bcd", "c"])
        text = ""
        for part in parts:
            if stream.stopped_by is None:
                text += push_all(stream, part)
        assert (text, stream.stopped_by) == ("ab", "c")


def test_stop_strings_do_not_count_before_they_may():
    stream = stream_of(stop=["ab"])
    assert push_all(stream, "xaby", may_stop=False) == "xaby"
    assert push_all(stream, "za", may_stop=False) == "z"
    assert push_all(stream, "b") == ""
    assert stream.stopped_by == "ab"


def test_the_last_push_holds_nothing_back():
    stream = stream_of(stop=["stop"])
    assert push_all(stream, "st") == ""
    assert push_all(stream, "o", is_last=True) == "sto"
    assert stream.stopped_by is None


def test_the_last_push_may_still_find_a_stop_string():
    stream = stream_of(stop=["\N{REPLACEMENT CHARACTER}"])
    assert stream.push([ord("a"), 0xE4], may_stop=True, is_last=True) == "a"
    assert stream.stopped_by == "\N{REPLACEMENT CHARACTER}"


def test_half_a_character_is_never_returned():
    stream = stream_of()
    first, second, third = "中".encode()
    assert stream.push([first], may_stop=True, is_last=False) == ""
    assert stream.push([second], may_stop=True, is_last=False) == ""
    assert stream.push([third], may_stop=True, is_last=False) == "中"
    assert stream.push([first], may_stop=True, is_last=True) == "\N{REPLACEMENT CHARACTER}"


def test_a_character_that_the_prompt_begins_is_completed():
    first, *rest = "中".encode()
    stream = stream_of(prompt=[*b"so ", first])
    assert stream.push(rest, may_stop=True, is_last=True) == "中"


@pytest.mark.parametrize(("skip", "expected"), [(True, "ab"), (False, "a<end>b")])
def test_special_tokens_are_in_the_text_only_on_request(skip: bool, expected: str):
    stream = stream_of(skip_special_tokens=skip)
    assert stream.push([ord("a"), SPECIAL, ord("b")], may_stop=True, is_last=True) == expected


def test_without_stop_strings_everything_comes_at_once():
    stream = stream_of()
    assert [push_all(stream, part) for part in ("ab", "", "c")] == ["ab", "", "c"]
