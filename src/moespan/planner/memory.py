"""What a layout takes of each device's memory, before anything is loaded. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import cache_bytes_per_token, place
from moespan.config import EngineConfig, ModelConfig
from moespan.engine.info import CACHE_SHARE
from moespan.parallel.buffers import hccl_bytes


@dataclass(frozen=True)
class Fit:
    """The fullest rank.

    Attributes:
        weight_bytes, hccl_bytes, cache_bytes_per_token: what it takes.
        room_bytes: what it finds free; None if that is not known.
        cache_tokens: tokens of KV cache that remain; meaningless without `room_bytes`.
        sequence_tokens: the longest sequence.
    """

    weight_bytes: int
    hccl_bytes: int
    cache_bytes_per_token: int
    room_bytes: int | None
    cache_tokens: int
    sequence_tokens: int


def fit(config: EngineConfig, model: ModelConfig, room_bytes: int | None) -> Fit:
    """What the rank with the least room left has room for."""
    layout = config.layout
    placement = ExpertPlacement.make(config.expert_placement, model, layout)
    buffers = hccl_bytes(config, model) if config.device == "npu" else 0
    fits = []
    for rank in range(layout.world_size):
        held = place(model, layout, rank, placement, config.quantization)
        weights = held.num_bytes(config.dtype)
        token = cache_bytes_per_token(model, layout, rank, config.cache_dtype)
        left = ((room_bytes or 0) - weights - buffers) * CACHE_SHARE[config.device]
        tokens = int(left // token)
        fits.append(Fit(weights, buffers, token, room_bytes, tokens, config.max_model_len))
    return min(fits, key=lambda one: one.cache_tokens)
