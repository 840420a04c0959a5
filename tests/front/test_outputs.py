"""An output is the sum of the deltas of all steps."""

from __future__ import annotations

from typing import Any

from moespan.engine.request import OutputDelta, Request, SamplingParams, TokenLogprobs
from moespan.front.outputs import RequestOutput


def begin(**settings: Any) -> RequestOutput:
    params = SamplingParams(**settings)
    return RequestOutput.begin(Request(id="r", prompt_token_ids=[7, 8], params=params), "text")


def score(token_id: int, logprob: float) -> TokenLogprobs:
    return TokenLogprobs(token_id, logprob, [])


def test_an_output_begins_empty_with_the_prompt():
    output = begin(n=2)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "text", [7, 8])
    assert [(one.index, one.text, one.token_ids) for one in output.outputs] == [
        (0, "", []),
        (1, "", []),
    ]
    assert not output.finished
    assert output.error is None


def test_deltas_add_up():
    output = begin(logprobs=0)
    output.add(OutputDelta(id="r", text="a", token_ids=[1], logprobs=[score(1, -0.5)]))
    output.add(OutputDelta(id="r", text="", token_ids=[2], logprobs=[score(2, -1.0)]))
    output.add(
        OutputDelta(
            id="r",
            text="bc",
            token_ids=[3],
            logprobs=[score(3, -0.25)],
            finish_reason="stop",
            stop_reason=3,
        )
    )
    (one,) = output.outputs
    assert (one.text, one.token_ids) == ("abc", [1, 2, 3])
    assert (one.finish_reason, one.stop_reason) == ("stop", 3)
    assert one.logprobs == [score(1, -0.5), score(2, -1.0), score(3, -0.25)]
    assert one.cumulative_logprob == -1.75


def test_continuations_are_kept_apart_and_all_must_end():
    output = begin(n=2)
    output.add(OutputDelta(id="r", index=1, text="second", finish_reason="length"))
    assert not output.finished
    output.add(OutputDelta(id="r", index=0, text="first", finish_reason="stop"))
    assert output.finished
    assert [one.text for one in output.outputs] == ["first", "second"]


def test_the_error_of_any_continuation_is_that_of_the_request():
    output = begin(n=2)
    output.add(OutputDelta(id="r", index=1, finish_reason="error", error="not finite"))
    assert output.error == "not finite"
    assert output.outputs[0].error is None


def test_the_prompt_is_reported_over_several_steps():
    output = begin(prompt_logprobs=0)
    output.add(OutputDelta(id="r", prompt_logits=b"1234", num_cached_tokens=0))
    output.add(OutputDelta(id="r", prompt_logprobs=[score(8, -2.0)], prompt_logits=b"5678"))
    output.add(OutputDelta(id="r", text="a", num_cached_tokens=1))
    assert output.prompt_logprobs == [None, score(8, -2.0)]
    assert output.prompt_logits == b"12345678"
    assert output.num_cached_tokens == 1


def test_scores_are_lists_if_asked_for_and_else_none():
    plain, asked = begin(), begin(logprobs=0, prompt_logprobs=0)
    assert (plain.outputs[0].logprobs, plain.prompt_logprobs) == (None, None)
    assert plain.outputs[0].cumulative_logprob is None
    assert (asked.outputs[0].logprobs, asked.prompt_logprobs) == ([], [None])
    assert asked.outputs[0].cumulative_logprob == 0
