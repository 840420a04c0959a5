"""Decode steps compute the same with recorded graphs as without.

The operations here record the function to call.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moespan import log
from moespan.config.engine import padded_sizes
from moespan.engine.step import StepPlan, StepPlans
from moespan.engine.worker import Worker
from moespan.ops import AttentionBatch, CpuOps, KVCache, Replay
from moespan.ops.npu.ops import plain_decode
from moespan.parallel.counters import Traffic
from tests.engine.test_worker import plan
from tests.support import Oracle, execute, greedy_row, make_worker, run_prompts, sampling_of


class RecordingOps(CpuOps):
    """Replays by calling the function again. As on a device, its arguments stay the same."""

    has_graphs = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.num_recorded = self.num_replayed = 0

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
        # The lengths on the host would always be those of the first step.
        if len(q) and batch.is_decode:
            return plain_decode(q, cache, batch, scale)
        return super().attention(q, cache, batch, scale)

    def record(self, run: Callable[[], object]) -> Replay:
        if self.error is not None:
            raise self.error
        self.num_recorded += 1
        run()

        def replay(total_lens: list[int]) -> None:
            self.num_replayed += 1
            run()

        return replay


@given(st.integers(1, 3000))
def test_padded_sizes_are_few_and_close(max_num_seqs: int):
    sizes = padded_sizes(max_num_seqs)
    assert sizes[0] == 1
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= max_num_seqs
    assert all(size < max_num_seqs for size in sizes[:-1])
    assert len(sizes) <= 41
    if max_num_seqs <= 256:
        assert all(b - a <= 8 for a, b in pairwise(sizes))


def test_sizes_of_64_sequences():
    assert padded_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


@pytest.mark.parametrize("name", ["tiny", "tiny_gqa", "sixteen"])
def test_greedy_continuations_from_graphs_are_those_of_the_hugging_face_model(name: str):
    oracle, ops = Oracle(name), RecordingOps()
    worker = make_worker(oracle.config, oracle.source(), ops=ops)
    runs = run_prompts(worker, oracle.prompts, most_chunk=64, num_generated=24)
    assert [run.generated for run in runs] == oracle.greedy
    assert 1 <= ops.num_recorded <= 4
    assert ops.num_replayed > 20


def decode(num_sequences: int, context_len: int) -> StepPlan:
    return plan(
        [[(7 * i + context_len) % 60] for i in range(num_sequences)],
        [context_len] * num_sequences,
        **sampling_of(reversed(range(num_sequences)), *[greedy_row(logprobs=3)] * num_sequences),
    )


@pytest.mark.parametrize("num_sequences", [1, 3, 5, 9, 17])
def test_padding_writes_nothing_into_blocks_of_requests(num_sequences: int):
    oracle, ops = Oracle("tiny"), RecordingOps()
    worker = make_worker(oracle.config, oracle.source(), ops=ops)
    plain = make_worker(oracle.config, oracle.source())
    for length in range(6):
        step = decode(num_sequences, length)
        ours, theirs = execute(worker, step), execute(plain, step)
        assert [s.token_id for s in ours.samples] == [s.token_id for s in theirs.samples]
    assert ops.num_replayed == 5
    for pairs in zip(worker.caches, plain.caches, strict=True):
        for ours, theirs in zip(*(pair.tensors for pair in pairs), strict=True):
            ours = ours[: len(theirs)]
            assert torch.equal(ours.isnan(), theirs.isnan())
            torch.testing.assert_close(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("num_sequences", [1, 3, 5])
def test_padding_does_not_count_as_tokens_of_experts(num_sequences: int):
    oracle = Oracle("tiny")
    ops = RecordingOps()
    worker = make_worker(oracle.config, oracle.source(), ops=ops, expert_stats=True)
    plain = make_worker(oracle.config, oracle.source(), expert_stats=True)

    def added(one: Worker) -> dict[int, list[int]]:
        counter = one.model.counter
        assert counter is not None
        before = counter.read()
        execute(one, decode(num_sequences, 1))
        return {
            layer: [now - then for now, then in zip(row, before[layer], strict=True)]
            for layer, row in counter.read().items()
        }

    # On a device recording computes nothing; the operations here compute the first step twice.
    for one in (worker, plain):
        execute(one, decode(num_sequences, 0))
    expected = added(plain)
    assert added(worker) == expected
    assert ops.num_replayed == 1
    num_chosen = num_sequences * oracle.config.num_experts_per_tok
    assert {sum(row) for row in expected.values()} == {num_chosen}


def test_a_step_with_a_prompt_chunk_or_a_trace_is_not_a_decode_step():
    chunk = plan([[1], [2, 3]], [4, 0])
    assert StepPlans.of([decode(2, 0), None]).is_decode
    assert not StepPlans.of([decode(2, 0), chunk]).is_decode
    ops = RecordingOps()
    worker = make_worker(Oracle("tiny").config, ops=ops)
    worker.execute(StepPlans.of([decode(1, 0)], trace=True))
    assert ops.num_recorded == 0


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_said", set())


@pytest.mark.usefixtures("said")
def test_a_step_that_cannot_be_recorded_runs_without_a_graph_and_gives_one_notice(
    capsys: pytest.CaptureFixture[str],
):
    oracle, ops = Oracle("tiny"), RecordingOps(RuntimeError("no streams left\nmore"))
    worker = make_worker(oracle.config, oracle.source(), ops=ops)
    runs = run_prompts(worker, oracle.prompts, most_chunk=64, num_generated=24)
    assert [run.generated for run in runs] == oracle.greedy
    assert capsys.readouterr().err == (
        "moespan: decode steps are not recorded as graphs: RuntimeError: no streams left; "
        "the device still computes\n"
    )


@pytest.mark.parametrize("state", ["computes nothing", "computes wrong numbers"])
def test_a_device_that_is_lost_in_recording_ends_the_rank(state: str):
    class LostOps(RecordingOps):
        is_lost = False

        def record(self, run: Callable[[], object]) -> Replay:
            self.is_lost = True
            raise RuntimeError("207008")

        def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
            if self.is_lost and state == "computes nothing":
                raise ValueError("stream is lost")
            normed = super().rms_norm(x, weight, eps)
            return normed * torch.nan if self.is_lost else normed

    worker = make_worker(Oracle("tiny").config, ops=LostOps())
    with pytest.raises(RuntimeError, match=rf"207008.*{state}.*start again with --enforce-eager"):
        execute(worker, decode(2, 0))


@pytest.mark.usefixtures("said")
def test_blocking_launches_rule_out_recording(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", "1")
    ops = RecordingOps()
    worker = make_worker(Oracle("tiny").config, ops=ops)
    execute(worker, decode(2, 0))
    assert ops.num_recorded == 0
    assert "ASCEND_LAUNCH_BLOCKING=1" in capsys.readouterr().err


def test_enforce_eager_takes_no_blocks_and_records_nothing():
    ops = RecordingOps()
    worker = make_worker(Oracle("tiny").config, ops=ops, enforce_eager=True, num_blocks=50)
    execute(worker, decode(2, 0))
    assert ops.num_recorded == 0
    assert len(worker.caches[0].keys) == 50


def test_collectives_of_a_replay_are_counted_and_those_of_recording_are_not():
    traffic = Traffic()
    traffic.count("tp", "all_reduce", "moe", 10)
    recorded = traffic.count_separately(lambda: traffic.count("tp", "all_reduce", "moe", 4))
    assert traffic.rows() == [("tp", "all_reduce", "moe", 1, 10)]
    for _ in range(2):
        traffic.add(recorded)
    assert traffic.rows() == [("tp", "all_reduce", "moe", 3, 18)]
