"""The worker returns the samples and scores that a plan requests, and keeps no state."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from moespan.checkpoint.random import RandomSource
from moespan.config import ModelConfig
from moespan.engine.step import PromptRow, PromptScores, StepPlan, StepResult
from moespan.engine.worker import Worker
from tests.support import execute, geometry, greedy_row, make_worker, sampling_of

CONFIG = ModelConfig.from_dict(geometry())
TOKENS = [(5 * i + 2) % CONFIG.vocab_size for i in range(14)]


@pytest.fixture
def worker() -> Worker:
    return make_worker(CONFIG)


def plan(token_ids: list[list[int]], context_lens: list[int], **rest: Any) -> StepPlan:
    """Sequence i has the blocks 10·i, 10·i + 1, … unless `block_tables` says otherwise."""
    tables = [list(range(10 * i, 10 * i + 10)) for i in range(len(token_ids))]
    return StepPlan(
        step=0,
        token_ids=[token for ids in token_ids for token in ids],
        query_lens=[len(ids) for ids in token_ids],
        context_lens=context_lens,
        **{"block_tables": tables, "prompts": [], **rest},
    )


def report(sequence: int = 0, **settings: Any) -> PromptRow:
    return PromptRow(
        sequence=sequence, **{"targets": [], "logprobs": None, "logits": True, **settings}
    )


def rows_of(scores: PromptScores) -> np.ndarray:
    return np.frombuffer(scores.logits, np.float32).reshape(-1, CONFIG.vocab_size)


def whole_prompt_logits(token_ids: list[int]) -> np.ndarray:
    step = plan([token_ids], [0], prompts=[report()])
    return rows_of(execute(make_worker(CONFIG), step).prompts[0])


def test_a_chunk_without_samples_and_reports_fills_the_cache(worker: Worker):
    assert execute(worker, plan([TOKENS[:9]], [0])) == StepResult([], [])
    last = execute(worker, plan([TOKENS[9:]], [9], prompts=[report()])).prompts[0]
    np.testing.assert_allclose(rows_of(last), whole_prompt_logits(TOKENS)[9:], rtol=0, atol=1e-5)


def test_samples_follow_the_last_query_token_of_their_sequence(worker: Worker):
    step = plan(
        [TOKENS[:5], TOKENS[5:6], TOKENS[6:]],
        [0, 0, 0],
        **sampling_of([2, 0]),
        prompts=[report(0), report(2)],
    )
    result = execute(worker, step)
    first, third = (rows_of(scores) for scores in result.prompts)
    assert (len(first), len(third)) == (5, 8)
    tokens = [sample.token_id for sample in result.samples]
    assert tokens == [third[-1].argmax(), first[-1].argmax()]


@pytest.mark.parametrize("is_end_of_prompt", [True, False])
def test_prompt_logprobs_are_of_the_targets_under_the_raw_distribution(
    worker: Worker, is_end_of_prompt: bool
):
    targets = TOKENS[1:] if is_end_of_prompt else [*TOKENS[1:], 33]
    row = report(targets=targets, logprobs=3)
    scores = execute(worker, plan([TOKENS], [0], prompts=[row])).prompts[0]
    expected = torch.tensor(whole_prompt_logits(TOKENS)).log_softmax(-1)
    assert [entry.token_id for entry in scores.logprobs] == targets
    for entry, logprobs in zip(scores.logprobs, expected, strict=False):
        assert entry.logprob == pytest.approx(float(logprobs[entry.token_id]), abs=1e-5)
        best = logprobs.topk(3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_prompt_of_one_token_has_logits_but_no_prompt_logprobs(worker: Worker):
    row = report(targets=[], logprobs=2)
    scores = execute(worker, plan([[3]], [0], prompts=[row])).prompts[0]
    assert scores.logprobs == []
    assert rows_of(scores).shape == (1, CONFIG.vocab_size)


def test_sequences_may_share_the_blocks_of_a_common_prefix(worker: Worker):
    execute(worker, plan([TOKENS[:8]], [0], block_tables=[[40, 17]]))
    step = plan(
        [TOKENS[8:], [9, 9]],
        [8, 8],
        block_tables=[[40, 17, 3, 4], [40, 17, 60]],
        prompts=[report(0), report(1)],
    )
    shared = execute(worker, step).prompts
    for scores, rest in zip(shared, (TOKENS[8:], [9, 9]), strict=True):
        expected = whole_prompt_logits(TOKENS[:8] + rest)[8:]
        np.testing.assert_allclose(rows_of(scores), expected, rtol=0, atol=1e-5)


def test_blocks_are_written_anew_for_their_next_owner(worker: Worker):
    execute(worker, plan([list(range(40))], [0]))
    scores = execute(worker, plan([TOKENS], [0], prompts=[report()])).prompts[0]
    np.testing.assert_allclose(rows_of(scores), whole_prompt_logits(TOKENS), rtol=0, atol=1e-5)


def test_a_decoded_plan_means_the_same(worker: Worker):
    step = plan(
        [TOKENS[:4], TOKENS[4:]],
        [0, 0],
        prompts=[report(0, targets=TOKENS[1:5], logprobs=1)],
        **sampling_of(
            [1],
            greedy_row(
                temperature=0.7,
                seed=2**62,
                top_k=9,
                logprobs=2,
                seen_output={4: 2},
                frequency_penalty=0.5,
                logit_bias={7: 1.5},
                barred=[3],
            ),
        ),
    )
    message = msgspec.msgpack.encode(step)
    travelled = msgspec.msgpack.decode(message, type=StepPlan)
    assert travelled == step
    result = execute(worker, travelled)
    assert result == execute(worker, step)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult)
    assert msgspec.to_builtins(back) == msgspec.to_builtins(result)


def test_a_sequence_that_is_not_finite_fails_alone():
    source = RandomSource(CONFIG, torch.float32, seed=0)
    worker = make_worker(CONFIG, source)
    poison = 60
    assert worker.model.embed is not None
    worker.model.embed[poison] = torch.nan
    told = greedy_row(logprobs=2)
    lonely = execute(worker, plan([TOKENS], [0], **sampling_of([0], told))).samples
    step = plan(
        [TOKENS[:6], [4, poison, 5], TOKENS],
        [0, 0, 0],
        **sampling_of([0, 1, 2], greedy_row(), told, told),
    )
    before, poisoned, after = execute(worker, step).samples
    assert before.token_id is not None
    assert (poisoned.token_id, poisoned.logprobs) == (None, None)
    assert after.token_id == lonely[0].token_id
    # All sequences decode together, beside the poisoned cache.
    step = plan([[7], [8], [9]], [6, 3, 14], **sampling_of([0, 1, 2]))
    tokens = [sample.token_id for sample in execute(worker, step).samples]
    assert tokens[1] is None
    expected = [whole_prompt_logits(ids)[-1].argmax() for ids in ([*TOKENS[:6], 7], [*TOKENS, 9])]
    assert [tokens[0], tokens[2]] == expected


@pytest.mark.parametrize(("kv_heads", "expected"), [(4, 4), (2, 2), (1, 1)])
def test_caches_have_a_slot_for_every_kv_head_of_every_layer(kv_heads: int, expected: int):
    config = ModelConfig.from_dict(geometry(num_key_value_heads=kv_heads))
    worker = make_worker(config, block_size=8, num_blocks=5)
    assert len(worker.caches) == config.num_hidden_layers
    for caches in worker.caches:
        for cache in caches.tensors:
            assert cache.shape == (5, 8, expected, config.head_dim)
