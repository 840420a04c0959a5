"""Continuous batching by the engine's own scheduler, on predicted times.

`Replicas` decides as it does in an engine: arrivals, admission, chunks, preemption, the prefix
cache, the choice of a replica, the stages' fair shares. Only the steps are not run: their times
come from `StepTimer`, and each request gets as many tokens as the load says. The loop keeps plans
in flight exactly as `Engine.step` does; a test replays a recorded run to the same plans.

The clock is the simulated one. How long the simulation itself computes never enters it; the
engine's host time does. Imports no torch.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from moespan.config import EngineConfig
from moespan.device import DEVICES
from moespan.engine.replicas import Replicas
from moespan.engine.request import Request, SamplingParams
from moespan.engine.step import Sampled, StepPlan, StepResult
from moespan.planner.cost import IDLE, ReplicaStep
from moespan.planner.load import Load
from moespan.planner.outcome import RequestTimes
from moespan.planner.work import Chunk

Plans = list[StepPlan | None]
"""The plans of a step, one for each replica."""

_SAMPLED = Sampled(1)
_CHECKED_EVERY = 64
_REMEMBERED = 64


class StepTimer(Protocol):
    """The times of a step, in seconds; `moespan.planner.cost.StepCost` is one."""

    def stages_s(self, step: Sequence[ReplicaStep]) -> list[float]:
        """Seconds of each stage."""
        ...

    def launch_s(self, step: Sequence[ReplicaStep]) -> float:
        """Seconds that the leader spends on starting the first stage's kernels."""
        ...

    def before_s(self, step: Sequence[ReplicaStep]) -> float:
        """Seconds of the leader until the plans are out."""
        ...

    def after_s(self, step: Sequence[ReplicaStep]) -> float:
        """Seconds of the leader to take in the results."""
        ...


class Run(NamedTuple):
    """A simulated run.

    Attributes:
        times: of all requests that ended, in the order of their arrival.
        num_steps: steps of the engine.
        num_preemptions: how often a sequence lost its blocks.
        hit_share: share of prompt tokens that the prefix cache held.
        is_cut: whether `give_up` ended it.
        blocks_held: blocks that sequences hold at the end; 0 unless it was cut.
    """

    times: list[RequestTimes]
    num_steps: int
    num_preemptions: int
    hit_share: float
    is_cut: bool
    blocks_held: int


def simulate(
    config: EngineConfig,
    num_blocks: int,
    vocab_size: int,
    timer: StepTimer,
    load: Load,
    *,
    slower: float = 1.0,
    give_up: Callable[[list[RequestTimes]], bool] | None = None,
    on_step: Callable[[Plans], None] | None = None,
    num_others: int = 0,
) -> Run:
    """Run `load` on an engine of `config` with `num_blocks` blocks of KV cache.

    Args:
        timer: takes the steps of all replicas, with those of `num_others`.
        slower: factor on the times of stages.
        give_up: asked now and then with the times so far; True ends the run.
        on_step: called with the plans of each step.
        num_others: replicas of the engine beside those of `config`, which are not simulated: each
            computes in a step what a simulated one did in one of the last steps, by chance.

    Raises:
        ConfigError: `num_blocks` cannot hold one sequence.
        RequestError: a request is too long for the engine.
    """
    others = _Others(num_others)
    return _Simulation(config, num_blocks, vocab_size, timer, load, slower, on_step, others).run(
        give_up
    )


class _Others:
    """What replicas compute that are not simulated. Replicas are alike and take requests by
    themselves, so that one does at any time what another one does at another time."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._past: deque[ReplicaStep] = deque(maxlen=_REMEMBERED)
        self._draw = random.Random("replicas")

    def beside(self, step: list[ReplicaStep]) -> list[ReplicaStep]:
        """The steps of all replicas, if the simulated ones compute `step`."""
        if not self._number:
            return step
        self._past.extend(step)
        return step + self._draw.choices(self._past, k=self._number)


class _Simulation:
    """One run; `now` is the leader's clock."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        vocab_size: int,
        timer: StepTimer,
        load: Load,
        slower: float,
        on_step: Callable[[Plans], None] | None,
        others: _Others,
    ) -> None:
        # Prompts without known tokens are all alike, which a cache must not find.
        self._shares_prefixes = config.enable_prefix_caching and load.shares_prefixes
        # Nothing says which drafts would be right.
        config = replace(config, speculative_tokens=0, enable_prefix_caching=self._shares_prefixes)
        self._replicas = Replicas(config, num_blocks, vocab_size)
        self._timer, self._load, self._slower, self._on_step = timer, load, slower, on_step
        self._vocab_size, self._others = vocab_size, others
        self._is_host = DEVICES[config.device].is_host
        self._most_in_flight = config.most_steps_in_flight
        self._free_at = [0.0] * config.layout.pp
        self._in_flight: deque[tuple[list[ReplicaStep], float]] = deque()
        self._now = 0.0
        self._num_steps = self._next = 0
        self._arrivals: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._ended: dict[str, RequestTimes] = {}

    def run(self, give_up: Callable[[list[RequestTimes]], bool] | None) -> Run:
        requests, num_checked, is_cut = self._load.requests, 0, False
        if self._load.concurrency is not None:
            for _ in range(min(self._load.concurrency, len(requests))):
                self._add(0.0)
        while True:
            self._take_arrivals()
            if not self._replicas.has_unfinished:
                if self._next == len(requests):
                    break
                self._now = requests[self._next].arrival_s
                continue
            self._step()
            if give_up and len(self._ended) >= num_checked + _CHECKED_EVERY:
                num_checked = len(self._ended)
                if give_up(list(self._ended.values())):
                    is_cut = True
                    break
        return self._result(is_cut)

    def _take_arrivals(self) -> None:
        """Queue what has arrived; an engine looks between two steps."""
        if self._load.concurrency is not None:
            return
        requests = self._load.requests
        while self._next < len(requests) and requests[self._next].arrival_s <= self._now:
            self._add(requests[self._next].arrival_s)

    def _add(self, arrival_s: float) -> None:
        number, one = self._next, self._load.requests[self._next]
        self._next += 1
        if self._shares_prefixes:
            token_ids = one.token_ids(number, self._vocab_size)
        else:
            token_ids = [1] * one.prompt_tokens
        request = Request(
            id=str(number), prompt_token_ids=token_ids, params=_params(one.output_tokens)
        )
        self._arrivals[request.id] = arrival_s
        self._replicas.add(request)

    def _step(self) -> None:
        """As `Engine.step`: keep plans in flight, and take in the results of the oldest."""
        while self._replicas.num_in_flight < self._most_in_flight:
            plans = self._replicas.schedule()
            if plans is None:
                break
            self._start(plans)
        if self._replicas.num_in_flight:
            self._finish_oldest()

    def _start(self, plans: Plans) -> None:
        if self._on_step:
            self._on_step(plans)
        self._num_steps += 1
        step = self._others.beside([IDLE if plan is None else shape(plan) for plan in plans])
        self._now += self._timer.before_s(step)
        at = self._now
        for stage, seconds in enumerate(self._timer.stages_s(step)):
            at = max(at, self._free_at[stage]) + seconds * self._slower
            self._free_at[stage] = at
        # On the host the leader's own thread computes; elsewhere it only starts the kernels.
        if self._is_host:
            self._now = self._free_at[0]
        else:
            self._now += self._timer.launch_s(step) * self._slower
        self._in_flight.append((step, at))

    def _finish_oldest(self) -> None:
        step, done_s = self._in_flight.popleft()
        results = [
            None if plan is None else StepResult([_SAMPLED] * len(plan.samples), [])
            for plan in self._replicas.oldest_in_flight
        ]
        updates = self._replicas.update(results)
        self._now = max(self._now, done_s) + self._timer.after_s(step)
        for update in updates:
            if not update.token_ids:
                continue
            name = update.sequence.id
            self._first.setdefault(name, self._now)
            if update.finish_reason is not None:
                self._end(name, update.sequence.num_output_tokens)

    def _end(self, name: str, output_tokens: int) -> None:
        arrival_s, first_s = self._arrivals.pop(name), self._first.pop(name)
        self._ended[name] = RequestTimes(arrival_s, first_s, self._now, output_tokens)
        if self._load.concurrency is not None and self._next < len(self._load.requests):
            self._add(self._now)

    def _result(self, is_cut: bool) -> Run:
        schedulers = self._replicas.schedulers
        queried = sum(one.num_prefix_queried_tokens for one in schedulers)
        hits = sum(one.num_prefix_hit_tokens for one in schedulers)
        return Run(
            [self._ended[name] for name in sorted(self._ended, key=int)],
            self._num_steps,
            sum(one.num_preemptions for one in schedulers),
            hits / queried if queried else 0.0,
            is_cut,
            sum(one.allocator.num_used for one in schedulers),
        )


def shape(plan: StepPlan) -> ReplicaStep:
    """What a plan computes, as far as its time depends on it."""
    lengths, contexts = plan.query_lens, plan.context_lens
    tokens, num_sequences = len(plan.token_ids), len(lengths)
    if tokens == num_sequences:
        return ReplicaStep(tokens, len(plan.samples), num_sequences, sum(contexts) + tokens)
    pairs = zip(lengths, contexts, strict=True)
    chunks = tuple(Chunk(new, context) for new, context in pairs if new > 1)
    single = num_sequences - len(chunks)
    cached = sum(contexts) - int(sum(chunk.context for chunk in chunks)) + single
    return ReplicaStep(tokens, len(plan.samples), single, cached, chunks)


@functools.lru_cache(maxsize=4096)
def _params(output_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
