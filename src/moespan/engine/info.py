"""Facts and figures of an engine. Plain values; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from moespan.config import Layout

if TYPE_CHECKING:
    from moespan.engine.scheduler import Scheduler


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a started engine.

    Attributes:
        quantization: scheme of the quantized matrices; None if there are none.
        cache_dtype: dtype of the KV cache.
        num_blocks, block_size: blocks of the KV cache and tokens in each.
        load_s: seconds of loading the weights, on the slowest rank.
        read_bytes, weight_bytes: bytes that the leader read, and bytes of its weights.
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
    binding: list[str] = []


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State of the engine: queues, cache use within 0..1, and counts since the start."""

    num_waiting: int
    num_running: int
    kv_usage: float
    num_preemptions: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int

    @classmethod
    def of(cls, schedulers: Sequence[Scheduler]) -> EngineStats:
        """The state of all replicas together."""
        return cls(
            num_waiting=sum(s.num_waiting for s in schedulers),
            num_running=sum(s.num_running for s in schedulers),
            kv_usage=sum(s.kv_usage for s in schedulers) / len(schedulers),
            num_preemptions=sum(s.num_preemptions for s in schedulers),
            num_prefix_queried_tokens=sum(s.num_prefix_queried_tokens for s in schedulers),
            num_prefix_hit_tokens=sum(s.num_prefix_hit_tokens for s in schedulers),
        )
