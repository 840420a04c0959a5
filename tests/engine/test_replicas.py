"""The dp replicas: which one gets a request, and that nothing is left of a finished one."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moespan.config import EngineConfig, Layout
from moespan.engine.integrity import check_scheduler
from moespan.engine.replicas import Replicas
from moespan.engine.request import Request, SamplingParams
from moespan.engine.sequence import Sequence
from moespan.engine.step import StepPlan
from moespan.errors import RequestError
from tests.engine.paged_model import EOS, VOCAB, PagedModel, expected_output
from tests.tiers import examples


class Fleet:
    """Replicas with a model each, and up to pp steps of all of them in flight."""

    def __init__(
        self,
        *,
        dp: int,
        pp: int = 1,
        num_blocks: int = 16,
        max_num_seqs: int = 4,
        budget: int = 16,
        ahead: bool = False,
    ) -> None:
        self.config = EngineConfig(
            "",
            Layout(dp=dp, pp=pp),
            block_size=4,
            max_model_len=32,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            async_scheduling=ahead,
        )
        self.replicas = Replicas(self.config, num_blocks, VOCAB, [EOS])
        self.models = [PagedModel(4) for _ in range(dp)]
        self.flights: deque[list[StepPlan | None]] = deque()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[Sequence, list[int]] = {}
        self.ends: dict[Sequence, list[str]] = {}

    def add(self, prompt: list[int], **options) -> int:
        """Queue a request; returns the replica that got it."""
        params = SamplingParams(**{"max_tokens": 6, "seed": 0, **options})
        request = Request(id=str(len(self.requests)), prompt_token_ids=prompt, params=params)
        sequences = self.replicas.add(request)
        self.requests[request.id] = request
        for sequence in sequences:
            self.outputs[sequence], self.ends[sequence] = [], []
        return self.replica_of(request.id)

    def replica_of(self, request_id: str) -> int:
        (replica,) = [i for i, one in enumerate(self.replicas.schedulers) if one.knows(request_id)]
        return replica

    def schedule(self) -> bool:
        plans = self.replicas.schedule()
        if plans is None:
            return False
        self.flights.append(plans)
        assert self.replicas.oldest_in_flight is self.flights[0]
        return True

    def deliver(self) -> None:
        plans = self.flights.popleft()
        results = [
            None if plan is None else model.execute(plan)
            for plan, model in zip(plans, self.models, strict=True)
        ]
        for update in self.replicas.update(results):
            assert not self.ends[update.sequence], "something came after the end"
            self.outputs[update.sequence] += update.token_ids
            if update.finish_reason is not None:
                self.ends[update.sequence].append(update.finish_reason)

    def abort(self, request_id: str) -> None:
        for sequence in self.replicas.abort(request_id):
            self.ends[sequence].append("abort")

    def finish(self, sequence: Sequence) -> None:
        if not self.ends[sequence]:
            self.ends[sequence].append("finish")
        self.replicas.finish(sequence)

    def drain(self) -> None:
        while self.replicas.has_unfinished:
            while len(self.flights) < self.config.most_steps_in_flight and self.schedule():
                pass
            self.deliver()

    def check_integrity(self) -> None:
        for scheduler in self.replicas.schedulers:
            check_scheduler(scheduler)
        assert self.replicas.num_in_flight == len(self.flights)
        unfinished = {sequence.id for sequence, ends in self.ends.items() if not ends}
        assert set(self.replicas._home) == unfinished
        for request_id, scheduler in self.replicas._home.items():
            assert scheduler is self.replicas.schedulers[self.replica_of(request_id)]

    def check_outputs(self) -> None:
        """Each request has ended once, with the tokens that it gets alone, and nothing is left."""
        self.check_integrity()
        assert not self.replicas._home
        assert self.replicas.schedule() is None
        for scheduler in self.replicas.schedulers:
            assert scheduler.kv_usage == 0 and not scheduler.has_unfinished
        for sequence, output in self.outputs.items():
            (end,) = self.ends[sequence]
            expected = expected_output(self.requests[sequence.id], sequence.index, 32)
            cut = len(output) if end in ("abort", "finish") else None
            assert output == expected[:cut]


def prompt(first: int, length: int = 9) -> list[int]:
    return [first] * length


def test_without_a_known_prefix_the_least_loaded_replica_gets_a_request():
    fleet = Fleet(dp=3)
    assert [fleet.add(prompt(number)) for number in range(1, 7)] == [0, 1, 2, 0, 1, 2]
    fleet.abort("1")
    assert fleet.add(prompt(7)) == 1
    fleet.drain()
    fleet.check_outputs()


def test_every_continuation_counts_as_load():
    fleet = Fleet(dp=2)
    assert fleet.add(prompt(1), n=3) == 0
    assert [fleet.add(prompt(number)) for number in range(2, 6)] == [1, 1, 1, 0]


def test_the_replica_with_the_longest_cached_prefix_gets_a_request():
    fleet = Fleet(dp=3)
    fleet.add(prompt(1))
    fleet.add([1, 1, 1, 1, 2, 2, 2, 2, 3])
    fleet.drain()
    # Replica 0 has 1111 1111, replica 1 has 1111 2222, replica 2 has nothing.
    assert fleet.add([1] * 8 + [5]) == 0
    assert fleet.add([1] * 8 + [6]) == 0
    assert fleet.add([1, 1, 1, 1, 2, 2, 2, 2, 5]) == 1
    assert fleet.add([2] * 9) == 2
    fleet.drain()
    fleet.check_outputs()
    assert [s.num_prefix_hit_tokens for s in fleet.replicas.schedulers] == [16, 8, 0]


def test_of_equally_long_prefixes_the_less_loaded_replica_gets_a_request():
    fleet = Fleet(dp=2)
    fleet.add([1, 1, 1, 1, 2])
    fleet.add([1, 1, 1, 1, 3])
    fleet.drain()
    assert fleet.add(prompt(1)) == 0
    assert fleet.add(prompt(1)) == 1


def test_a_replica_a_whole_batch_ahead_gets_no_more_even_with_a_cached_prefix():
    fleet = Fleet(dp=2, max_num_seqs=4)
    fleet.add(prompt(1))
    fleet.drain()
    assert [fleet.add(prompt(1)) for _ in range(7)] == [0, 0, 0, 0, 1, 0, 1]


def test_one_replica_needs_no_choice():
    fleet = Fleet(dp=1)
    assert [fleet.add(prompt(number)) for number in range(1, 4)] == [0, 0, 0]


def test_an_idle_replica_has_no_plan_and_the_others_go_on():
    fleet = Fleet(dp=3)
    fleet.add(prompt(1))
    fleet.schedule()
    assert [plan is None for plan in fleet.flights[0]] == [False, True, True]
    fleet.deliver()
    fleet.drain()
    fleet.check_outputs()


def test_an_id_in_use_on_any_replica_is_refused_and_may_be_used_again_after():
    fleet = Fleet(dp=2)
    fleet.add(prompt(1))
    request = fleet.requests["0"]
    with pytest.raises(RequestError, match="id '0' is in use"):
        fleet.replicas.add(request)
    fleet.drain()
    fleet.replicas.add(request)


def test_a_refused_request_leaves_nothing_behind():
    fleet = Fleet(dp=2)
    with pytest.raises(RequestError, match="the prompt has 40 tokens"):
        fleet.add(prompt(1, length=40))
    assert not fleet.replicas._home and not fleet.replicas.has_unfinished


def test_aborting_an_unknown_request_does_nothing():
    fleet = Fleet(dp=2)
    fleet.abort("7")
    fleet.add(prompt(1), n=2)
    fleet.abort("0")
    fleet.abort("0")
    fleet.check_outputs()


class RandomReplicas(RuleBasedStateMachine):
    """Random requests, aborts and results; after every call `_home` has the unfinished ones."""

    @initialize(
        dp=st.integers(1, 4),
        pp=st.integers(1, 3),
        spare_blocks=st.integers(0, 6),
        ahead=st.booleans(),
    )
    def start(self, dp, pp, spare_blocks, ahead):
        self.fleet = Fleet(
            dp=dp, pp=pp, num_blocks=8 + spare_blocks, max_num_seqs=3, budget=9, ahead=ahead
        )

    @rule(
        first=st.integers(1, 3),
        length=st.sampled_from([1, 5, 9, 13]),
        n=st.sampled_from([1, 1, 2]),
        max_tokens=st.sampled_from([1, 4, 15]),
        penalty=st.sampled_from([0.0, 0.0, 1.0]),
    )
    def add(self, first, length, n, max_tokens, penalty):
        self.fleet.add(prompt(first, length), n=n, max_tokens=max_tokens, presence_penalty=penalty)

    @precondition(lambda self: len(self.fleet.flights) < self.fleet.config.most_steps_in_flight)
    @rule()
    def schedule(self):
        self.fleet.schedule()

    @precondition(lambda self: self.fleet.flights)
    @rule()
    def deliver(self):
        self.fleet.deliver()

    @precondition(lambda self: self.fleet.requests)
    @rule(pick=st.integers(0, 100))
    def abort(self, pick):
        self.fleet.abort(str(pick % len(self.fleet.requests)))

    @precondition(lambda self: self.fleet.outputs)
    @rule(pick=st.integers(0, 100))
    def finish(self, pick):
        self.fleet.finish(list(self.fleet.outputs)[pick % len(self.fleet.outputs)])

    @invariant()
    def nothing_is_leaked(self):
        if hasattr(self, "fleet"):
            self.fleet.check_integrity()

    def teardown(self):
        if hasattr(self, "fleet"):
            self.fleet.drain()
            self.fleet.check_outputs()


RandomReplicas.TestCase.settings = settings(
    max_examples=examples(80), stateful_step_count=50, deadline=None, derandomize=True
)
TestRandomReplicas = RandomReplicas.TestCase
