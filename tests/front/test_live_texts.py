"""The front makes the texts of its requests, except those whose ends the leader looks for."""

from __future__ import annotations

import pytest

from moespan.engine.request import OutputDelta, Request, SamplingParams
from moespan.front.live_texts import LiveTexts
from moespan.text.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.support import QUICKSTART

TEXT = "12+30=42, größer, 中文"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.from_pretrained(QUICKSTART)
    assert loaded is not None
    return loaded


def never(request_id: str) -> None:
    raise AssertionError(f"{request_id} was aborted")


def request(prompt: list[int], **settings: object) -> Request:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    return Request(id="a", prompt_token_ids=prompt, params=params)


def test_pieces_join_to_the_text_of_each_continuation(tokenizer: Tokenizer):
    texts = LiveTexts(tokenizer, never)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    cut = next(at for at in range(1, len(ids)) if "�" in tokenizer.decode(ids[:at]))
    texts.begin(request(ids[:cut], n=2))  # the prompt ends in the middle of a character
    told = ["", ""]
    for index in (0, 1):
        for number, token_id in enumerate(ids[cut:]):
            is_last = number == len(ids) - cut - 2 + index  # the first is one token shorter
            reason = "length" if is_last else None
            delta = OutputDelta(id="a", index=index, token_ids=[token_id], finish_reason=reason)
            for completed in texts.complete([delta]):
                told[completed.index] += completed.text
            if is_last:
                break
    before = tokenizer.decode(ids[:cut]).rstrip("�")
    assert before + told[1] == TEXT
    assert before + told[0] == tokenizer.decode(ids[:-1])


def test_texts_of_others_pass_as_they_are(tokenizer: Tokenizer):
    texts = LiveTexts(tokenizer, never)
    texts.begin(request([5], stop=["x"]))
    delta = OutputDelta(id="a", text="made by the leader", token_ids=[7])
    assert texts.complete([delta]) == [delta]
    unknown = OutputDelta(id="b", token_ids=[7])
    assert texts.complete([unknown])[0].text == ""
    untold = LiveTexts(None, never)
    untold.begin(request([5]))
    assert untold.complete([OutputDelta(id="a", token_ids=[7])])[0].text == ""


def test_a_fault_ends_what_is_left_of_its_request_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    aborted: list[str] = []
    texts = LiveTexts(tokenizer, aborted.append)
    texts.begin(request([5], n=3))
    ended = OutputDelta(id="a", index=1, token_ids=[7], finish_reason="stop")
    assert texts.complete([ended]) == [ended]

    def fail(self: IncrementalDetokenizer, token_ids: list[int]) -> str:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(IncrementalDetokenizer, "push", fail)
    late = OutputDelta(id="a", index=2, token_ids=[7], finish_reason="stop")
    failed = texts.complete([OutputDelta(id="a", token_ids=[7]), late])
    assert [(one.index, one.finish_reason) for one in failed] == [(0, "error"), (2, "error")]
    assert {one.error for one in failed} == {
        "the engine failed at this request with ZeroDivisionError"
    }
    assert aborted == ["a"]
