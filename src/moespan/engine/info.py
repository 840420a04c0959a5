"""What an engine says of itself. Plain values; imports no torch."""

from __future__ import annotations

import msgspec

from moespan.config import Layout


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a started engine.

    Attributes:
        quantization: scheme of the matrices that are of few bits; None if none is.
        cache_dtype: of the KV cache.
        num_blocks, block_size: blocks of the KV cache and tokens in each.
        load_s: seconds that reading the weights took on the slowest rank.
        read_bytes, weight_bytes: bytes that the leader read, and that its weights take.
        binding: cores and memory of the ranks in words; empty where they are left alone.
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
    """How the engine is doing: queues, cache use within 0..1, and counts since the start."""

    num_waiting: int
    num_running: int
    kv_usage: float
    num_preemptions: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
