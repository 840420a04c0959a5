"""A candidate's latencies and throughput by mean values, without a simulation.

A decoding sequence takes part in every step of its replica, and for each output token
`prompt / output` tokens of prompts are computed beside it. The number of sequences follows from
Little's law: sequences = rate × output tokens × step. Queues and chance are left out, so this only
chooses what to simulate. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moespan.config import EngineConfig
from moespan.device import DEVICES
from moespan.planner.cost import ReplicaStep, StepCost, rounded
from moespan.planner.outcome import Target
from moespan.planner.work import Chunk

# Ratios of percentiles to means in simulated runs below 80 % of the capacity, rounded.
_TTFT_OVER_MEAN = {"mean": 1.0, "p50": 0.9, "p90": 1.8, "p95": 2.2, "p99": 3.0}
_TPOT_OVER_MEAN = {"mean": 1.0, "p50": 1.0, "p90": 1.15, "p95": 1.2, "p99": 1.35}

_ITERATIONS, _CLOSE = 40, 0.01


class Demand(NamedTuple):
    """The load of one engine in means.

    Attributes:
        prompt_tokens, output_tokens: of a request.
        rate: requests per second; None if `concurrency` holds.
        concurrency: requests at any time; None with `rate`, or for as many as possible.
    """

    prompt_tokens: float
    output_tokens: float
    rate: float | None = None
    concurrency: int | None = None


class Estimate(NamedTuple):
    """Means of one engine.

    Attributes:
        ttft_s, tpot_s: infinite if the engine cannot keep up.
        tokens_per_s: output.
        sequences: that decode in a replica at a time.
    """

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    sequences: float

    def statistic_s(self, target: Target) -> float:
        """A rough value of a target's statistic."""
        if target.latency == "ttft":
            return self.ttft_s * _TTFT_OVER_MEAN[target.statistic]
        return self.tpot_s * _TPOT_OVER_MEAN[target.statistic]

    def excess(self, targets: Sequence[Target]) -> float:
        """The largest ratio of a value to its target, minus 1; -1 without targets."""
        return max((self.statistic_s(one) / one.seconds - 1 for one in targets), default=-1.0)


Periods = dict[tuple[int, int, "Chunk | None", int], float]
"""Steps that were computed: sequences, their tokens, chunk, busy replicas → seconds."""


class Screen:
    """Mean values of one engine with so many blocks of KV cache.

    Args:
        periods: steps of `cost` that were computed before; engines that differ in limits only may
            share them.
    """

    def __init__(
        self,
        cost: StepCost,
        config: EngineConfig,
        num_blocks: int,
        periods: Periods | None = None,
    ) -> None:
        self._cost, self._config, self._num_blocks = cost, config, num_blocks
        self._periods: Periods = {} if periods is None else periods
        self._is_ahead = config.plans_ahead
        self._is_host = DEVICES[config.device].is_host

    def estimate(self, demand: Demand) -> Estimate:
        """The engine under `demand`."""
        most = self.most_sequences(demand)
        replicas = self._config.layout.dp
        if demand.rate is None:
            wanted = math.inf if demand.concurrency is None else demand.concurrency / replicas
            return self._closed(demand, min(wanted, most), wanted)
        tokens_per_s = demand.rate * demand.output_tokens / replicas
        sequences = 1.0
        for _ in range(_ITERATIONS):
            step_s, _ = self._steps(demand, sequences)
            wanted = tokens_per_s * step_s
            if wanted > most and sequences >= most:
                at_most = self._closed(demand, most, math.inf)
                return at_most._replace(ttft_s=math.inf)
            if abs(wanted - sequences) < _CLOSE * sequences:
                break
            sequences = min(wanted, most)
        found = self._closed(demand, max(sequences, 1e-6), sequences)
        return found._replace(tokens_per_s=demand.rate * demand.output_tokens)

    def capacity(self, demand: Demand, targets: Sequence[Target]) -> Estimate:
        """The engine with as many sequences as the targets allow; with the fewest if they allow
        none."""
        best = None
        for found in self.sweep(demand):
            if found.excess(targets) > 0:
                continue
            if best is not None and found.tokens_per_s <= best.tokens_per_s:
                break  # fewer sequences give less
            best = found
        return best or found

    def sweep(self, demand: Demand) -> Iterator[Estimate]:
        """The engine with ever fewer sequences, from as many as it takes."""
        most = self.most_sequences(demand)
        tries = [2.0**power for power in range(15) if 2.0**power < most]
        for sequences in [most, *reversed(tries)]:
            yield self._closed(demand, sequences, sequences)

    def most_sequences(self, demand: Demand) -> float:
        """Most sequences that decode in a replica at a time: by its limits, by the blocks that they
        hold on average, and by the prompts that must be computed beside them."""
        config = self._config
        held = demand.prompt_tokens + 0.6 * demand.output_tokens + config.block_size / 2
        by_blocks = self._num_blocks * config.block_size / held
        beside = 1 + demand.prompt_tokens / demand.output_tokens
        by_tokens = config.max_num_batched_tokens / beside
        per_plan = min(float(config.max_num_seqs), by_tokens)
        return max(min(per_plan * config.layout.pp, by_blocks), 0.5)

    def _closed(self, demand: Demand, sequences: float, wanted: float) -> Estimate:
        """With so many sequences decoding in each replica, of `wanted` ones."""
        step_s, prefill_s = self._steps(demand, sequences)
        tokens_per_s = sequences / step_s
        chunks = self._chunks_per_prompt(demand, sequences)
        # Consecutive chunks of a prompt follow each other through the stages.
        passes = 1 + (chunks - 1) / self._config.layout.pp
        ttft = (0.5 + self._is_ahead) * step_s + passes * prefill_s
        if math.isfinite(wanted) and wanted > sequences:
            ttft += (wanted - sequences) * demand.output_tokens / tokens_per_s
        elif wanted > sequences:
            ttft = math.inf
        replicas = self._config.layout.dp
        return Estimate(ttft, step_s, tokens_per_s * replicas, sequences)

    def _chunks_per_prompt(self, demand: Demand, sequences: float) -> float:
        per_plan = sequences / self._config.layout.pp
        room = max(self._config.max_num_batched_tokens - per_plan, 1.0)
        return max(1.0, demand.prompt_tokens / room)

    def _steps(self, demand: Demand, sequences: float) -> tuple[float, float]:
        """Mean time between two tokens of a sequence, and that of a step with a prompt in it."""
        config = self._config
        per_plan = max(sequences / config.layout.pp, 1e-6)
        context = demand.prompt_tokens + demand.output_tokens / 2
        number = rounded(max(round(per_plan), 1))
        decode_s = self._period(number, context)
        room = max(config.max_num_batched_tokens - number, 1)
        tokens = per_plan * demand.prompt_tokens / demand.output_tokens
        size = min(max(demand.prompt_tokens, tokens), room)
        chunk = Chunk(max(round(size), 1), max(demand.prompt_tokens - size, 0.0) / 2)
        # A step waits for a prompt in any replica. Not all replicas compute one then.
        share = min(tokens / size, 1.0)
        any_share = 1 - (1 - share) ** config.layout.dp
        busy = max(round(share * config.layout.dp / max(any_share, 1e-9)), 1)
        mixed_s = self._period(number, context, chunk, busy)
        return (1 - any_share) * decode_s + any_share * mixed_s, mixed_s

    def _period(
        self, number: int, context: float, chunk: Chunk | None = None, busy: int = 0
    ) -> float:
        """Seconds between two plans of the same sequences, if `busy` replicas compute a prompt."""
        key = number, int(number * context), chunk, busy
        if key not in self._periods:
            self._periods[key] = self._computed_period(*key)
        return self._periods[key]

    def _computed_period(self, number: int, cached: int, chunk: Chunk | None, busy: int) -> float:
        cost, layout = self._cost, self._config.layout
        step = [ReplicaStep(number, number, number, cached)] * layout.dp
        if chunk is not None:
            one = ReplicaStep(number + chunk.new, number + 1, number, cached, (chunk,))
            step = [one] * busy + step[busy:]
        stages = cost.stages_s(step)
        before, after_s = cost.before_s(step), cost.after_s(step)
        leader = before + after_s + (0.0 if self._is_host else cost.launch_s(step))
        if layout.pp > 1:
            return max(sum(stages) + before + after_s, layout.pp * max(*stages, leader))
        return max(stages[0], leader) if self._is_ahead else stages[0] + leader
