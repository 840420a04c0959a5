"""Kernels on single tokens: norms, swiglu, rotary embedding, cache writes, rounding to 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moespan.checkpoint.rounding import MOST
from moespan.ops.base import KVCache, Rotation

# Elements of a row that one program of an elementwise kernel handles.
_BLOCK = 1024
# Heads that one program rotates: so few that a single token occupies several multiprocessors.
_HEADS = 8
# Adding and then subtracting this rounds a float32 below 2^22 to an integer, half to even.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _norm_kernel(
    x,
    residual,
    weight,
    normed,
    total,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    """One row, computed in float32 and rounded to the activations' dtype before scaling."""
    start = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    value = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(residual + start + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + start + columns, rounded, mask=mask)
        value = rounded.to(tl.float32)
    mean = tl.sum(value * value, 0) / WIDTH
    scaled = (value * tl.rsqrt(mean + eps)).to(normed.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + start + columns, scaled.to(normed.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H] → [T, H]. One launch."""
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), both [T, H]. One launch."""
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if x.numel():
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        _norm_kernel[(len(x),)](
            x,
            None if residual is None else residual.contiguous(),
            weight,
            normed,
            total,
            eps,
            WIDTH=width,
            BLOCK=block,
            ADDS=residual is not None,
            num_warps=max(1, min(8, block // 256)),
        )
    return normed, total


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) · up from float32, in `dtype`; rounds at the same points as the reference."""
    gate = gate.to(dtype).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (gate * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _swiglu_kernel(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    value = gated(gate, up, out.dtype.element_ty)
    tl.store(out + row * WIDTH + columns, value, mask=mask)


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) · second half: [T, 2·I] → [T, I]. One launch."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_rows, width)
    if out.numel():
        _swiglu_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            x.contiguous(), out, WIDTH=width, BLOCK=min(_BLOCK, triton.next_power_of_2(width))
        )
    return out


@triton.jit
def _magnitude(x):
    """|x|, and infinity for NaN, which a maximum would ignore."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _quotients(x, scale):
    """x / scale; x itself where scale is zero, infinite or NaN."""
    return x / tl.where((scale > 0) & (scale < float("inf")), scale, 1.0)


@triton.jit
def _integers(x, scale):
    """x / scale, rounded half to even. Quotients beyond ±127 become 0: those of rows whose scale is
    not finite, where the scale carries the error, and of rows that were never written."""
    rounded = (_quotients(x, scale) + _ROUNDER) - _ROUNDER
    return tl.where(tl.abs(rounded) <= 127, rounded, 0.0)


@triton.jit
def _store_heads(
    first,
    second,
    cache,
    scales,
    slot,
    heads,
    mask,
    NUM_KV_HEADS: tl.constexpr,
    HALF_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Stores heads of one token at its slot; the halves of the heads are float32 [heads, HALF]."""
    at = tl.arange(0, HALF)
    place = slot * NUM_KV_HEADS + heads
    to = cache + place[:, None] * (2 * HALF_SIZE) + at[None, :]
    inside = mask[:, None] & (at < HALF_SIZE)[None, :]
    if IS_INT8:
        most = tl.maximum(_magnitude(first), _magnitude(second))
        scale = tl.max(most, 1) / 127.0
        tl.store(scales + place, scale, mask=mask)
        first = _integers(first, scale[:, None])
        second = _integers(second, scale[:, None])
    tl.store(to, first.to(cache.dtype.element_ty), mask=inside)
    tl.store(to + HALF_SIZE, second.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _rope_kernel(
    qkv,
    cos,
    sin,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TO_CACHE: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """HEADS heads of one token, rotated in place; with TO_CACHE, k and v go to the cache."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    in_half = at < HALF_SIZE
    total: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    whole = qkv + (token * total + heads)[:, None] * (2 * HALF_SIZE) + at[None, :]
    mask = (heads < total)[:, None] & in_half[None, :]
    first = tl.load(whole, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(whole + HALF_SIZE, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF_SIZE + at, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin + token * HALF_SIZE + at, mask=in_half, other=0.0)[None, :]
    is_rotated = heads < NUM_HEADS + NUM_KV_HEADS
    rotated_first = tl.where(is_rotated[:, None], first * c - second * s, first)
    rotated_second = tl.where(is_rotated[:, None], second * c + first * s, second)
    # Rounded first to the activations' dtype, as if stored, and only then to int8.
    rotated_first = rotated_first.to(qkv.dtype.element_ty)
    rotated_second = rotated_second.to(qkv.dtype.element_ty)
    in_place = heads < NUM_HEADS if TO_CACHE else is_rotated
    tl.store(whole, rotated_first, mask=mask & in_place[:, None])
    tl.store(whole + HALF_SIZE, rotated_second, mask=mask & in_place[:, None])
    if TO_CACHE:
        slot = tl.load(slots + token).to(tl.int64)
        first = rotated_first.to(tl.float32)
        second = rotated_second.to(tl.float32)
        _store_heads(
            first, second, keys, key_scales, slot, heads - NUM_HEADS,
            (heads >= NUM_HEADS) & is_rotated, NUM_KV_HEADS, HALF_SIZE, HALF, IS_INT8,
        )  # fmt: skip
        _store_heads(
            first, second, values, value_scales, slot, heads - NUM_HEADS - NUM_KV_HEADS,
            (heads < total) & ~is_rotated, NUM_KV_HEADS, HALF_SIZE, HALF, IS_INT8,
        )  # fmt: skip


def rope(
    qkv: Tensor,
    rotation: Rotation,
    cache: KVCache | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, N + 2·KV, D] → q [T, N, D], k and v [T, KV, D], as views of qkv. One launch.

    With a cache, rotated keys and values are stored at `slots` there, and k and v stay unrotated.
    """
    qkv = qkv.contiguous()
    num_heads, num_kv_heads = rotation.num_heads, rotation.num_kv_heads
    if qkv.numel():
        half_size = qkv.shape[-1] // 2
        _rope_kernel[(len(qkv), triton.cdiv(qkv.shape[1], _HEADS))](
            qkv,
            rotation.cos.contiguous(),
            rotation.sin.contiguous(),
            None if cache is None else cache.keys,
            None if cache is None else cache.values,
            None if cache is None else cache.key_scales,
            None if cache is None else cache.value_scales,
            slots,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF_SIZE=half_size,
            HEADS=_HEADS,
            HALF=triton.next_power_of_2(half_size),
            TO_CACHE=cache is not None,
            IS_INT8=cache is not None and cache.key_scales is not None,
            num_warps=2,
        )
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
    return q, k, v


@triton.jit
def _write_cache_kernel(
    k,
    v,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    k_stride,
    v_stride,
    NUM_KV_HEADS: tl.constexpr,
    HALF_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slots + token).to(tl.int64)
    at = tl.arange(0, HALF)
    is_head = heads < NUM_KV_HEADS
    mask = is_head[:, None] & (at < HALF_SIZE)[None, :]
    within = heads[:, None] * (2 * HALF_SIZE) + at[None, :]
    first = tl.load(k + token * k_stride + within, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(k + token * k_stride + within + HALF_SIZE, mask=mask, other=0.0)
    _store_heads(
        first, second.to(tl.float32), keys, key_scales, slot, heads, is_head,
        NUM_KV_HEADS, HALF_SIZE, HALF, IS_INT8,
    )  # fmt: skip
    first = tl.load(v + token * v_stride + within, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(v + token * v_stride + within + HALF_SIZE, mask=mask, other=0.0)
    _store_heads(
        first, second.to(tl.float32), values, value_scales, slot, heads, is_head,
        NUM_KV_HEADS, HALF_SIZE, HALF, IS_INT8,
    )  # fmt: skip


def write_cache(k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
    """Store k, v [T, KV, D] at `slots`; their tokens need not be contiguous. One launch."""
    if not k.numel():
        return
    num_tokens, num_kv_heads, head_size = k.shape
    inner = (head_size, 1)
    k, v = (part if part.stride()[1:] == inner else part.contiguous() for part in (k, v))
    _write_cache_kernel[(num_tokens, triton.cdiv(num_kv_heads, _HEADS))](
        k,
        v,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        slots,
        k.stride(0),
        v.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HALF_SIZE=head_size // 2,
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(head_size // 2),
        IS_INT8=cache.key_scales is not None,
        num_warps=2,
    )


@triton.jit
def _quantize_kernel(
    x, values, scales, MOST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], tl.float32)
    for at in range(0, WIDTH, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        value = tl.load(x + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
        most = tl.maximum(most, _magnitude(value.to(tl.float32)))
    scale = tl.max(most, 0) / MOST
    tl.store(scales + row, scale)
    for at in range(0, WIDTH, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        mask = columns < WIDTH
        value = tl.load(x + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        if values.dtype.element_ty == tl.int8:
            value = _integers(value, scale)
        else:
            value = tl.clamp(_quotients(value, scale), -MOST, MOST)
        tl.store(values + row * WIDTH + columns, value.to(values.dtype.element_ty), mask=mask)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`round_rows`: [R, W] → `dtype` (int8 or float8_e4m3fn) [R, W] and float32 [R]. One launch."""
    values = torch.empty_like(x, dtype=dtype)
    scales = x.new_empty(len(x), dtype=torch.float32)
    if x.numel():
        width = x.shape[1]
        _quantize_kernel[(len(x),)](
            x,
            values,
            scales,
            MOST=float(MOST[dtype]),
            WIDTH=width,
            BLOCK=min(2048, triton.next_power_of_2(width)),
        )
    return values, scales
