"""Tests of the scheduler, by examples and by random schedules on a model that reads a real cache.

Every output is compared with the one computed without cache, batch and scheduler.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moespan.config import EngineConfig, Layout
from moespan.engine.drafts import DraftCounts
from moespan.engine.integrity import check_scheduler
from moespan.engine.request import Request, SamplingParams, TokenLogprobs
from moespan.engine.scheduler import Scheduler
from moespan.engine.sequence import Sequence, Status
from moespan.engine.step import StepPlan
from moespan.engine.updates import SequenceUpdate
from moespan.errors import ConfigError, MoespanError, RequestError
from tests.engine.paged_model import (
    EOS,
    VOCAB,
    PagedModel,
    constraint_of,
    expected_output,
    expected_states,
    may_come,
)
from tests.tiers import examples


@dataclass
class Received:
    """All updates of one sequence."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logits: bytes = b""
    end: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    grammar: bool = False


def output_of(sequence: Sequence) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens :]


class Oracle:
    """A drafter that knows the output; some of its drafts are wrong."""

    def __init__(self, rng: random.Random, prompt: list[int], output: list[int]) -> None:
        self.rng, self.output, self.num_prompt_tokens = rng, output, len(prompt)
        self.token_ids: list[int] = []

    def draft(self, most: int, num_expected: int = 0) -> list[int]:
        start = len(self.token_ids) - self.num_prompt_tokens + num_expected
        right = self.output[start : start + self.rng.randrange(most + 1)]
        return [self.rng.choice([token] * 3 + [self.rng.randrange(VOCAB)]) for token in right]


class Bench:
    """A scheduler with a model and a pipeline of plans; checks every call."""

    def __init__(
        self,
        *,
        block_size: int = 4,
        num_blocks: int = 64,
        max_model_len: int = 32,
        max_num_seqs: int = 8,
        budget: int = 16,
        caching: bool = True,
        ahead: bool = False,
        drafts: int = 0,
    ) -> None:
        self.draws = random.Random(num_blocks)
        self.config = EngineConfig(
            model="",
            speculative_tokens=min(drafts, min(max_num_seqs, budget) - 1),
            async_scheduling=ahead,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=min(max_num_seqs, budget),
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
        )
        self.scheduler = Scheduler(self.config, num_blocks, VOCAB, eos_token_ids=[EOS])
        self.model = PagedModel(block_size)
        self.flights: deque[tuple[StepPlan, list[Sequence], list[list[int | None]]]] = deque()
        self.received: dict[Sequence, Received] = {}
        self.first_of: dict[Sequence, Sequence] = {}  # the first continuation of its request
        self.first_scheduled: list[int] = []
        self.num_steps = 0
        self.num_aborted_in_flight = 0

    def add(self, prompt: list[int], id: str | None = None, **options) -> list[Sequence]:
        logits, salt = options.pop("prompt_logits", False), options.pop("cache_salt", None)
        grammar = options.pop("grammar", False)
        request = Request(
            id=id or f"r{len(self.received)}",
            prompt_token_ids=prompt,
            params=SamplingParams(**{"max_tokens": 8, **options}),
            prompt_logits=logits,
            cache_salt=salt,
        )
        sequences = self.scheduler.add(request, constraint=constraint_of(request, grammar))
        self.received.update(
            (sequence, Received(request, grammar=grammar)) for sequence in sequences
        )
        if self.config.speculative_tokens:
            for sequence in sequences:
                self._let_draft(sequence, request, grammar)
        self.first_of |= dict.fromkeys(sequences, sequences[0])
        return sequences

    def _let_draft(self, sequence: Sequence, request: Request, grammar: bool) -> None:
        output = expected_output(request, sequence.index, self.config.max_model_len, 0, grammar)
        oracle = Oracle(self.draws, request.prompt_token_ids, output)
        oracle.token_ids = sequence.token_ids
        sequence.drafter = oracle  # type: ignore[assignment]

    def context(self, plan: StepPlan, batch: list[Sequence]) -> list[list[int | None]]:
        """The cached values of each sequence before the step, without those of its own drafts."""
        context = self.model.context(plan)
        return [
            values
            for row, values in enumerate(context)
            if not row or batch[row] is not batch[row - 1]
        ]

    @property
    def live(self) -> list[Sequence]:
        """The unfinished sequences, those included that wait for another one's prompt."""
        return [s for sequences in self.scheduler._live.values() for s in sequences]

    def plan(self) -> StepPlan:
        """The next step's plan where there must be one."""
        plan = self.schedule()
        assert plan is not None
        return plan

    def schedule(self) -> StepPlan | None:
        scheduler, config = self.scheduler, self.config
        waiting = set(scheduler.waiting)
        oldest = min((*scheduler.running, *waiting), key=lambda s: s.arrival, default=None)
        losses, num_preemptions = oldest and oldest.num_preemptions, scheduler.num_preemptions
        plan = scheduler.schedule()
        check_scheduler(scheduler)
        self.take_in(scheduler.take_faults())
        assert oldest is None or oldest.num_preemptions == losses
        if plan is None:
            # Unfinished sequences can go on, at the latest when all results are back.
            assert self.flights or not scheduler.has_unfinished
            return None
        assert plan.step == self.num_steps
        assert 0 < len(plan.token_ids) == sum(plan.query_lens) <= config.max_num_batched_tokens
        assert 0 < len(plan.query_lens) <= config.max_num_seqs
        assert min(plan.query_lens) > 0
        for query, context, table in zip(
            plan.query_lens, plan.context_lens, plan.block_tables, strict=True
        ):
            assert len(table) == scheduler.allocator.blocks_for(context + query)
        _, in_flight = scheduler._in_flight[-1]
        batch = [s for s, _, num_samples in in_flight for _ in range(num_samples or 1)]  # one a row
        self._check_writes(plan, batch)
        # First come, first served: an admitted sequence is older than all waiting ones.
        admitted = waiting - set(scheduler.waiting)
        assert not admitted or num_preemptions == scheduler.num_preemptions
        assert max((s.arrival for s in admitted), default=-1) < min(
            (s.arrival for s in scheduler.waiting), default=1 << 60
        )
        new = [s for s in admitted if s.num_preemptions == 0]
        self.first_scheduled += sorted(s.arrival for s in new if s.index == 0)
        for sequence in new:
            self._check_waited(sequence)
        self.flights.append((plan, batch, self._computed_context(plan, batch)))
        self.num_steps += 1
        return plan

    def _computed_context(self, plan: StepPlan, batch: list[Sequence]) -> list[list[int | None]]:
        """The cached values that are computed when the plan is made. The plans in flight compute
        the others, each of which goes on where the previous one ends."""
        computed = []
        for sequence, values in zip(dict.fromkeys(batch), self.context(plan, batch), strict=True):
            end = sequence.num_computed_tokens
            for flight, sequences, _ in self.flights:
                if sequence in sequences:
                    at = sequences.index(sequence)
                    assert flight.context_lens[at] == end
                    end += flight.query_lens[at]
            assert plan.context_lens[batch.index(sequence)] == end
            computed.append(values[: sequence.num_computed_tokens])
        return computed

    def _check_waited(self, sequence: Sequence) -> None:
        """A continuation is admitted only when the first one has computed the prompt, or ended."""
        first = self.first_of[sequence]
        if sequence is not first and sequence.num_prompt_tokens > self.config.block_size:
            assert first.has_prompt or first.num_preemptions or first.is_finished

    def _check_writes(self, plan: StepPlan, batch: list[Sequence]) -> None:
        """No block is written that another sequence in flight uses."""
        users: dict[int, set[Sequence]] = {}
        for flight, sequences in (*((f, s) for f, s, _ in self.flights), (plan, batch)):
            for table, sequence in zip(flight.block_tables, sequences, strict=True):
                assert len(set(table)) == len(table)
                for block in table:
                    users.setdefault(block, set()).add(sequence)
        for context, table in zip(plan.context_lens, plan.block_tables, strict=True):
            for block in table[context // self.config.block_size :]:
                assert len(users[block]) == 1, f"block {block} is written while others use it"

    def deliver(self, corrupt: AbstractSet[int] = frozenset()) -> list[SequenceUpdate]:
        """Execute the oldest plan in flight and hand back its result."""
        plan, batch, planned_context = self.flights.popleft()
        context = self.context(plan, batch)
        assert None not in [value for values in context for value in values]
        for values, planned in zip(context, planned_context, strict=True):
            assert values[: len(planned)] == planned, "the context changed after it was planned"
        corrupt = corrupt & set(plan.sampled)
        updates = self.scheduler.update(plan, self.model.execute(plan, corrupt))
        check_scheduler(self.scheduler)
        self.take_in(updates)
        return updates

    def take_in(self, updates: list[SequenceUpdate]) -> None:
        assert len({id(update.sequence) for update in updates}) == len(updates)
        for update in updates:
            received = self.received[update.sequence]
            assert received.end is None, "an update after the end"
            received.token_ids += update.token_ids
            received.logprobs += update.logprobs
            received.end, received.stop_reason = update.finish_reason, update.stop_reason
            received.error = update.error
            if update.prompt is not None:
                received.prompt_logprobs += update.prompt.logprobs
                received.prompt_logits += update.prompt.logits
            assert received.token_ids == output_of(update.sequence)

    def step(self) -> StepPlan | None:
        plan = self.schedule()
        if plan is not None:
            self.deliver()
        return plan

    def planned_step(self) -> StepPlan:
        """A step where there must be a plan for one."""
        plan = self.step()
        assert plan is not None
        return plan

    def finish(self, sequence: Sequence) -> None:
        self.num_aborted_in_flight += sequence.in_flight
        if self.received[sequence].end is None:
            self.received[sequence].end = "abort"
        self.scheduler.finish(sequence)
        check_scheduler(self.scheduler)

    def abort(self, id: str) -> list[Sequence]:
        sequences = self.scheduler.abort(id)
        for sequence in sequences:
            self.num_aborted_in_flight += sequence.in_flight
            self.received[sequence].end = "abort"
        check_scheduler(self.scheduler)
        return sequences

    def drain(self, depth: int = 1) -> None:
        """Run to the end with `depth` plans in flight; check that the time is bounded."""
        live = self.live
        # Each time all results are back, the oldest sequence has advanced by at least a token, or
        # has restarted; and a sequence restarts only while it is not the oldest.
        num_tokens = sum(s.num_prompt_tokens + s.max_output_tokens + 1 for s in live)
        bound = self.num_steps + len(self.flights) + 2 * depth * (num_tokens + len(live))
        while self.scheduler.has_unfinished:
            while len(self.flights) < depth and self.schedule() is not None:
                pass
            self.deliver()
            assert self.num_steps <= bound, "no progress"
        assert not self.flights

    def check_outputs(self) -> None:
        """All is finished, nothing is leaked, and every output is what the request alone gets."""
        scheduler = self.scheduler
        assert not scheduler.has_unfinished and scheduler.schedule() is None
        check_scheduler(scheduler)
        assert scheduler.kv_usage == 0
        assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_in_flight) == (0, 0, 0)
        assert self.first_scheduled == sorted(self.first_scheduled)
        for sequence, received in self.received.items():
            request = received.request
            expected = expected_output(
                request, sequence.index, self.config.max_model_len, grammar=received.grammar
            )
            assert received.end in ("stop", "length", "abort", "error")
            assert sequence.status is Status.FINISHED and not sequence.block_table
            if received.end == "error" and "grammar" in (received.error or ""):
                assert received.token_ids == expected, sequence
            if received.end in ("abort", "error"):
                assert received.token_ids == expected[: len(received.token_ids)], sequence
            self._check_logprobs(received)
            if received.end in ("abort", "error"):
                continue
            assert received.token_ids == expected, sequence
            assert output_of(sequence) == expected
            prompt_len = sequence.num_prompt_tokens
            assert sequence.token_ids[:prompt_len] == request.prompt_token_ids
            prompt = request.prompt_token_ids
            states = expected_states(prompt) if sequence.index == 0 else []
            wanted = states if request.params.prompt_logprobs is not None else []
            assert received.prompt_logprobs == [
                TokenLogprobs(target, float(state), [])
                for target, state in zip(prompt[1:], wanted, strict=False)
            ]
            wanted = states if request.prompt_logits else []
            assert received.prompt_logits == b"".join(
                s.to_bytes(8, "big", signed=True) for s in wanted
            )

    def _check_logprobs(self, received: Received) -> None:
        prompt, output = received.request.prompt_token_ids, received.token_ids
        wanted = output if received.request.params.logprobs is not None else []
        states = expected_states([*prompt, *output])[len(prompt) - 1 :]
        assert received.logprobs == [
            TokenLogprobs(token_id, float(state), [])
            for token_id, state in zip(wanted, states, strict=False)
        ]


def prompt_of(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, VOCAB) for _ in range(n)]


# What a plan holds


def test_nothing_to_do_gives_no_plan():
    bench = Bench()
    assert bench.schedule() is None
    assert not bench.scheduler.has_unfinished


def test_a_prompt_and_its_output_go_through_the_cache_in_order():
    bench = Bench(budget=16)
    bench.add([5, 6, 7, 8, 9], max_tokens=3, ignore_eos=True)
    first = bench.planned_step()
    assert (first.token_ids, first.query_lens, first.context_lens) == ([5, 6, 7, 8, 9], [5], [0])
    assert len(first.block_tables[0]) == 2 and len(first.samples) == 1
    second = bench.planned_step()
    assert (second.query_lens, second.context_lens) == ([1], [5])
    assert second.block_tables == first.block_tables
    assert second.token_ids == bench.received[next(iter(bench.received))].token_ids[:1]
    bench.drain()
    bench.check_outputs()
    assert bench.num_steps == 3


def test_long_prompts_are_computed_in_chunks_and_only_the_last_chunk_samples():
    bench = Bench(budget=5)
    bench.add(prompt_of(12), max_tokens=1)
    plans = [bench.planned_step() for _ in range(3)]
    assert [plan.query_lens for plan in plans] == [[5], [5], [2]]
    assert [plan.context_lens for plan in plans] == [[0], [5], [10]]
    assert [len(plan.block_tables[0]) for plan in plans] == [2, 3, 3]
    assert [len(plan.samples) for plan in plans] == [0, 0, 1]
    bench.check_outputs()


def test_prefill_chunks_and_decodes_share_a_step_and_the_running_ones_come_first():
    bench = Bench(budget=6)
    bench.add([1, 2], ignore_eos=True)
    bench.step()
    bench.add(prompt_of(9))
    plan = bench.planned_step()
    assert (plan.query_lens, plan.context_lens) == ([1, 5], [2, 0])
    assert plan.sampled == [0]
    assert bench.planned_step().query_lens == [1, 4]


def test_a_step_holds_at_most_max_num_seqs_sequences():
    bench = Bench(max_num_seqs=2)
    for seed in range(3):
        bench.add(prompt_of(2, seed), ignore_eos=True, max_tokens=2)
    assert [len(bench.planned_step().query_lens) for _ in range(3)] == [2, 2, 1]
    bench.drain()
    bench.check_outputs()


def test_sequences_are_first_scheduled_in_the_order_of_arrival():
    bench = Bench(budget=4, max_num_seqs=2)
    for n in (9, 1, 7, 2, 3, 12):
        bench.add(prompt_of(n, seed=n))
    bench.drain(depth=3)
    assert bench.first_scheduled == list(range(6))
    bench.check_outputs()


def test_a_sample_row_carries_the_sampling_parameters():
    bench = Bench()
    options: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "logprobs": 2,
        "logit_bias": {4: 1.5},
    }  # fmt: skip
    bench.add([1, 2], **options)
    plan = bench.plan()
    row = plan.samples[0]
    assert {name: getattr(row, name) for name in options} == options
    assert (plan.positions, row.barred, row.seen_prompt, row.seen_output) == ([0], [], [], {})


def test_the_position_of_a_sample_counts_the_output():
    bench = Bench()
    bench.add([1, 2], ignore_eos=True, max_tokens=3)
    assert [bench.planned_step().positions for _ in range(3)] == [[0], [1], [2]]


def test_seen_tokens_are_sent_only_to_penalties_that_need_them():
    bench = Bench()
    bench.add([3, 1, 3], ignore_eos=True, repetition_penalty=1.5)
    bench.add([3, 1, 3], ignore_eos=True, frequency_penalty=1.5)
    bench.add([3, 1, 3], ignore_eos=True)
    bench.step()
    bench.step()
    outputs = [dict(Counter(received.token_ids)) for received in bench.received.values()]
    rows = bench.plan().samples
    assert [row.seen_prompt for row in rows] == [[1, 3], [], []]
    assert [row.seen_output for row in rows] == [outputs[0], outputs[1], {}]


def test_a_plan_does_not_change_after_it_was_made():
    bench = Bench()
    bench.add([1, 2, 3], ignore_eos=True, presence_penalty=1.0, max_tokens=6)
    plan = bench.plan()
    before = repr(plan)
    bench.deliver()
    bench.drain()
    assert repr(plan) == before


def test_log_probabilities_come_with_their_token():
    bench = Bench()
    bench.add([1, 2], logprobs=0)
    bench.schedule()
    (update,) = bench.deliver()
    assert [entry.token_id for entry in update.logprobs] == update.token_ids


# Seeds and continuations


def test_continuation_i_of_n_has_seed_plus_i_and_comes_back_under_its_index():
    bench = Bench()
    bench.add(prompt_of(4), n=3, seed=40)
    assert [row.seed for row in bench.plan().samples] == [40, 41, 42]
    assert [sequence.index for sequence in bench.received] == [0, 1, 2]
    bench.deliver()
    bench.drain()
    bench.check_outputs()


def test_a_request_without_seed_gets_the_given_one_and_seeds_stay_within_63_bits():
    bench = Bench()
    params = SamplingParams(n=2)
    request = Request(id="a", prompt_token_ids=[1], params=params)
    assert [s.seed for s in bench.scheduler.add(request, seed=2**63 - 1)] == [2**63 - 1, 0]
    params = SamplingParams(seed=5)
    request = Request(id="b", prompt_token_ids=[1], params=params)
    assert [s.seed for s in bench.scheduler.add(request, seed=9)] == [5]


# How sequences end


def run_alone(prompt: list[int], **options) -> Received:
    bench = Bench()
    bench.add(prompt, **options)
    bench.drain()
    bench.check_outputs()
    return next(iter(bench.received.values()))


def prompt_that_outputs(token_id: int, at: int) -> list[int]:
    """A prompt whose free continuation has its first `token_id` at index `at`."""
    for seed in range(10_000):
        output = run_free(prompt_of(4, seed))
        if token_id in output and output.index(token_id) == at:
            return prompt_of(4, seed)
    raise LookupError


def run_free(prompt: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    return expected_output(Request(id="", prompt_token_ids=prompt, params=params), 0, 32)


def test_eos_ends_with_stop_and_is_part_of_the_output():
    received = run_alone(prompt_that_outputs(EOS, at=3))
    assert (received.end, received.stop_reason) == ("stop", None)
    assert len(received.token_ids) == 4 and received.token_ids[-1] == EOS


def test_eos_can_be_ignored():
    received = run_alone(prompt_that_outputs(EOS, at=3), ignore_eos=True)
    assert (received.end, len(received.token_ids)) == ("length", 8)


def test_a_stop_token_ends_with_stop_and_is_the_reason():
    received = run_alone(prompt_that_outputs(7, at=2), ignore_eos=True, stop_token_ids=[7])
    assert (received.end, received.stop_reason, received.token_ids[-1]) == ("stop", 7, 7)


def test_eos_that_is_ignored_but_a_stop_token_ends_as_stop_token():
    received = run_alone(prompt_that_outputs(EOS, at=1), ignore_eos=True, stop_token_ids=[EOS])
    assert (received.end, received.stop_reason) == ("stop", EOS)


def test_max_tokens_ends_with_length():
    received = run_alone(prompt_of(4), ignore_eos=True, max_tokens=5)
    assert (received.end, len(received.token_ids)) == ("length", 5)


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_the_models_length_ends_with_length(max_tokens):
    received = run_alone(prompt_of(20), ignore_eos=True, max_tokens=max_tokens)
    assert (received.end, len(received.token_ids)) == ("length", 12)


def test_eos_and_stop_tokens_are_barred_before_min_tokens():
    bench = Bench()
    bench.add(prompt_that_outputs(EOS, at=0), min_tokens=2, stop_token_ids=[7, 3])
    assert [bench.planned_step().samples[0].barred for _ in range(2)] == [[EOS, 3, 7]] * 2
    plan = bench.step()
    assert plan is None or plan.samples[0].barred == []
    bench.drain()
    bench.check_outputs()


def test_ignored_eos_is_not_barred():
    bench = Bench()
    bench.add([1, 2], min_tokens=2, stop_token_ids=[7], ignore_eos=True)
    assert bench.plan().samples[0].barred == [7]


def test_logits_that_are_not_finite_end_only_their_sequence_with_an_error():
    bench = Bench()
    bad, good = bench.add(prompt_of(5), "bad") + bench.add(prompt_of(6), "good")
    bench.schedule()
    update = bench.deliver(corrupt={0})[0]
    assert update.sequence is bad and update.finish_reason == "error" and update.token_ids == []
    assert update.error == "the logits at position 4 are not finite"
    assert update.stop_reason is None and not good.is_finished
    bench.drain()
    bench.check_outputs()


def test_blocks_behind_logits_that_are_not_finite_are_not_used_again():
    bench = Bench(budget=8)
    bench.add(prompt_of(12), "bad")
    bench.step()
    bench.schedule()
    bench.deliver(corrupt={0})
    (again,) = bench.add(prompt_of(12), "again")
    bench.drain()
    assert again.num_cached_tokens == 0
    bench.check_outputs()


@pytest.mark.parametrize("work", ["sample_rows", "append"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_fault_in_the_work_of_one_sequence_ends_that_sequence_only(
    work: str, depth: int, monkeypatch: pytest.MonkeyPatch
):
    bench = Bench(budget=40)
    bench.add(prompt_of(5), ignore_eos=True)
    (bad,) = bench.add(prompt_of(9), "bad", ignore_eos=True)
    bench.add(prompt_of(7), ignore_eos=True)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(bad, work, fail)
    bench.drain(depth)
    ends = [received.end for received in bench.received.values()]
    assert ends == ["length", "error", "length"]
    bench.check_outputs()
    (again,) = bench.add(prompt_of(9), "bad", ignore_eos=True)
    bench.drain(depth)
    assert bench.received[again].end == "length"


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 32}, "the prompt has 32 tokens; max_model_len=32 leaves room for 31"),
        ({"prompt": [1, -1]}, "prompt_token_ids: token id -1 is not within 0..10"),
        ({"prompt": [1, 11]}, "prompt_token_ids: token id 11 is not within 0..10"),
        ({"prompt": [1], "stop_token_ids": [3, 12]}, "stop_token_ids: token id 12"),
        ({"prompt": [1], "logit_bias": {11: 1.0}}, "logit_bias: token id 11"),
        ({"prompt": [1], "id": "live"}, "request id 'live' is in use"),
    ],
)
def test_a_request_that_breaks_a_limit_is_refused_and_leaves_no_trace(options, message):
    bench = Bench()
    bench.add([1], "live")
    with pytest.raises(RequestError, match=message):
        bench.add(**options)
    assert bench.scheduler.num_waiting == 1
    bench.drain()
    bench.check_outputs()


def test_the_longest_prompt_and_the_outermost_token_ids_are_accepted():
    bench = Bench()
    bench.add([0] + [VOCAB - 1] * 30, logit_bias={0: 1, VOCAB - 1: 1}, stop_token_ids=[VOCAB - 1])
    bench.drain()
    bench.check_outputs()


def test_an_id_can_be_used_again_once_its_request_is_finished_or_aborted():
    bench = Bench()
    bench.add([1, 2], "a", max_tokens=1)
    bench.step()
    bench.add([1, 3], "a")
    bench.schedule()
    bench.abort("a")  # in flight
    bench.add([1, 4], "a")
    bench.drain(depth=2)
    bench.check_outputs()


def test_an_id_is_in_use_until_the_last_continuation_is_finished():
    bench = Bench()
    first, second = bench.add([1, 2], "a", n=2)
    bench.finish(first)
    with pytest.raises(RequestError):
        bench.add([1, 2], "a")
    bench.finish(second)
    bench.add([1, 2], "a")


def test_too_few_blocks_for_one_sequence_are_refused():
    with pytest.raises(ConfigError, match=r"num_blocks=7 of 4 tokens .* use at least 8"):
        Bench(num_blocks=7)
    Bench(num_blocks=8)


def test_results_out_of_order_are_refused():
    bench = Bench(budget=2, max_num_seqs=1)
    bench.add([1, 2])
    bench.add([1, 3])
    first, second = bench.plan(), bench.plan()
    result = bench.model.execute(second)
    with pytest.raises(MoespanError, match=r"the result of step 1 is not due; in flight: \[0, 1\]"):
        bench.scheduler.update(second, result)
    bench.deliver()
    with pytest.raises(MoespanError, match=r"step 0 is not due; in flight: \[1\]"):
        bench.scheduler.update(first, result)
    bench.drain()
    bench.check_outputs()


# The prefix cache


def test_a_prompt_goes_on_from_the_blocks_of_an_equal_prefix():
    bench = Bench()
    bench.add(prompt_of(9), max_tokens=1)
    bench.step()
    (second,) = bench.add([*prompt_of(9), 5, 5])
    plan = bench.planned_step()
    assert (plan.context_lens, plan.query_lens) == ([8], [3])
    assert second.num_cached_tokens == 8
    scheduler = bench.scheduler
    assert (scheduler.num_prefix_queried_tokens, scheduler.num_prefix_hit_tokens) == (20, 8)
    bench.drain()
    bench.check_outputs()


def test_blocks_of_running_sequences_and_of_outputs_are_shared_too():
    bench = Bench()
    (first,) = bench.add(prompt_of(6), ignore_eos=True, max_tokens=20)
    for _ in range(8):
        bench.step()
    (second,) = bench.add(list(first.token_ids))
    assert bench.plan().context_lens == [13, 12]
    assert second.block_table[:3] == first.block_table[:3]
    bench.deliver()
    bench.drain()
    bench.check_outputs()


@pytest.mark.parametrize("num_tokens", [8, 9])
def test_at_least_one_token_is_computed_if_the_cache_has_the_whole_prompt(num_tokens):
    bench = Bench()
    bench.add(prompt_of(12), max_tokens=1)
    bench.step()
    bench.add(prompt_of(12)[:num_tokens])
    plan = bench.planned_step()
    assert (plan.context_lens, plan.query_lens) == (([4], [4]) if num_tokens == 8 else ([8], [1]))
    bench.drain()
    bench.check_outputs()


def test_blocks_are_shared_only_after_their_result_is_back():
    bench = Bench()
    bench.add(prompt_of(8), "a")
    bench.schedule()
    (too_early,) = bench.add(prompt_of(9), "b")
    bench.schedule()
    bench.deliver()
    (late,) = bench.add(prompt_of(9), "c")
    bench.schedule()
    assert (too_early.num_cached_tokens, late.num_cached_tokens) == (0, 8)
    bench.drain(depth=2)
    bench.check_outputs()


def test_blocks_of_a_sequence_aborted_in_flight_are_not_shared():
    bench = Bench()
    bench.add(prompt_of(8), "a")
    bench.schedule()
    bench.abort("a")
    bench.deliver()
    (again,) = bench.add(prompt_of(8), "a")
    bench.step()
    assert again.num_cached_tokens == 0


def test_without_prefix_caching_everything_is_computed():
    bench = Bench(caching=False)
    for _ in range(2):
        bench.add(prompt_of(9))
        bench.drain()
    bench.check_outputs()
    assert bench.scheduler.num_prefix_hit_tokens == 0


def test_only_requests_with_the_same_salt_share_blocks():
    bench = Bench()
    for salt, cached in ((None, 0), ("a", 0), ("b", 0), ("a", 8), (None, 8), ("None", 0), ("", 8)):
        (sequence,) = bench.add(prompt_of(9), **({"cache_salt": salt} if salt else {}))
        bench.drain()
        assert sequence.num_cached_tokens == cached, salt
    bench.check_outputs()


# Continuations of one prompt


def computed_tokens(bench: Bench) -> int:
    """Run to the end; → the tokens that all steps computed."""
    count = 0
    while bench.scheduler.has_unfinished:
        if (plan := bench.schedule()) is not None:
            count += len(plan.token_ids)
        bench.deliver()
    bench.check_outputs()
    return count


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("budget", [5, 40])
def test_n_continuations_compute_their_prompt_once(caching: bool, budget: int, max_tokens: int):
    bench = Bench(caching=caching, budget=budget, block_size=4)
    bench.add(prompt_of(18), n=5, max_tokens=max_tokens, ignore_eos=True)
    assert bench.scheduler.num_waiting == 5
    rest = 4 * 2  # the tokens after the last full block, by each of the others
    assert computed_tokens(bench) == 18 + rest + 5 * max(max_tokens - 1, 0)
    assert bench.scheduler.num_prefix_queried_tokens == 18
    assert {sequence.num_cached_tokens for sequence in bench.received} == {0}


def test_requests_behind_continuations_that_wait_are_admitted():
    bench = Bench(budget=40)
    bench.add(prompt_of(9), n=3, ignore_eos=True, max_tokens=2)
    bench.add(prompt_of(9, seed=1), ignore_eos=True, max_tokens=2)
    assert bench.planned_step().query_lens == [9, 9]
    assert bench.planned_step().query_lens == [1, 1, 1, 1]
    bench.drain()
    bench.check_outputs()


def test_a_prompt_without_a_full_block_is_not_waited_for():
    bench = Bench(block_size=4)
    bench.add(prompt_of(4), n=3)
    assert bench.planned_step().query_lens == [4, 4, 4]


@pytest.mark.parametrize("caching", [False, True])
def test_continuations_go_on_if_the_first_one_ends_before_its_prompt_is_computed(caching: bool):
    bench = Bench(budget=5, caching=caching)
    first, second, third = bench.add(prompt_of(18), n=3, ignore_eos=True)
    bench.step()
    bench.finish(second)  # which still waits
    bench.finish(first)
    bench.drain()
    assert bench.received[third].end == "length"
    bench.check_outputs()


def test_continuations_compute_anew_what_led_to_logits_that_are_not_finite():
    bench = Bench(budget=40)
    bench.add(prompt_of(18), n=3)
    bench.schedule()
    (update,) = bench.deliver(corrupt={0})
    assert (update.sequence.index, update.finish_reason) == (0, "error")
    assert bench.planned_step().query_lens == [18, 18]
    bench.drain()
    bench.check_outputs()


def test_an_abort_ends_the_continuations_that_wait():
    bench = Bench(budget=5)
    bench.add(prompt_of(18), "a", n=3)
    bench.step()
    assert len(bench.abort("a")) == 3
    assert bench.scheduler.num_waiting == 0 and not bench.scheduler.has_unfinished
    bench.check_outputs()


# Prompts without output


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_for_no_tokens_scores_its_prompt_and_ends_with_length(ahead: bool, depth: int):
    bench = Bench(budget=5, ahead=ahead)
    bench.add(prompt_of(32), max_tokens=0, prompt_logprobs=0)  # as long as the model allows
    bench.add(prompt_of(7), max_tokens=0)
    bench.add(prompt_of(9), n=2, max_tokens=0)
    bench.drain(depth)
    bench.check_outputs()
    assert {received.end for received in bench.received.values()} == {"length"}
    (again,) = bench.add(prompt_of(32), max_tokens=0)
    bench.drain(depth)
    assert again.num_cached_tokens == 28
    with pytest.raises(RequestError, match="has 33 tokens; max_model_len=32 leaves room for 32"):
        bench.add(prompt_of(33), max_tokens=0)


# Reports on the prompt


@pytest.mark.parametrize("budget", [3, 4, 16])
def test_every_prompt_position_is_reported_once_with_any_chunks_and_cache(budget):
    bench = Bench(budget=budget)
    for _ in range(2):
        (sequence,) = bench.add(prompt_of(11), prompt_logprobs=1, prompt_logits=True)
        bench.drain()
        assert sequence.num_cached_tokens == 0
    bench.check_outputs()


def test_a_prompt_row_names_the_token_after_each_query_token():
    bench = Bench(budget=4)
    bench.add([1, 2, 3, 4, 5, 6], prompt_logprobs=2)
    rows = [row for _ in range(3) for row in bench.planned_step().prompts]
    assert [(row.targets, row.logprobs, row.logits) for row in rows] == [
        ([2, 3, 4, 5], 2, False),
        ([6], 2, False),
    ]


def test_only_the_first_continuation_reports_on_the_prompt():
    bench = Bench()
    bench.add(prompt_of(5), n=3, prompt_logprobs=0)
    assert [row.sequence for row in bench.plan().prompts] == [0]
    bench.deliver()
    bench.drain()
    bench.check_outputs()


@pytest.mark.parametrize("caching", [True, False])
def test_no_prompt_position_is_reported_twice_after_a_preemption(caching):
    """The older sequence takes the blocks of a prompt that is half reported on."""
    bench = Bench(num_blocks=8, budget=4, caching=caching)
    bench.add(prompt_of(8, seed=1), ignore_eos=True, max_tokens=None)
    (reporter,) = bench.add(prompt_of(20), prompt_logprobs=1, prompt_logits=True, max_tokens=2)
    while not reporter.num_preemptions:
        bench.step()
    assert 0 < reporter.num_reported_tokens < 20 and reporter.num_computed_tokens == 0
    bench.drain()
    bench.check_outputs()


# Preemption


def test_the_youngest_sequence_gives_its_blocks_to_an_older_one_and_is_computed_again():
    bench = Bench(num_blocks=8, max_num_seqs=3)
    old, middle, young = [bench.add(prompt_of(7, seed), ignore_eos=True)[0] for seed in range(3)]
    late = None
    while not bench.scheduler.num_preemptions:
        bench.step()
        late = late or bench.add(prompt_of(3, seed=9), ignore_eos=True)[0]
    assert young.status is Status.WAITING and young.num_output_tokens > 0
    assert list(bench.scheduler.waiting) == [young, late]
    assert (old.num_preemptions, middle.num_preemptions, young.num_preemptions) == (0, 0, 1)
    bench.drain()
    bench.check_outputs()


def test_nothing_is_admitted_in_a_step_that_preempted():
    """A waiting sequence that fits into the freed blocks is admitted one step later."""
    bench = Bench(num_blocks=8, budget=17)
    old, short, long = [
        (bench.add(prompt_of(n, seed=n), max_tokens=None, ignore_eos=True), bench.plan())[0][0]
        for n in (4, 5, 17)
    ]
    bench.deliver()
    bench.deliver()
    bench.schedule()  # `old` needs a block, and only `short` is not in flight
    assert (short.num_preemptions, long.num_preemptions) == (1, 0)
    bench.deliver()
    bench.deliver()
    while not long.num_preemptions:
        plan = bench.planned_step()
    assert len(plan.query_lens) == 1 and bench.scheduler.allocator.num_free == 4
    assert list(bench.scheduler.waiting) == [short, long]
    bench.step()
    assert bench.scheduler.running == [old, short] and list(bench.scheduler.waiting) == [long]
    bench.drain()
    bench.check_outputs()


def test_a_preempted_sequence_finds_its_own_blocks_again():
    bench = Bench(num_blocks=8)
    bench.add(prompt_of(8, seed=1), ignore_eos=True, max_tokens=9)
    (young,) = bench.add(prompt_of(14, seed=2), ignore_eos=True, max_tokens=16)
    contexts = []
    while young.status is not Status.FINISHED:
        admitted = young.num_preemptions and young.status is Status.WAITING
        plan = bench.planned_step()
        if admitted and young.status is Status.RUNNING:
            contexts.append(plan.context_lens[-1])
    assert young.num_preemptions > 0 and min(contexts) >= 4
    bench.drain()
    bench.check_outputs()


def test_an_older_sequence_waits_for_younger_ones_in_flight_and_then_takes_their_blocks():
    bench = Bench(num_blocks=8, max_num_seqs=1)
    (old,) = bench.add(prompt_of(15, seed=1), ignore_eos=True, max_tokens=None)
    (young,) = bench.add(prompt_of(15, seed=2), ignore_eos=True, max_tokens=None)
    bench.schedule()
    bench.schedule()
    while old.num_tokens < 17:  # now it needs a fifth block
        bench.deliver()
        bench.schedule()
        if old.num_tokens == 17 and not old.in_flight:
            break
    assert young.in_flight and not old.in_flight
    assert bench.schedule() is None
    assert old.num_preemptions == young.num_preemptions == 0
    bench.deliver()
    bench.schedule()
    assert old.in_flight and young.num_preemptions == 1
    bench.drain(depth=2)
    bench.check_outputs()


def test_the_youngest_sequence_keeps_its_blocks_while_it_waits_for_one_more():
    bench = Bench(num_blocks=8)
    (old,) = bench.add(prompt_of(18, seed=1), ignore_eos=True, max_tokens=3)
    (young,) = bench.add(prompt_of(11, seed=2), ignore_eos=True, max_tokens=6)
    while not old.is_finished:
        bench.step()
    assert young.num_preemptions == 0 and young.num_tokens == young.num_computed_tokens + 1
    bench.drain()
    bench.check_outputs()
    assert bench.scheduler.num_preemptions == 0


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_half_computed_prompts_that_hold_all_blocks_do_not_block_each_other(depth):
    bench = Bench(num_blocks=8, budget=3, max_num_seqs=3)
    for seed in range(6):
        bench.add(prompt_of(28, seed), max_tokens=None, ignore_eos=True)
        bench.add(prompt_of(5, seed), max_tokens=None, ignore_eos=True)
    bench.drain(depth)
    bench.check_outputs()


@pytest.mark.parametrize("depth", [1, 3])
def test_no_sequence_starves_under_an_endless_stream_of_new_ones(depth):
    bench = Bench(num_blocks=8, budget=8, max_num_seqs=4)
    old = bench.add(prompt_of(25), max_tokens=None, ignore_eos=True)[0]
    rng = random.Random(1)
    newcomers = []
    for step in range(600):
        if bench.scheduler.num_waiting < 8:
            newcomers += bench.add(prompt_of(rng.randint(1, 20), step), max_tokens=10)
        while len(bench.flights) < depth and bench.schedule() is not None:
            pass
        bench.deliver()
        if step == 60:
            assert old.is_finished
    assert bench.scheduler.num_preemptions > 10
    assert all(sequence.is_finished for sequence in newcomers[:-40]) and len(newcomers) > 80
    bench.drain(depth)
    bench.check_outputs()


# Abort


def test_aborting_a_waiting_or_running_request_frees_it_at_once():
    bench = Bench(max_num_seqs=1)
    running, waiting = bench.add([1, 2], "a") + bench.add([1, 3], "b")
    bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (1, 1)
    assert bench.abort("a") == [running] and bench.abort("b") == [waiting]
    assert not bench.scheduler.has_unfinished
    bench.check_outputs()


def test_blocks_of_a_sequence_aborted_in_flight_are_freed_when_its_plan_is_back():
    bench = Bench()
    bench.add(prompt_of(9), "a")
    bench.schedule()
    bench.abort("a")
    assert bench.scheduler.allocator.num_used == 3 and bench.scheduler.has_unfinished
    assert bench.schedule() is None
    assert bench.deliver() == []
    assert bench.scheduler.allocator.num_used == 0 and not bench.scheduler.has_unfinished


def test_aborting_an_unknown_or_aborted_request_does_nothing():
    bench = Bench()
    bench.add([1, 2], "a", n=2)
    assert bench.abort("b") == []
    assert len(bench.abort("a")) == 2
    assert bench.abort("a") == []
    bench.check_outputs()


def test_one_continuation_can_be_finished_and_the_others_go_on():
    bench = Bench()
    first, second = bench.add(prompt_of(5), "a", n=2, ignore_eos=True)
    bench.step()
    bench.finish(first)
    bench.finish(first)
    assert bench.plan().query_lens == [1]
    assert bench.abort("a") == [second]
    assert bench.deliver() == []
    bench.check_outputs()


# Several plans in flight


def test_plans_in_flight_hold_different_sequences():
    bench = Bench(max_num_seqs=2, budget=16)
    for seed in range(4):
        bench.add(prompt_of(3, seed), ignore_eos=True)
    first, second = bench.plan(), bench.plan()
    assert (len(first.query_lens), len(second.query_lens)) == (2, 2)
    assert bench.schedule() is None
    bench.deliver()
    assert bench.plan().token_ids == [
        sequence.token_ids[-1] for sequence in list(bench.received)[:2]
    ]
    bench.drain(depth=2)
    bench.check_outputs()


def test_the_chunks_of_a_prompt_go_into_consecutive_plans_in_flight():
    bench = Bench(budget=5)
    (long,) = bench.add(prompt_of(12), ignore_eos=True, prompt_logprobs=1)
    bench.add(prompt_of(6, seed=1), ignore_eos=True)
    plans = [bench.plan() for _ in range(4)]
    assert [plan.query_lens for plan in plans] == [[5], [5], [2, 3], [3]]
    assert [plan.context_lens for plan in plans] == [[0], [5], [10, 0], [3]]
    assert [len(plan.samples) for plan in plans] == [0, 0, 1, 1]
    assert bench.schedule() is None  # until a token is known
    for _ in range(3):
        bench.deliver()
    assert bench.plan().token_ids == [long.token_ids[-1]]
    bench.drain(depth=4)
    bench.check_outputs()


def test_a_prompt_of_which_chunks_are_in_flight_is_aborted_and_then_its_blocks_are_freed():
    bench = Bench(budget=5)
    (sequence,) = bench.add(prompt_of(20), "a")
    for _ in range(3):
        bench.plan()
    bench.abort("a")
    assert bench.schedule() is None
    for _ in range(2):
        assert bench.deliver() == [] and sequence.block_table
    assert bench.deliver() == [] and not sequence.block_table
    bench.check_outputs()


def test_a_prompt_with_chunks_in_flight_is_not_preempted_but_waits_until_it_can_be():
    bench = Bench(num_blocks=8, budget=5, caching=False)
    (old,) = bench.add(prompt_of(3, seed=1), ignore_eos=True, max_tokens=12)
    bench.step()
    (young,) = bench.add(prompt_of(26, seed=2), ignore_eos=True, max_tokens=2)
    while not young.num_preemptions:
        if bench.schedule() is None or len(bench.flights) == 3:
            bench.deliver()
    assert not young.in_flight and old.num_preemptions == 0
    bench.drain(depth=3)
    bench.check_outputs()


def test_decodes_are_spread_over_the_plans_and_a_long_prompt_is_in_each_of_them():
    config = EngineConfig(
        "", Layout(pp=4), max_num_seqs=8, max_num_batched_tokens=16, max_model_len=256
    )
    scheduler, model = Scheduler(config, 64, VOCAB), PagedModel(config.block_size)
    params = SamplingParams(max_tokens=99, ignore_eos=True)
    for number in range(8):
        scheduler.add(Request(id=str(number), prompt_token_ids=[number], params=params))
    made = [scheduler.schedule() for _ in range(4)]
    for plan in filter(None, made):
        scheduler.update(plan, model.execute(plan))
    scheduler.add(Request(id="long", prompt_token_ids=prompt_of(100), params=params))
    sizes = [plan.query_lens for plan in (scheduler.schedule() for _ in range(4)) if plan]
    assert [len(lengths) for lengths in sizes] == [4, 3, 3, 2]
    assert [lengths[-1] for lengths in sizes] == [13, 14, 14, 15]


@pytest.mark.parametrize(
    ("pp", "count", "sizes"),
    [
        (1, 5, [5]),
        (2, 5, [3, 2]),
        (4, 5, [2, 1, 1, 1]),
        (4, 4, [1, 1, 1, 1]),
        (4, 3, [1, 1, 1]),
        (4, 24, [6, 6, 6, 6]),
        (4, 40, [8, 8, 8, 8]),  # max_num_seqs
    ],
)
def test_a_plan_takes_at_most_its_share_of_the_sequences_so_that_every_stage_has_one(
    pp: int, count: int, sizes: list[int]
):
    config = EngineConfig(
        "", Layout(pp=pp), max_num_seqs=8, max_num_batched_tokens=64, max_model_len=32
    )
    scheduler = Scheduler(config, 64, VOCAB)
    for number in range(count):
        params = SamplingParams(max_tokens=4)
        scheduler.add(Request(id=str(number), prompt_token_ids=[number % VOCAB], params=params))
    plans = [scheduler.schedule() for _ in range(pp)]
    assert [len(plan.query_lens) for plan in plans if plan is not None] == sizes


def test_metrics_follow_the_sequences():
    bench = Bench(num_blocks=10, max_num_seqs=1)
    bench.add(prompt_of(9), ignore_eos=True)
    bench.add(prompt_of(9))
    scheduler = bench.scheduler
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_in_flight) == (2, 0, 0)
    bench.schedule()
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_in_flight) == (1, 1, 1)
    assert scheduler.kv_usage == 0.3
    bench.deliver()
    assert scheduler.num_in_flight == 0


def test_the_same_calls_make_the_same_plans():
    def plans() -> list[StepPlan | None]:
        bench = Bench(num_blocks=9, budget=7)
        for seed in range(8):
            bench.add(prompt_of(4 + seed, seed % 2), n=2)
        made = []
        while bench.scheduler.has_unfinished:
            plan = bench.schedule()
            if plan is None or len(bench.flights) == 2:
                bench.deliver()
            made.append(plan)
        assert bench.scheduler.num_preemptions and bench.scheduler.num_prefix_hit_tokens
        return made

    assert plans() == plans()


# Plans made while the last one runs


def test_a_plan_ahead_names_the_token_that_the_last_plan_samples():
    bench = Bench(ahead=True)
    bench.add(prompt_of(3), max_tokens=1)
    bench.add(prompt_of(4), ignore_eos=True, max_tokens=3)
    first, second = bench.plan(), bench.plan()
    assert len(first.samples) == 2
    # The first sequence ends with its token; the other's has index 1.
    assert (second.token_ids, second.query_lens, second.context_lens) == ([~1], [1], [4])
    assert second.positions == [1]
    assert bench.schedule() is None  # two are in flight
    bench.deliver()
    assert bench.plan().token_ids == [~0]
    bench.drain(depth=2)
    bench.check_outputs()
    assert bench.num_steps == 3  # the limit is known ahead, so no step is wasted


def test_a_plan_after_the_result_is_back_has_the_token_itself():
    bench = Bench(ahead=True)
    bench.add(prompt_of(3), ignore_eos=True)
    bench.step()
    assert bench.plan().token_ids == bench.received[next(iter(bench.received))].token_ids


def test_a_prompt_goes_on_in_the_next_plan_while_its_last_chunk_is_computed():
    bench = Bench(budget=5, ahead=True)
    bench.add(prompt_of(12), max_tokens=1)
    plans = [bench.plan(), bench.plan()]
    bench.deliver()
    plans.append(bench.plan())
    assert [plan.query_lens for plan in plans] == [[5], [5], [2]]
    assert [plan.context_lens for plan in plans] == [[0], [5], [10]]
    assert [len(plan.samples) for plan in plans] == [0, 0, 1]
    bench.drain(depth=2)
    bench.check_outputs()


def test_the_plan_ahead_of_a_stopped_sequence_is_dropped_and_then_its_blocks_are_freed():
    bench = Bench(ahead=True)
    (sequence,) = bench.add(prompt_that_outputs(EOS, at=0))
    bench.schedule()
    ahead = bench.plan()
    (update,) = bench.deliver()
    assert (update.token_ids, update.finish_reason) == ([EOS], "stop")
    assert sequence.block_table == ahead.block_tables[0] and bench.scheduler.has_unfinished
    assert bench.schedule() is None
    assert bench.deliver() == []
    assert bench.scheduler.kv_usage == 0
    bench.check_outputs()


@pytest.mark.parametrize("options", [{"presence_penalty": 1.0}, {"prompt_logprobs": 0}])
def test_the_next_plan_waits_for_a_result_that_it_depends_on(options):
    bench = Bench(ahead=True)
    bench.add(prompt_of(3), ignore_eos=True, max_tokens=3, **options)
    bench.add(prompt_of(4), ignore_eos=True, max_tokens=3)
    bench.schedule()
    assert bench.schedule() is None
    bench.deliver()
    assert len(bench.plan().query_lens) == 2  # all sequences advance together
    bench.drain(depth=2)
    bench.check_outputs()


def test_a_constrained_sequence_waits_for_its_token_and_the_plans_of_others_do_not_wait_for_it():
    bench = Bench(ahead=True)
    (bound,) = bench.add(prompt_of(3), grammar=True, min_tokens=8)
    (free,) = bench.add(prompt_of(4), ignore_eos=True)
    assert len(bench.plan().query_lens) == 2
    ahead = bench.plan()
    assert (ahead.query_lens, ahead.context_lens) == ([1], [free.num_tokens])
    bench.deliver()
    both = bench.plan()
    assert both.query_lens == [1, 1] and both.token_ids[0] == bound.token_ids[-1]
    assert [row.allowed is None for row in both.samples] == [False, True]
    bench.drain(depth=2)
    bench.check_outputs()


def test_no_plan_ahead_is_made_of_sequences_alone_that_wait_for_their_tokens_anyway():
    bench = Bench(ahead=True)
    bench.add(prompt_of(3), grammar=True, min_tokens=8)
    bench.plan()
    bench.add(prompt_of(4), grammar=True, min_tokens=8)
    assert bench.schedule() is None  # so that both come together
    bench.deliver()
    assert len(bench.plan().query_lens) == 2
    bench.drain(depth=2)
    bench.check_outputs()


def test_ids_that_never_change_and_bad_words_of_one_token_do_not_wait():
    bench = Bench(ahead=True)
    bench.add(prompt_of(3), allowed_token_ids=[1, 2, 4], bad_words=["4"], ignore_eos=True)
    bench.plan()
    (row,) = bench.plan().samples
    assert [token for token in range(VOCAB) if may_come(token, row)] == [1, 2]
    bench.drain(depth=2)
    bench.check_outputs()


def test_a_grammar_that_leaves_only_the_end_ends_its_sequence_at_once():
    ends = []
    for seed in range(40):
        received = run_alone(prompt_of(4, seed), grammar=True, seed=seed)
        ends.append((received.end, received.token_ids[-1] == EOS))
    assert {("stop", True), ("stop", False), ("length", False), ("error", False)} == set(ends)


def test_a_grammar_that_fails_ends_its_own_sequence_only():
    failed = next(
        seed for seed in range(200) if run_alone(prompt_of(4, seed), grammar=True).end == "error"
    )
    bench = Bench()
    (bad,) = bench.add(prompt_of(4, failed), "bad", grammar=True)
    (good,) = bench.add(prompt_of(4, failed), "good", ignore_eos=True)
    bench.drain()
    bench.check_outputs()
    assert bench.received[bad].error == f"the grammar fails after {bad.num_output_tokens} tokens"
    assert bench.received[good].end == "length"


def test_stop_tokens_are_barred_in_plans_ahead_until_min_tokens_are_planned():
    bench = Bench(ahead=True)
    bench.add(prompt_of(3), min_tokens=1, stop_token_ids=[7], ignore_eos=True)
    assert [bench.plan().samples[0].barred for _ in range(2)] == [[7], []]


def test_a_block_whose_last_token_is_not_known_yet_is_not_shared():
    bench = Bench(ahead=True)
    (first,) = bench.add(prompt_of(3), ignore_eos=True, max_tokens=6)
    bench.schedule()
    bench.schedule()  # it writes the fourth token of the block, whose id is unknown
    bench.deliver()
    bench.add([*first.token_ids, 1])
    assert bench.plan().context_lens[1] == 0
    bench.drain(depth=2)
    bench.check_outputs()


def test_logits_that_are_not_finite_drop_the_plan_ahead():
    bench = Bench(budget=12, ahead=True)
    (bad,) = bench.add(prompt_of(9), "bad", ignore_eos=True)
    bench.schedule()
    bench.schedule()
    (update,) = bench.deliver(corrupt={0})
    assert update.error == "the logits at position 8 are not finite"
    assert bad.block_table and bench.deliver() == [] and not bad.block_table
    (again,) = bench.add(prompt_of(9), "again")
    bench.drain(depth=2)
    assert again.num_cached_tokens == 0
    bench.check_outputs()


def test_a_plan_ahead_takes_no_blocks_from_sequences_in_flight():
    bench = Bench(num_blocks=8, ahead=True)
    (old,) = bench.add(prompt_of(15, seed=1), ignore_eos=True, max_tokens=None)
    (young,) = bench.add(prompt_of(15, seed=2), ignore_eos=True, max_tokens=None)
    while old.num_tokens + old.num_expected_tokens < 17:
        assert len(bench.plan().query_lens) == 2
        if len(bench.flights) == 2:
            bench.deliver()
    assert bench.schedule() is None  # `old` needs a fifth block, and `young` is in flight
    bench.deliver()
    bench.schedule()
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    bench.drain(depth=2)
    bench.check_outputs()


# Drafts


class Fixed:
    """A drafter that always drafts the same tokens."""

    def __init__(self, *drafts: int) -> None:
        self.drafts = list(drafts)

    def draft(self, most: int, num_expected: int = 0) -> list[int]:
        return self.drafts[num_expected : num_expected + most]


def draft(sequence: Sequence, *drafts: int) -> None:
    """From now on, let a sequence have these drafts."""
    sequence.drafter = Fixed(*drafts)  # type: ignore[assignment]


def begin(bench: Bench, prompt: list[int], **options: Any) -> tuple[Sequence, list[int]]:
    """A sequence whose first token is sampled, and the tokens that follow it."""
    (sequence,) = bench.add(prompt, **{"ignore_eos": True, "max_tokens": 8, **options})
    draft(sequence)
    bench.step()
    request = bench.received[sequence].request
    return sequence, expected_output(request, 0, bench.config.max_model_len)[1:]


def test_each_draft_is_a_row_of_one_token_in_the_blocks_of_its_sequence():
    bench = Bench(drafts=3)
    (sequence, (first, second, *_)) = begin(bench, prompt_of(6))
    draft(sequence, first, second, second + 1)
    last = sequence.token_ids[-1]
    plan = bench.planned_step()
    assert plan.is_decode
    assert plan.token_ids == [last, first, second, second + 1]
    assert (plan.query_lens, plan.context_lens) == ([1] * 4, [6, 7, 8, 9])
    assert [len(table) for table in plan.block_tables] == [2, 2, 3, 3]
    assert (plan.sampled, plan.positions) == ([0, 1, 2, 3], [1, 2, 3, 4])
    assert sequence.num_output_tokens == 4 and sequence.num_computed_tokens == 9
    scheduler = bench.scheduler
    assert scheduler.draft_counts == DraftCounts(num_drafts=1, num_tokens=3, num_accepted=2)
    draft(sequence)
    bench.drain()
    bench.check_outputs()


def test_penalties_and_min_tokens_count_the_drafts_before():
    bench = Bench(drafts=3)
    sequence, following = begin(
        bench, prompt_of(6), frequency_penalty=1.0, stop_token_ids=[7], min_tokens=3
    )
    draft(sequence, *[token for token in following[:2] if token != 7])
    output = Counter(output_of(sequence))
    rows = bench.plan().samples
    assert [row.barred for row in rows] == [[7], [7], []][: len(rows)] and len(rows) > 1
    for number, row in enumerate(rows):
        assert row.seen_output == output + Counter(following[:number])
    bench.deliver()
    bench.drain()
    bench.check_outputs()


def test_nothing_is_drafted_beyond_max_tokens_or_a_token_that_ends_the_output():
    bench = Bench(drafts=3)
    limited, _ = begin(bench, prompt_of(6), max_tokens=4)
    stopped, _ = begin(bench, prompt_of(5), stop_token_ids=[9])
    draft(limited, 4, 4, 4)  # its third token is sampled now
    draft(stopped, 4, 9, 4)
    plan = bench.plan()
    assert plan.sampled == [0, 1, 2, 3]
    assert plan.token_ids[1] == plan.token_ids[3] == 4


def test_a_draft_that_a_grammar_rules_out_ends_the_drafts():
    bench = Bench(drafts=3, ahead=True)
    (sequence,) = bench.add(prompt_of(3), grammar=True, min_tokens=8)
    draft(sequence)
    bench.step()
    (row,) = bench.plan().samples
    bench.deliver()
    draft(sequence, EOS, 4)  # EOS may not come yet
    assert not row.allows(EOS) and len(bench.plan().samples) == 1


def test_drafts_take_no_rows_from_sequences_that_run_or_wait():
    bench = Bench(drafts=3, max_num_seqs=4)
    first, _ = begin(bench, prompt_of(3))
    draft(first, 4, 4, 4)
    bench.add(prompt_of(4), ignore_eos=True)
    bench.add(prompt_of(5), ignore_eos=True)
    assert bench.planned_step().query_lens == [1, 1, 4, 5]


def test_drafts_preempt_nobody():
    bench = Bench(num_blocks=8, drafts=3)
    old, _ = begin(bench, prompt_of(12, seed=1), max_tokens=None)
    begin(bench, prompt_of(12, seed=2), max_tokens=None)
    draft(old, 4, 4, 4)
    # The other sequence needs the last free block, so only two slots of its own are left.
    assert (old.num_tokens, bench.scheduler.allocator.num_free) == (14, 1)
    assert bench.planned_step().query_lens == [1, 1, 1, 1]
    assert bench.scheduler.num_preemptions == 0
    draft(old)
    bench.drain()
    bench.check_outputs()


def test_logits_that_are_not_finite_after_a_right_draft_end_the_sequence_behind_it():
    bench = Bench(drafts=3)
    bad, (first, *_) = begin(bench, prompt_of(6))
    draft(bad, first, 4)
    bench.plan()
    (update,) = bench.deliver(corrupt={1})
    assert (update.token_ids, update.finish_reason) == ([first], "error")
    assert update.error == "the logits at position 7 are not finite"
    bench.check_outputs()


def test_logits_that_are_not_finite_after_a_wrong_draft_end_nothing():
    bench = Bench(drafts=3)
    good, (first, *_) = begin(bench, prompt_of(6))
    draft(good, first + 1)
    bench.plan()
    (update,) = bench.deliver(corrupt={1})
    assert update.token_ids == [first] and update.error is None
    draft(good)
    bench.drain()
    bench.check_outputs()


def test_a_plan_ahead_has_drafts_after_the_token_that_is_sampled_and_the_next_one_waits():
    bench = Bench(drafts=3, ahead=True)
    sequence, (first, second, third, *_) = begin(bench, prompt_of(6))
    bench.plan()
    draft(sequence, first, second, third)
    assert bench.plan().token_ids == [~0, second, third]
    bench.deliver()
    assert bench.schedule() is None
    (update,) = bench.deliver()
    assert update.token_ids[:2] == [second, third] and len(update.token_ids) == 3
    draft(sequence)
    bench.drain(depth=2)
    bench.check_outputs()


# Random schedules

PREFIXES = [prompt_of(n, seed=100 + n % 3) for n in (4, 8, 9, 12)]


def random_request(rng: random.Random, max_model_len: int) -> tuple[list[int], dict[str, Any]]:
    prefix = rng.choice([[], *PREFIXES])
    prompt = prefix + [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 2, 5, 12]))]
    prompt = (prompt or [3])[: max_model_len - 1]
    options = {
        "n": rng.choice([1, 1, 1, 2, 3]),
        "max_tokens": rng.choice([None, 0, 1, 4, 4, 10, 10]),
        "ignore_eos": rng.random() < 0.7,
        "stop_token_ids": rng.choice([[], [], [2], [3, 4]]),
        "prompt_logprobs": rng.choice([None, None, None, 2]),
        "prompt_logits": rng.random() < 0.1,
        "logprobs": rng.choice([None, 0]),
        "repetition_penalty": rng.choice([1.0, 1.0, 2.0]),
        "frequency_penalty": rng.choice([0.0, 0.0, 1.0]),
        "seed": rng.choice([None, 5]),
        "grammar": rng.random() < 0.2,
        "allowed_token_ids": rng.choice([None, None, None, [0, 1, 2, 3, 5, 8], [1, 4, 5, 6, 7, 9]]),
        "bad_words": rng.choice([[], [], [], ["4"], ["1 2", "5 5 5", "9"]]),
        "cache_salt": rng.choice([None, None, None, "a"]),
    }
    most = 3 if options["max_tokens"] is None else options["max_tokens"]
    options["min_tokens"] = rng.choice([0, 0, min(3, most)])
    return prompt, options


@pytest.mark.parametrize(
    ("seed", "ahead", "drafts"),
    [
        *((seed, ahead, 0) for seed in range(16) for ahead in (False, True)),
        *((seed, seed // 4 % 2 == 1, 3) for seed in range(16)),
    ],
)
def test_random_schedules_give_every_request_the_output_it_gets_alone(seed, ahead, drafts):
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 4, 8])
    depth = 1 + seed % 4
    bench = Bench(
        block_size=block_size,
        num_blocks=-(-32 // block_size) + rng.randrange(0, 16 // block_size),
        max_num_seqs=rng.choice([4, 8]) + 2 * drafts,
        budget=rng.choice([4, 7, 16, 40]) + 3 * drafts,
        caching=seed % 8 != 7,
        ahead=ahead,
        drafts=drafts,
    )
    for _ in range(4000):
        action = rng.random()
        live = bench.live
        if action < 0.2 and len(live) < 12:
            prompt, options = random_request(rng, 32)
            bench.add(prompt, **options)
        elif action < 0.205 and live:
            bench.abort(rng.choice(live).id)
        elif action < 0.215 and live:
            bench.finish(rng.choice(live))
        elif action < 0.65 and len(bench.flights) < depth:
            bench.schedule()
        elif bench.flights:
            bench.deliver(corrupt={rng.randrange(4)} if rng.random() < 0.01 else frozenset())
    bench.drain(depth)
    bench.check_outputs()

    # The walk has met the difficult cases.
    ends = Counter(received.end for received in bench.received.values())
    assert min(ends[end] for end in ("stop", "length", "abort")) > 3
    assert bench.num_aborted_in_flight > 3
    assert sum(received.grammar for received in bench.received.values()) > 3
    assert bench.scheduler.num_preemptions > 10
    counts = bench.scheduler.draft_counts
    num_refused = counts.num_tokens - counts.num_accepted
    assert bool(drafts) == (counts.num_accepted > 9) == (num_refused > 3)
    assert bench.config.enable_prefix_caching == (bench.scheduler.num_prefix_hit_tokens > 100)


class RandomSchedules(RuleBasedStateMachine):
    """The same walk, steered by Hypothesis, so that a failure shrinks to few steps."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        spare_blocks=st.integers(0, 8),
        budget=st.integers(1, 20),
        max_num_seqs=st.integers(1, 4),
        depth=st.integers(1, 4),
        caching=st.booleans(),
        ahead=st.booleans(),
        drafts=st.sampled_from([0, 0, 1, 3]),
    )
    def start(self, block_size, spare_blocks, budget, max_num_seqs, depth, caching, ahead, drafts):
        self.depth = depth
        self.bench = Bench(
            block_size=block_size,
            num_blocks=16 // block_size + spare_blocks,
            max_model_len=16,
            max_num_seqs=max_num_seqs,
            budget=budget,
            caching=caching,
            ahead=ahead,
            drafts=drafts,
        )

    @rule(
        prefix=st.sampled_from([4, 8, 12]),
        tail=st.lists(st.integers(0, 2), max_size=3),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.sampled_from([None, 0, 1, 3]),
        report=st.booleans(),
        penalty=st.booleans(),
        grammar=st.booleans(),
        bad_words=st.sampled_from([[], ["3"], ["1 2", "2 1 7"]]),
    )
    def add(self, prefix, tail, n, max_tokens, report, penalty, grammar, bad_words):
        self.bench.add(
            [*prompt_of(12)[:prefix], *tail],
            n=n,
            max_tokens=max_tokens,
            prompt_logprobs=1 if report else None,
            presence_penalty=1.0 if penalty else 0.0,
            grammar=grammar,
            bad_words=bad_words,
        )

    @precondition(lambda self: len(self.bench.flights) < self.depth)
    @rule()
    def schedule(self):
        self.bench.schedule()

    @precondition(lambda self: self.bench.flights)
    @rule(bad=st.sampled_from([None, None, None, None, 0]))
    def deliver(self, bad):
        self.bench.deliver(corrupt=frozenset() if bad is None else {bad})

    @precondition(lambda self: self.bench.scheduler.has_unfinished)
    @rule(pick=st.integers(0, 100), whole_request=st.booleans())
    def abort(self, pick, whole_request):
        live = self.bench.live
        if live and whole_request:
            self.bench.abort(live[pick % len(live)].id)
        elif live:
            self.bench.finish(live[pick % len(live)])

    @invariant()
    def nothing_is_leaked(self):
        if hasattr(self, "bench"):
            check_scheduler(self.bench.scheduler)

    def teardown(self):
        if hasattr(self, "bench"):
            self.bench.drain(self.depth)
            self.bench.check_outputs()


RandomSchedules.TestCase.settings = settings(
    max_examples=examples(150), stateful_step_count=60, deadline=None, derandomize=True
)
TestRandomSchedules = RandomSchedules.TestCase
