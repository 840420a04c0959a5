"""The memory that a model takes under a layout, counted before anything is loaded.

The placement table and the model's geometry give all sizes. Nothing is read but the model's config,
and no torch is imported.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import cache_bytes_per_token, count_parameters, place
from moespan.config import DTYPE_BYTES, QUANTIZATIONS, EngineConfig, Layout, ModelConfig
from moespan.device import DEVICES
from moespan.errors import ConfigError
from moespan.parallel.buffers import hccl_bytes

_CACHE_DTYPES = (*DTYPE_BYTES, "int8")


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model, alone and cut by a layout.

    Attributes:
        parameters: parameters of the model.
        active_parameters: parameters that one token uses.
        bytes: dtype or quantization → bytes of all weights on one rank. Quantizations that the
            model cannot run with are left out: a quantised checkpoint runs with some only, and rows
            must be whole groups.
        kv_bytes_per_token: dtype of the KV cache → bytes of one token, all layers and heads.
        dtype: dtype of weights and activations in the engine.
        quantization: the scheme that the weights run in; None if they are floats.
        kv_cache_dtype: dtype of the KV cache.
        layout: axis → its degree.
        pipeline_layers: number of layers of each stage.
        weight_bytes_per_rank: each rank's bytes of weights, padding and scales included.
        kv_bytes_per_token_per_rank: each rank's bytes of KV cache for a token of its replica.
    """

    parameters: int
    active_parameters: int
    bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    layout: dict[str, int]
    pipeline_layers: list[int]
    weight_bytes_per_rank: list[int]
    kv_bytes_per_token_per_rank: list[int]


def footprint(config: EngineConfig, model: ModelConfig) -> Footprint:
    """The sizes of `model` with the layout, dtypes, quantization and placement of `config`.

    Raises:
        ConfigError: the quantization or the expert placement does not fit the model.
        LayoutError: tp would cut through a group of the quantization.
    """
    layout, stored = config.layout, model.quantization
    total, active = count_parameters(model)
    weights, cache = _bytes_per_rank(config, model)
    return Footprint(
        parameters=total,
        active_parameters=active,
        bytes={
            **{dtype: total * size for dtype, size in DTYPE_BYTES.items()},
            **_quantized_bytes(model, config.dtype),
        },
        kv_bytes_per_token={dtype: model.kv_bytes_per_token(dtype) for dtype in _CACHE_DTYPES},
        dtype=config.dtype,
        quantization=stored.running_as(config.quantization) if stored else config.quantization,
        kv_cache_dtype=config.cache_dtype,
        layout=layout.sizes,
        pipeline_layers=[len(stage) for stage in layout.stages(model)],
        weight_bytes_per_rank=weights,
        kv_bytes_per_token_per_rank=cache,
    )


@dataclass(frozen=True)
class Fit:
    """Memory of the rank with the least memory left.

    Attributes:
        weight_bytes, hccl_bytes, cache_bytes_per_token: bytes that the rank takes.
        room_bytes: bytes that the rank finds free; None if that is not known.
        cache_tokens: tokens of KV cache that remain; meaningless without `room_bytes`.
        sequence_tokens: tokens of the longest sequence.
    """

    weight_bytes: int
    hccl_bytes: int
    cache_bytes_per_token: int
    room_bytes: int | None
    cache_tokens: int
    sequence_tokens: int


def fit(config: EngineConfig, model: ModelConfig, room_bytes: int | None) -> Fit:
    """Memory of the rank with the least memory left, if each rank finds `room_bytes` free.

    Raises:
        ConfigError, LayoutError: as `footprint`.
    """
    device = DEVICES[config.device]
    buffers = hccl_bytes(config, model) if device.has_group_buffers else 0
    fits = []
    for weights, token in zip(*_bytes_per_rank(config, model), strict=True):
        left = ((room_bytes or 0) - weights - buffers) * device.cache_share
        tokens = int(left // token)
        fits.append(Fit(weights, buffers, token, room_bytes, tokens, config.max_model_len))
    return min(fits, key=lambda one: one.cache_tokens)


def _bytes_per_rank(config: EngineConfig, model: ModelConfig) -> tuple[list[int], list[int]]:
    """Bytes of weights, and of KV cache for one token, on each rank."""
    layout, dtype = config.layout, config.dtype
    experts = ExpertPlacement.make(config.expert_placement, model, layout)
    ranks = range(layout.world_size)
    weights = [
        place(model, layout, rank, experts, config.quantization).num_bytes(dtype) for rank in ranks
    ]
    cache = [cache_bytes_per_token(model, layout, rank, config.cache_dtype) for rank in ranks]
    return weights, cache


def _quantized_bytes(model: ModelConfig, dtype: str) -> dict[str, int]:
    """Quantization that the model can run with → bytes of all weights."""
    stored = model.quantization
    found = {}
    for name in stored.same_weights if stored else QUANTIZATIONS:
        with contextlib.suppress(ConfigError):  # rows need not be whole groups
            found[name] = place(model, Layout(), 0, quantization=name).num_bytes(dtype)
    return found
