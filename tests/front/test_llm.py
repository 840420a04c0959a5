"""`LLM` answers every prompt, independent of batching, and goes on after errors."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from moespan import LLM, MoespanError, RequestOutput, SamplingParams
from moespan.engine.engine import Engine
from moespan.engine.integrity import check_scheduler
from moespan.engine.request import OutputDelta, Request
from moespan.engine.results import Pending
from moespan.engine.text import TextStream
from moespan.engine.worker import Worker
from moespan.errors import ConfigError, EngineDeadError, LayoutError, RequestError
from moespan.text.tokenizer import IncrementalDetokenizer
from tests.support import QUICKSTART, Oracle, altered_checkpoint, write_config

GREEDY = SamplingParams(temperature=0, max_tokens=24)
BEGIN, END = 0, 1


def greedy(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, **settings})


def engine(llm: LLM) -> Engine:
    return llm._client._engine  # type: ignore[attr-defined]


def assert_idle(llm: LLM) -> None:
    """Assert that no request has left a sequence, a text, or a block in use."""
    scheduler = engine(llm)._replicas.schedulers[0]
    check_scheduler(scheduler)
    assert not scheduler.has_unfinished
    assert scheduler.allocator.num_used == 0
    assert not engine(llm)._live
    assert not llm._live


def text_of(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logits_of(llm: LLM, token_ids: list[int]) -> np.ndarray:
    """The model's logits [T, V] at every position, computed as `verify` does."""
    request = llm.request(token_ids, greedy(max_tokens=1), prompt_logits=True)
    (output,) = llm.stream([request])
    return np.frombuffer(output.prompt_logits, np.float32).reshape(len(token_ids), -1)


@pytest.fixture(scope="module")
def quickstart() -> Iterator[LLM]:
    """The quickstart model in float32, idle again after every test."""
    with LLM(str(QUICKSTART), device="cpu", dtype="float32", tensor_parallel_size=1) as llm:
        yield llm


@pytest.fixture
def llm(quickstart: LLM) -> Iterator[LLM]:
    yield quickstart
    assert_idle(quickstart)


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., LLM]:
    """Makes tiny, fast engines with random weights and without a tokenizer."""

    def make(**settings: Any) -> LLM:
        folder = write_config(tmp_path / "small")
        return LLM(str(folder), device="cpu", load_format="dummy", **settings)

    return make


# Prompts


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM):
    prompts = [f"{a}+{b}=" for a in range(2, 10) for b in range(2, 10)]
    limits = itertools.cycle([1, 9, 2, 24, 5])
    params = [greedy(max_tokens=limit) for limit, _ in zip(limits, prompts, strict=False)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    for output, one in zip(outputs, params, strict=True):
        assert output.prompt is not None and one.max_tokens is not None
        a, b = map(int, output.prompt.rstrip("=").split("+"))
        answer = str(a + b)
        assert output.outputs[0].text == answer[: one.max_tokens]
        done = one.max_tokens > len(answer)
        assert output.outputs[0].finish_reason == ("stop" if done else "length")


def test_text_token_ids_and_dicts_are_the_same_prompt(llm: LLM):
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("347+85=")
    ways: list[Any] = [
        "347+85=",
        ids,
        {"prompt": "347+85="},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "prompt": "what it is called"},
    ]
    outputs = llm.generate(ways, GREEDY)
    assert text_of(outputs) == ["432"] * len(ways)
    assert [output.prompt_token_ids for output in outputs] == [ids] * len(ways)
    assert [output.prompt for output in outputs] == ["347+85=", None, "347+85=", None, None]
    for way in ways:
        (alone,) = llm.generate(way, GREEDY)
        assert alone.outputs[0].text == "432"


def test_no_prompts_have_no_outputs(llm: LLM):
    assert llm.generate([]) == []
    assert llm.chat([]) == []
    assert list(llm.stream([])) == []


def test_one_conversation_or_several_are_answered_through_the_template(llm: LLM):
    sums = [[{"role": "user", "content": f"{a}+30="}] for a in (12, 20, 31)]
    outputs = llm.chat(sums, GREEDY)
    assert [output.outputs[0].text.strip() for output in outputs] == ["42", "50", "61"]
    assert outputs[0].prompt == "<|begin|>User: 12+30=\n\nAssistant:"
    # The template writes the begin token, so it occurs once.
    assert outputs[0].prompt_token_ids.count(BEGIN) == 1
    (alone,) = llm.chat(sums[0], GREEDY)
    assert alone.outputs == outputs[0].outputs


def test_sampling_parameters_are_one_for_all_one_for_each_or_the_default(llm: LLM):
    prompts = ["1+1=", "2+2="]
    same = llm.generate(prompts, greedy(max_tokens=1))
    assert tokens_of(same) == [
        ids[:1] for ids in tokens_of(llm.generate(prompts, [GREEDY, GREEDY]))
    ]
    each = llm.generate(prompts, [greedy(max_tokens=5, ignore_eos=True), greedy(max_tokens=1)])
    assert [len(ids) for ids in tokens_of(each)] == [5, 1]
    assert [len(output.outputs) for output in llm.generate(prompts)] == [1, 1]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_sampling_parameters_is_refused(llm: LLM, count: int):
    with pytest.raises(RequestError, match=f"^{count} sampling parameters for 2 prompts"):
        llm.generate(["1+1=", "2+2="], [GREEDY] * count)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (5, "5 is neither text nor a list of token ids"),
        (None, "None is neither"),
        ([0, "1"], r"\[0, '1'\] is neither"),
        ([0, True], "is neither"),
        ({"text": "1+1="}, r"\{'text': '1\+1='\} is neither"),
        ([], "the prompt is empty"),
        ([0, 512], r"prompt_token_ids: token id 512 is not within 0\.\.511"),
        ([0, -1], "token id -1"),
        ([0] * 512, "the prompt has 512 tokens; max_model_len=512"),
        ("half \ud83d", "half of a surrogate pair"),
    ],
)
def test_an_error_names_the_prompt_and_nothing_is_run(llm: LLM, bad: Any, says: str):
    with pytest.raises(RequestError, match=f"^prompt 1: .*{says}"):
        llm.generate(["1+1=", bad, "2+2="])
    assert_idle(llm)


def test_an_error_names_the_parameters_that_do_not_fit_the_model(llm: LLM):
    params = [GREEDY, greedy(stop_token_ids=[600])]
    with pytest.raises(RequestError, match=r"^prompt 1: stop_token_ids: token id 600"):
        llm.generate(["1+1=", "2+2="], params)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "messages is empty"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'"),
        ([{"role": "user", "content": None}], "must be a string"),
        ("hello", "messages is str"),
    ],
)
def test_an_error_names_the_conversation(llm: LLM, bad: Any, says: str):
    good = [{"role": "user", "content": "1+1="}]
    with pytest.raises(RequestError, match=f"^prompt 1: .*{says}"):
        llm.chat([good, bad])


def test_without_a_tokenizer_token_ids_work_and_text_is_refused_with_the_fix(
    small: Callable[..., LLM],
):
    with small() as llm:
        assert llm.tokenizer is None
        (output,) = llm.generate([3, 1, 4], greedy(max_tokens=4, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 4
        assert output.outputs[0].text == ""
        with pytest.raises(RequestError, match=r"no tokenizer\.json; give token ids"):
            llm.generate("text")
        with pytest.raises(RequestError, match=r"^prompt 0: chat needs a tokenizer"):
            llm.chat([{"role": "user", "content": "hello"}])
        # The engine finds this error; only the request fails.
        (output,) = llm.generate([3, 1, 4], greedy(stop=["."]))
        assert output.error is not None
        assert "use stop_token_ids" in output.error
        (output,) = llm.generate([3, 1, 4], greedy(bad_words=["a"]))
        assert output.error is not None
        assert "use logit_bias" in output.error
        assert_idle(llm)


def test_a_progress_bar_is_shown_when_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.generate(["1+1=", "2+2="], GREEDY)
    assert capsys.readouterr() == ("", "")
    llm.generate(["1+1=", "2+2="], GREEDY, use_tqdm=True)
    assert "2/2" in capsys.readouterr().err


# Ends


def test_a_stop_string_ends_the_text_before_it(llm: LLM):
    (output,) = llm.generate("sort 42 7 93:", greedy(stop=["42", "93"]))
    one = output.outputs[0]
    assert (one.text, one.finish_reason, one.stop_reason) == (" 7 ", "stop", "42")
    (output,) = llm.generate("sort 42 7 93:", greedy(stop=["42"], include_stop_str_in_output=True))
    assert output.outputs[0].text == " 7 42"


def test_a_stop_token_ends_the_output(llm: LLM):
    whole = llm.generate("sort 42 7 93:", GREEDY)[0].outputs[0]
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (" 7 42 93", "stop", None)
    stop = whole.token_ids[3]
    cut = llm.generate("sort 42 7 93:", greedy(stop_token_ids=[stop]))[0].outputs[0]
    assert cut.token_ids == whole.token_ids[:4]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_min_tokens_bars_every_end(llm: LLM):
    settings = {"min_tokens": 12, "stop": ["432"], "stop_token_ids": [21]}
    one = llm.generate("347+85=", greedy(**settings))[0].outputs[0]
    assert len(one.token_ids) >= 12
    assert not {21, END} & set(one.token_ids[:11])


def test_only_allowed_token_ids_come(llm: LLM):
    allowed = [15, 16, 17, 18]
    for params in (greedy(), SamplingParams(max_tokens=30, seed=3)):
        params = replace(params, allowed_token_ids=allowed)
        one = llm.generate("347+85=", params)[0].outputs[0]
        assert set(one.token_ids) <= set(allowed)
        assert one.finish_reason == "length"  # EOS is not among them


def test_bad_words_do_not_come_at_the_beginning_or_after_a_space(llm: LLM):
    assert llm.generate("sort 42 7 93:", GREEDY)[0].outputs[0].text == " 7 42 93"
    for words in (["42"], ["7", "93"], [" 4"]):
        one = llm.generate("sort 42 7 93:", greedy(bad_words=words))[0].outputs[0]
        assert not any(word in one.text for word in words), one.text


def test_constraints_that_leave_no_token_end_their_own_request(llm: LLM):
    good = llm.request("681+734=", GREEDY)
    impossible = greedy(allowed_token_ids=[21], stop_token_ids=[21], min_tokens=2)
    outputs = [*llm.stream([llm.request("1+1=", impossible), good])]
    errors = {output.outputs[0].text: output.error for output in outputs}
    assert errors["1415"] is None
    assert errors[""] is not None and errors[""].startswith("no token can come next")
    assert_idle(llm)


def test_ignore_eos_makes_eos_a_token_like_any_other(llm: LLM):
    plain = llm.generate("347+85=", greedy(ignore_eos=True, max_tokens=9))[0].outputs[0]
    assert plain.token_ids[:4] == [21, 20, 19, END]
    assert (len(plain.token_ids), plain.finish_reason) == (9, "length")
    assert "<|end|>" not in plain.text
    shown = greedy(ignore_eos=True, max_tokens=9, skip_special_tokens=False)
    assert llm.generate("347+85=", shown)[0].outputs[0].text.startswith("432<|end|>")


def test_logit_bias_makes_and_breaks_tokens(llm: LLM):
    forced = llm.generate("347+85=", greedy(logit_bias={END: 100.0}))[0].outputs[0]
    assert (forced.token_ids, forced.text, forced.finish_reason) == ([END], "", "stop")
    banned = llm.generate("347+85=", greedy(logit_bias={21: -100.0}))[0].outputs[0]
    assert 21 not in banned.token_ids


def test_an_output_ends_at_the_models_length(small: Callable[..., LLM]):
    with small(max_model_len=20) as llm:
        (output,) = llm.generate([5] * 17, greedy(max_tokens=None, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 3
        assert output.outputs[0].finish_reason == "length"


# Samples and scores


@pytest.mark.parametrize("story", ["Story: Mia, fox, lake.", "A fox saw the lake. " * 9])
def test_n_continuations_are_those_of_n_requests_with_following_seeds(llm: LLM, story: str):
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5}
    (together,) = llm.generate(story, SamplingParams(n=3, seed=7, **settings))
    alone = llm.generate([story] * 3, [SamplingParams(seed=7 + i, **settings) for i in range(3)])
    assert [one.index for one in together.outputs] == [0, 1, 2]
    assert [one.token_ids for one in together.outputs] == tokens_of(alone)
    assert [one.text for one in together.outputs] == text_of(alone)
    assert len(set(text_of(alone))) == 3


def test_requests_without_a_seed_are_drawn_from_the_engines(small: Callable[..., LLM]):
    def draws(seed: int) -> list[list[int]]:
        with small(seed=seed) as llm:
            return tokens_of(llm.generate([[3, 1]] * 4, SamplingParams(ignore_eos=True)))

    first = draws(0)
    assert len({tuple(ids) for ids in first}) == 4
    assert draws(0) == first


def test_logprobs_are_those_of_the_models_own_distribution(llm: LLM):
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode("Story: Mia, fox, lake.")
    params = SamplingParams(
        max_tokens=12, temperature=2.0, top_k=40, seed=3, logprobs=4, ignore_eos=True
    )
    one = llm.generate(prompt, params)[0].outputs[0]
    expected = log_softmax(logits_of(llm, prompt + one.token_ids))[len(prompt) - 1 : -1]
    assert one.logprobs is not None
    assert [entry.token_id for entry in one.logprobs] == one.token_ids
    for entry, row in zip(one.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
        best = np.argsort(-row, kind="stable")[:4]
        assert [token for token, _ in entry.top] == best.tolist()
        assert [score for _, score in entry.top] == pytest.approx(row[best].tolist(), abs=1e-4)
    total = sum(row[token] for row, token in zip(expected, one.token_ids, strict=True))
    assert one.cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(("max_num_batched_tokens", "max_tokens"), [(3, 1), (3, 0), (2048, 0)])
def test_prompt_logprobs_are_one_for_each_token_but_the_first(
    small: Callable[..., LLM], max_num_batched_tokens: int, max_tokens: int
):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    with small(max_num_seqs=1, max_num_batched_tokens=max_num_batched_tokens) as llm:
        (output,) = llm.generate(prompt, greedy(max_tokens=max_tokens, prompt_logprobs=2))
        assert len(output.outputs[0].token_ids) == max_tokens
        assert output.outputs[0].finish_reason == "length"
        expected = log_softmax(logits_of(llm, prompt))
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        others = [entry for entry in output.prompt_logprobs[1:] if entry is not None]
        assert [entry.token_id for entry in others] == prompt[1:]
        for entry, row in zip(others, expected, strict=False):
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-5)
            assert [token for token, _ in entry.top] == np.argsort(-row)[:2].tolist()


def test_each_continuation_says_once_how_long_it_took_to_its_first_token(llm: LLM):
    deltas: list[OutputDelta] = []
    requests = [
        llm.request("A fox saw the lake. " * 9, greedy(n=3, max_tokens=4, prompt_logprobs=0)),
        llm.request("Mia", greedy(max_tokens=0)),
    ]
    started = time.monotonic()
    list(llm.stream(requests, observe=deltas.append))
    took_s = time.monotonic() - started
    timed = [delta for delta in deltas if delta.timing is not None]
    assert len(timed) == 4
    for delta in timed:
        assert delta.timing is not None
        assert len(delta.token_ids) == 1 or delta.finish_reason == "length"
        assert min(delta.timing.queued_s, delta.timing.prefill_s) >= 0
        assert delta.timing.queued_s + delta.timing.prefill_s <= took_s


def test_scores_that_were_asked_for_are_lists_and_others_none(small: Callable[..., LLM]):
    with small() as llm:
        (asked,) = llm.generate([3], greedy(max_tokens=2, logprobs=0, prompt_logprobs=0))
        assert asked.prompt_logprobs == [None]
        scores = asked.outputs[0].logprobs
        assert scores is not None
        assert [entry.top for entry in scores] == [[], []]
        (plain,) = llm.generate([3], greedy(max_tokens=2))
        assert plain.prompt_logprobs is None
        assert plain.outputs[0].logprobs is None
        assert plain.outputs[0].cumulative_logprob is None


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "max_num_batched_tokens": 5},
        {"max_num_seqs": 16, "max_num_batched_tokens": 16},
        {"enable_prefix_caching": False, "block_size": 3},
    ],
)
def test_a_seeded_request_gets_the_same_tokens_whatever_shares_its_batch(
    small: Callable[..., LLM], settings: dict[str, Any]
):
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [5] * 12, [3, 1, 4, 1, 5]]
    params = [
        SamplingParams(seed=11, max_tokens=16, ignore_eos=True),
        SamplingParams(seed=12, max_tokens=16, ignore_eos=True, top_p=0.8),
        SamplingParams(seed=13, max_tokens=16, ignore_eos=True, top_k=20, presence_penalty=0.5),
        SamplingParams(seed=14, max_tokens=16, ignore_eos=True, temperature=0.7),
    ]
    strangers = [[number % 60, 7] for number in range(9)]
    with small() as llm:
        alone = [
            llm.generate(prompt, one)[0].outputs[0].token_ids
            for prompt, one in zip(prompts, params, strict=True)
        ]
    with small(**settings) as llm:
        noise = [SamplingParams(max_tokens=3 + number) for number in range(9)]
        outputs = llm.generate(
            [*strangers[:4], *prompts, *strangers[4:]], [*noise[:4], *params, *noise[4:]]
        )
        assert tokens_of(outputs[4:8]) == alone
        assert_idle(llm)


# Independence of batching


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle("tiny_gqa")


@pytest.fixture(scope="module")
def alone(oracle: Oracle) -> list[list[int]]:
    """Output of each prompt when it runs alone, equal to that of the Hugging Face model."""
    params = greedy(ignore_eos=True)
    with LLM(str(oracle.folder), device="cpu", dtype="float32") as llm:
        found = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in oracle.prompts]
    assert found == oracle.greedy
    return found


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="all at once"),
        pytest.param({"max_num_seqs": 2}, id="two at a time"),
        pytest.param({"max_num_seqs": 3, "max_num_batched_tokens": 7}, id="chunks of 7 tokens"),
        pytest.param({"max_num_batched_tokens": 64, "block_size": 1}, id="blocks of one token"),
        pytest.param({"enable_prefix_caching": False}, id="without prefix cache"),
        pytest.param({"async_scheduling": True}, id="planned ahead"),
        pytest.param(
            {"async_scheduling": True, "max_num_seqs": 3, "max_num_batched_tokens": 7},
            id="planned ahead in chunks",
        ),
    ],
)
def test_batching_changes_no_greedy_token(
    oracle: Oracle, alone: list[list[int]], settings: dict[str, Any]
):
    with LLM(str(oracle.folder), device="cpu", dtype="float32", **settings) as llm:
        outputs = llm.generate(oracle.prompts, greedy(ignore_eos=True))
        assert tokens_of(outputs) == alone
        assert_idle(llm)


def test_the_next_step_starts_before_the_previous_result_is_awaited(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    execute, wait = Worker.execute, Pending.wait

    def noted_execute(*args: Any) -> Any:
        order.append("start")
        return execute(*args)

    def noted_wait(self: Pending) -> Any:
        order.append("wait")
        return wait(self)

    monkeypatch.setattr(Worker, "execute", noted_execute)
    monkeypatch.setattr(Pending, "wait", noted_wait)
    params = greedy(ignore_eos=True, max_tokens=4)
    orders = []
    for ahead in (False, True):
        with LLM(str(oracle.folder), device="cpu", dtype="float32", async_scheduling=ahead) as llm:
            llm.generate(oracle.prompts[0], params)
        orders.append(order.copy())
        order.clear()
    assert orders[0] == ["start", "wait"] * 4
    assert orders[1] == ["start", *["start", "wait"] * 3, "wait"]


def test_a_plan_made_ahead_of_a_stop_is_finished_before_a_trace(oracle: Oracle):
    with LLM(str(oracle.folder), device="cpu", dtype="float32", async_scheduling=True) as llm:
        (free,) = llm.generate(oracle.prompts[0], greedy(ignore_eos=True))
        stop = free.outputs[0].token_ids[2]
        (output,) = llm.generate(oracle.prompts[0], greedy(stop_token_ids=[stop]))
        cut = free.outputs[0].token_ids.index(stop) + 1
        assert output.outputs[0].token_ids == free.outputs[0].token_ids[:cut]
        assert llm.trace([3, 1, 4])  # a trace needs an idle engine
        assert_idle(llm)


@pytest.mark.parametrize("ahead", [False, True])
def test_preemption_changes_no_greedy_token(oracle: Oracle, alone: list[list[int]], ahead: bool):
    settings: dict[str, Any] = {"block_size": 4, "num_blocks": 64, "async_scheduling": ahead}
    with LLM(str(oracle.folder), device="cpu", dtype="float32", **settings) as llm:
        twice = oracle.prompts * 2
        outputs = llm.generate(twice, greedy(ignore_eos=True))
        assert llm.stats().num_preemptions > 0
        assert tokens_of(outputs) == alone * 2
        assert_idle(llm)


def test_prefix_hits_change_no_greedy_token(oracle: Oracle, alone: list[list[int]]):
    with LLM(str(oracle.folder), device="cpu", dtype="float32", block_size=8) as llm:
        params = greedy(ignore_eos=True)
        assert tokens_of(llm.generate(oracle.prompts, params)) == alone
        again = llm.generate(oracle.prompts, params)
        assert tokens_of(again) == alone
        # All full blocks but that of the last token, which is always computed.
        cached = [(len(prompt) - 1) // 8 * 8 for prompt in oracle.prompts]
        assert [output.num_cached_tokens for output in again] == cached
        assert llm.stats().num_prefix_hit_tokens == sum(cached)
        # Prompt and output of an earlier request are a prefix, too.
        longer = oracle.prompts[3] + alone[3][:16]
        (output,) = llm.generate(longer, greedy(ignore_eos=True, max_tokens=8))
        assert output.outputs[0].token_ids == alone[3][16:]
        assert output.num_cached_tokens == (len(longer) - 1) // 8 * 8


# Streams


def numbered(
    llm: LLM, count: int, taken: list[int], max_tokens: int, longer_by: int = 0
) -> Iterable[Any]:
    """`count` requests, each `longer_by` than the last; tells `taken` as each is asked for."""
    for number in range(count):
        taken.append(number)
        params = greedy(ignore_eos=True, max_tokens=max_tokens + number * longer_by)
        yield llm.request([number % 60, 7], params)


def test_a_stream_never_takes_requests_ahead_of_need(small: Callable[..., LLM]):
    taken: list[int] = []
    furthest = finished = 0
    with small(max_num_seqs=32, max_model_len=8) as llm:
        for output in llm.stream(numbered(llm, 10_000, taken, max_tokens=1)):
            furthest = max(furthest, len(taken) - finished)
            finished += 1
            assert output.finished
            assert len(llm._live) <= 64
        assert_idle(llm)
    assert finished == len(taken) == 10_000
    assert furthest <= 64


def test_a_stream_yields_what_is_finished_first(small: Callable[..., LLM]):
    with small() as llm:
        long = llm.request([1], greedy(max_tokens=40, ignore_eos=True))
        short = llm.request([2], greedy(max_tokens=3, ignore_eos=True))
        yielded = [output.request_id for output in llm.stream([long, short])]
        assert yielded == [short[1].id, long[1].id]


def test_an_abandoned_stream_frees_its_blocks_and_the_engine_goes_on(small: Callable[..., LLM]):
    taken: list[int] = []
    with small(max_num_seqs=4) as llm:
        (before,) = llm.generate([3, 1, 4], greedy(ignore_eos=True))
        stream = llm.stream(numbered(llm, 100, taken, max_tokens=10, longer_by=1))
        next(stream)
        assert llm.stats().num_running > 0
        stream.close()
        assert len(taken) <= 12
        assert_idle(llm)
        (after,) = llm.generate([3, 1, 4], greedy(ignore_eos=True))
        assert after.outputs == before.outputs


def test_an_error_in_the_source_of_a_stream_leaves_nothing_behind(small: Callable[..., LLM]):
    def source(llm: LLM) -> Iterable[Any]:
        yield llm.request([1], GREEDY)
        yield llm.request([2], GREEDY)
        raise KeyError("gone")

    with small() as llm:
        with pytest.raises(KeyError):
            list(llm.stream(source(llm)))
        assert_idle(llm)


def test_streams_may_be_mixed(small: Callable[..., LLM]):
    with small(max_num_seqs=4) as llm:
        expected = llm.generate([[3, 1, 4]], greedy(ignore_eos=True))[0].outputs
        outer = 0
        for _ in llm.stream(numbered(llm, 20, [], max_tokens=6)):
            outer += 1
            assert llm.generate([[3, 1, 4]], greedy(ignore_eos=True))[0].outputs == expected
        assert outer == 20
        one = llm.stream(numbered(llm, 9, [], max_tokens=3))
        other = llm.stream(numbered(llm, 9, [], max_tokens=3))
        pairs = [(a.request_id, b.request_id) for a, b in zip(one, other, strict=True)]
        assert len({name for pair in pairs for name in pair}) == 18
        assert_idle(llm)


def test_a_call_names_all_prompts_that_it_refuses_and_runs_none(small: Callable[..., LLM]):
    with small() as llm:
        good, long = [1, 2], [1] * (llm.config.max_model_len + 1)
        with pytest.raises(RequestError, match=r"^prompt 1: the prompt has") as refused:
            llm.generate([good, long, good, []])
        assert str(refused.value).endswith("(refused as well: 3)")
        with pytest.raises(RequestError, match=r"as well: 1, 2, .* 9, 10, \.\.\.\)$"):
            llm.generate([long] * 20)
        assert_idle(llm)


def test_a_request_that_cannot_be_sent_fails_alone(
    small: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
):
    with small() as llm:
        add = llm._client.add

        def refuse_large(*requests: Request) -> None:
            if sum(len(request.prompt_token_ids) for request in requests) > 9:
                raise RequestError("the request is too large to be sent")
            add(*requests)

        monkeypatch.setattr(llm._client, "add", refuse_large)
        params = greedy(max_tokens=2, ignore_eos=True, n=2)
        outputs = llm.generate([[1], [2] * 10, [3]], params)
        assert [output.error for output in outputs] == [
            None,
            "the request is too large to be sent",
            None,
        ]
        assert [one.finish_reason for one in outputs[1].outputs] == ["error", "error"]


def test_a_dead_engine_raises_its_own_error_once(
    small: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
):
    def die(*_: object) -> None:
        raise EngineDeadError("rank 1 was killed by SIGKILL")

    with small() as llm:
        monkeypatch.setattr(llm._client, "receive", die)
        monkeypatch.setattr(llm._client, "abort", die)
        with pytest.raises(EngineDeadError, match="SIGKILL") as caught:
            llm.generate([[1], [2]])
        assert caught.value.__context__ is None


# Logits that are not finite


def test_logits_that_are_not_finite_end_one_request_and_the_others_go_on(tmp_path: Path):
    oracle = Oracle("tiny")
    bad_token = 77
    used = {*itertools.chain(*oracle.prompts[:3], *oracle.greedy[:3])}
    assert bad_token not in used

    def spoil(embedding: torch.Tensor) -> None:
        embedding[bad_token] = torch.nan

    folder = altered_checkpoint(oracle.folder, tmp_path / "bad", "model.embed_tokens.weight", spoil)
    poisoned = [*oracle.prompts[1], bad_token]
    prompts = [oracle.prompts[0], poisoned, oracle.prompts[1], poisoned * 3, oracle.prompts[2]]
    with LLM(str(folder), device="cpu", dtype="float32", block_size=2) as llm:
        for _ in range(2):  # the second time with what the prefix cache has kept
            outputs = llm.generate(prompts, greedy(ignore_eos=True))
            for bad in (outputs[1], outputs[3]):
                assert bad.outputs[0].finish_reason == "error"
                assert bad.outputs[0].token_ids == []
                assert "not finite" in (bad.error or "")
            good = [outputs[0], outputs[2], outputs[4]]
            assert tokens_of(good) == oracle.greedy[:3]
            assert_idle(llm)
    with pytest.raises(MoespanError, match=r"model\.embed_tokens\.weight holds NaN or Inf"):
        LLM(str(folder), device="cpu", check_finite=True)


@pytest.mark.parametrize("work", ["__init__", "push"])
def test_a_fault_in_the_text_of_one_request_ends_that_request_only(
    llm: LLM, work: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    whole = getattr(TextStream, work)

    def fail(self: TextStream, *args: Any, **kwargs: Any) -> Any:
        bad = args[1].stop == ["bad"] if work == "__init__" else self._stop == ["bad"]
        if bad:
            raise ZeroDivisionError("a secret")
        return whole(self, *args, **kwargs)

    prompts = ["12+30=", "12+30=", "20+10="]
    params = [greedy(max_tokens=4), greedy(max_tokens=4, n=2, stop=["bad"]), greedy(max_tokens=4)]
    good = text_of(llm.generate([prompts[0], prompts[2]], greedy(max_tokens=4)))
    monkeypatch.setattr(TextStream, work, fail)
    first, bad, last = llm.generate(prompts, params)
    assert text_of([first, last]) == good
    assert bad.error == "the engine failed at this request with ZeroDivisionError"
    assert {one.finish_reason for one in bad.outputs} == {"error"}
    assert "a secret" in caplog.text
    assert_idle(llm)


def test_a_fault_in_a_text_without_stop_strings_ends_that_request_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    push = IncrementalDetokenizer.push

    def fail(self: IncrementalDetokenizer, token_ids: list[int]) -> str:
        if not self._skip_special_tokens:
            raise ZeroDivisionError("a secret")
        return push(self, token_ids)

    monkeypatch.setattr(IncrementalDetokenizer, "push", fail)
    bad = greedy(max_tokens=400, ignore_eos=True, n=2, skip_special_tokens=False)
    first, last = llm.generate(["12+30=", "20+10="], [bad, greedy(max_tokens=4)])
    assert [one.error for one in first.outputs] == [
        "the engine failed at this request with ZeroDivisionError"
    ] * 2
    assert last.outputs[0].text == text_of(llm.generate("20+10=", greedy(max_tokens=4)))[0]
    assert_idle(llm)


# Settings


def test_remote_code_is_refused():
    with pytest.raises(ConfigError, match="trust_remote_code is refused"):
        LLM(str(QUICKSTART), trust_remote_code=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_model_len": 0}, "max_model_len=0 must be at least 1"),
        ({"max_model_len": 513}, "max_model_len=513 exceeds .* max_position_embeddings=512"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_seqs=9 exceeds"),
        ({"num_blocks": 0}, "num_blocks=0 of 32 tokens cannot hold one sequence"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"device": "tpu"}, "device='tpu' is not one of auto, npu, cuda, cpu"),
        ({"load_format": "pickle"}, "load_format='pickle' is not one of"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(settings: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        LLM(str(QUICKSTART), **{"device": "cpu", **settings})


def test_a_layout_that_does_not_fit_names_those_that_do():
    with pytest.raises(LayoutError, match=r"tp=3 .* use tp=1, 2, 4, 8"):
        LLM(str(QUICKSTART), device="cpu", tensor_parallel_size=3)


def test_the_engine_says_what_it_is(quickstart: LLM):
    info = quickstart.info
    assert (info.device, info.dtype, info.layout.tp) == ("cpu", "float32", 1)
    assert (info.max_model_len, info.block_size) == (512, 32)
    assert info.num_blocks >= 16
    assert info.weight_bytes > info.read_bytes > 3_700_000  # bfloat16 in the file


def test_close_is_idempotent(small: Callable[..., LLM]):
    llm = small()
    with llm:
        pass
    llm.close()


@pytest.mark.parametrize("setting", [{"quantization": "int8"}, {"kv_cache_dtype": "int8"}], ids=str)
def test_integers_are_refused_where_the_device_has_no_operations_for_them(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any]
):
    monkeypatch.setattr("moespan.ops.CpuOps.quantizations", ())
    monkeypatch.setattr("moespan.ops.CpuOps.has_int8_cache", False)
    with pytest.raises(ConfigError, match="not implemented for device=cpu"):
        LLM(str(QUICKSTART), device="cpu", **setting)


def test_8_bit_floats_are_refused_with_the_hardware_and_the_schemes_that_work(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("moespan.ops.CpuOps.quantizations", ("int8", "w8a8"))
    with pytest.raises(ConfigError, match=r"capability 8\.9 and newer.*; use int8 or w8a8 or a"):
        LLM(str(QUICKSTART), device="cpu", quantization="fp8")


def test_4_bits_are_refused_with_the_schemes_that_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moespan.ops.CpuOps.quantizations", ("int8", "w8a8"))
    with pytest.raises(ConfigError, match=r"=int4 is not .* device=cpu; use int8 or w8a8 or"):
        LLM(str(QUICKSTART), device="cpu", quantization="int4")


def test_a_bad_variable_of_another_device_is_ignored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "much")
    with LLM(str(QUICKSTART), device="cpu") as llm:
        (output,) = llm.generate(["2+2="], SamplingParams(temperature=0, max_tokens=1))
    assert output.error is None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_engine_is_refused_and_left_alone_in_a_forked_process(llm: LLM) -> None:
    child = os.fork()
    if not child:
        signal.alarm(60)  # so that a child that hangs ends
        with contextlib.suppress(EngineDeadError):
            llm.generate("1+1=", GREEDY)
            os._exit(1)
        llm.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert text_of(llm.generate("1+1=", GREEDY))
