"""Facts and figures of an engine. Plain values; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from moespan.config import Layout
from moespan.planner.memory import RankMemory

if TYPE_CHECKING:
    from moespan.engine.scheduler import Scheduler


PULSE_S = 1.0
"""Seconds after which an engine tells its pulse again, even if nothing happens."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a started engine.

    Attributes:
        quantization: scheme of the quantized matrices; None if there are none.
        cache_dtype: dtype of the KV cache.
        num_blocks, block_size: blocks of the KV cache and tokens in each.
        load_s: seconds of loading the weights, on the slowest rank.
        read_bytes, weight_bytes: bytes that the leader read, and bytes of its weights.
        memory: what each rank takes, in the order of ranks, before the first step (`LLM.memory`
            tells it later).
        binding: cores and memory of the ranks, as lines of text; empty if they are not bound.
    """

    model: str
    layout: Layout
    device: str
    dtype: str
    quantization: str | None = None
    cache_dtype: str
    max_model_len: int
    num_blocks: int
    block_size: int
    load_s: float
    read_bytes: int
    weight_bytes: int
    memory: list[RankMemory] = []
    binding: list[str] = []


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """State of an engine or of one replica: queues, cache use, and counts since the start.

    Attributes:
        num_waiting, num_running: sequences without blocks, and with blocks.
        kv_usage: share of the blocks that live sequences use, within 0..1.
        num_free_blocks: blocks that nobody uses; some of them hold prefixes for reuse.
        num_drafts, num_draft_tokens, num_accepted_tokens: how often a sequence had drafts in a
            step, how many, and how many of them were right. Each right one saved its sequence a
            step.
    """

    num_waiting: int
    num_running: int
    kv_usage: float
    num_free_blocks: int
    num_preemptions: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @classmethod
    def of(cls, scheduler: Scheduler) -> EngineStats:
        """The state of one replica."""
        return cls(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            kv_usage=scheduler.kv_usage,
            num_free_blocks=scheduler.allocator.num_free,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queried_tokens=scheduler.num_prefix_queried_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_drafts=scheduler.draft_counts.num_drafts,
            num_draft_tokens=scheduler.draft_counts.num_tokens,
            num_accepted_tokens=scheduler.draft_counts.num_accepted,
        )

    @classmethod
    def total(cls, replicas: Sequence[EngineStats]) -> EngineStats:
        """The state of all replicas together, which have equally many blocks."""
        sums = {name: sum(getattr(one, name) for one in replicas) for name in cls.__struct_fields__}
        return cls(**{**sums, "kv_usage": sums["kv_usage"] / len(replicas)})


class StepFigures(msgspec.Struct, frozen=True, array_like=True):
    """One step that has ended.

    Attributes:
        kind: `decode` if each sequence had one token, otherwise `prefill`.
        num_tokens: tokens computed, of all replicas.
        seconds: from the start of the step, or the end of the previous one if that was later, to
            its result. So the seconds of all steps add up to the time in which the engine worked.
    """

    kind: str
    num_tokens: int
    seconds: float


class Pulse(msgspec.Struct, frozen=True, array_like=True):
    """The state of an engine, as the leader tells it unasked.

    Attributes:
        replicas: the state of each replica.
        num_steps: steps that have ended since the start.
        steps: those of them that ended since the previous pulse.
    """

    replicas: list[EngineStats]
    num_steps: int
    steps: list[StepFigures]

    @property
    def stats(self) -> EngineStats:
        """The state of all replicas together."""
        return EngineStats.total(self.replicas)
