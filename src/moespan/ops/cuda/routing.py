"""The router, and the sorting of pairs of token and expert.

Pair p = token · K + k is a token with the k-th of its chosen experts. The grouped products need the
pairs of one expert next to each other, in tiles of BLOCK_M rows. A counting sort on the device
makes this order. Its launches depend on the number of pairs alone, and it is stable, so that
results are the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Largest number of tokens for which each token reads the whole matrix of the router, as in decode.
_FEW_TOKENS = 32
# Elements of the largest table of pairs × experts that a program keeps: a single one, one of many.
_LONE_TABLE, _SHARED_TABLE = 16384, 8192


@triton.jit
def _logits_kernel(
    x,
    router,
    logits,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits of BLOCK_N experts for one token, in float32 throughout."""
    token = tl.program_id(1).to(tl.int64)
    experts = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for at in range(0, WIDTH, BLOCK_K):
        columns = at + tl.arange(0, BLOCK_K)
        mask = columns < WIDTH
        value = tl.load(x + token * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        matrix = tl.load(
            router + experts[:, None] * WIDTH + columns[None, :],
            mask=(experts < NUM_EXPERTS)[:, None] & mask[None, :],
            other=0.0,
        )
        acc += matrix * value[None, :]
    to = logits + token * NUM_EXPERTS + experts
    tl.store(to, tl.sum(acc, 1), mask=experts < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits,
    weights,
    chosen,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Softmax over all experts, and its largest values; the first of equal ones comes first."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.arange(0, EXPERTS)
    place = tl.arange(0, CHOSEN)
    is_token = tokens < num_tokens
    is_expert = (expert < NUM_EXPERTS)[None, :]
    offsets = tokens.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
    value = tl.load(logits + offsets, mask=is_token[:, None] & is_expert, other=0.0)
    value = tl.where(is_expert, value, float("-inf"))
    shares = tl.exp(value - tl.max(value, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None]
    left = tl.where(is_expert, shares, -1.0)
    best = tl.zeros([BLOCK_M, CHOSEN], tl.float32)
    which = tl.zeros([BLOCK_M, CHOSEN], tl.int32)
    for k in range(NUM_CHOSEN):
        one = tl.argmax(left, 1)
        best = tl.where((place == k)[None, :], tl.max(left, 1)[:, None], best)
        which = tl.where((place == k)[None, :], one[:, None], which)
        left = tl.where(expert[None, :] == one[:, None], -2.0, left)
    if RENORMALIZE:
        best = best / (tl.sum(best, 1)[:, None] + 1e-20)
    to = tokens.to(tl.int64)[:, None] * NUM_CHOSEN + place[None, :]
    mask = is_token[:, None] & (place < NUM_CHOSEN)[None, :]
    tl.store(weights + to, best, mask=mask)
    tl.store(chosen + to, which, mask=mask)


def route(x: Tensor, router: Tensor, num_chosen: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """[T, H] → float32 [T, K], int32 [T, K]. Two launches for few tokens, else three."""
    num_tokens, width = x.shape
    num_experts = len(router)
    weights = x.new_empty((num_tokens, num_chosen), dtype=torch.float32)
    chosen = x.new_empty((num_tokens, num_chosen), dtype=torch.int32)
    if not num_tokens:
        return weights, chosen
    if num_tokens <= _FEW_TOKENS:
        logits = x.new_empty((num_tokens, num_experts), dtype=torch.float32)
        block_n = 4
        _logits_kernel[(triton.cdiv(num_experts, block_n), num_tokens)](
            x.contiguous(),
            router,
            logits,
            WIDTH=width,
            NUM_EXPERTS=num_experts,
            BLOCK_N=block_n,
            BLOCK_K=min(512, triton.next_power_of_2(width)),
        )
    else:
        logits = F.linear(x.float(), router)
    experts = triton.next_power_of_2(num_experts)
    block_m = 4 if num_tokens <= _FEW_TOKENS else 16
    _choose_kernel[(triton.cdiv(num_tokens, block_m),)](
        logits,
        weights,
        chosen,
        num_tokens,
        NUM_EXPERTS=num_experts,
        NUM_CHOSEN=num_chosen,
        BLOCK_M=block_m,
        EXPERTS=experts,
        CHOSEN=triton.next_power_of_2(num_chosen),
        RENORMALIZE=renormalize and num_chosen > 1,
    )
    return weights, chosen


@triton.jit
def _one_hot(
    physical_ids,
    num_pairs,
    first,
    NUM_EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The pairs of this program, whether each is of this rank, and one-hot int32 [CHUNK, EXPERTS]
    of its expert."""
    pairs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    is_pair = pairs < num_pairs
    expert = tl.load(physical_ids + pairs, mask=is_pair, other=0).to(tl.int32) - first
    is_here = is_pair & (expert >= 0) & (expert < NUM_EXPERTS)
    lane = tl.arange(0, EXPERTS)
    return pairs, is_here, ((expert[:, None] == lane[None, :]) & is_here[:, None]).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _count_kernel(
    physical_ids,
    counts,
    num_pairs,
    first,
    NUM_EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The number of pairs of each expert in this chunk."""
    _, _, hot = _one_hot(physical_ids, num_pairs, first, NUM_EXPERTS, CHUNK, EXPERTS)
    tl.store(counts + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), tl.sum(hot, 0))


@triton.jit(do_not_specialize=["num_pairs", "first", "num_chunks", "num_tiles"])
def _order_kernel(
    physical_ids,
    counts,
    order,
    tiles,
    num_pairs,
    first,
    num_chunks,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
    IS_ALONE: tl.constexpr,
):
    """Writes this chunk's pairs to their sorted places, and a part of the table of tiles."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, EXPERTS)
    pairs, is_here, hot = _one_hot(physical_ids, num_pairs, first, NUM_EXPERTS, CHUNK, EXPERTS)
    if IS_ALONE:
        total = tl.sum(hot, 0)
        before = tl.zeros([EXPERTS], tl.int32)
    else:
        total = tl.zeros([EXPERTS], tl.int32)
        before = tl.zeros([EXPERTS], tl.int32)
        for at in range(0, num_chunks, 16):
            others = at + tl.arange(0, 16)
            mask = (others < num_chunks)[:, None] & (lane < EXPERTS)[None, :]
            count = tl.load(counts + others[:, None] * EXPERTS + lane[None, :], mask=mask, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where((others < chunk)[:, None], count, 0), 0)
    starts = tl.cumsum(total, 0) - total
    rank = tl.cumsum(hot, 0) - hot
    place = tl.sum(hot * (rank + (starts + before)[None, :]), 1)
    tl.store(order + place, pairs, mask=is_here)
    tile = chunk * TILES + tl.arange(0, TILES)
    tile_counts = (total + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tile_counts, 0)
    expert = tl.sum((tile[:, None] >= tile_ends[None, :]).to(tl.int32), 1)
    mine = (expert[:, None] == lane[None, :]).to(tl.int32)
    offset = (tile - tl.sum(mine * (tile_ends - tile_counts)[None, :], 1)) * BLOCK_M
    start = tl.sum(mine * starts[None, :], 1) + offset
    rows = tl.sum(mine * total[None, :], 1) - offset
    rows = tl.maximum(tl.minimum(rows, BLOCK_M), 0)
    to = tiles + 3 * tile
    is_tile = tile < num_tiles
    tl.store(to, expert, mask=is_tile)
    tl.store(to + 1, start, mask=is_tile)
    tl.store(to + 2, rows, mask=is_tile)


@dataclass(frozen=True)
class Order:
    """Pairs sorted by expert of this rank.

    Attributes:
        pairs: int32 [P]. The first ones are the pairs of this rank; the others are not set.
        tiles: int32 [tiles, 3]: expert, first place in `pairs`, rows. Their number is the most that
            these shapes could need; unneeded tiles have 0 rows.
        block_m: most rows of a tile.
    """

    pairs: Tensor
    tiles: Tensor
    block_m: int


def most_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Most tiles that `num_pairs` pairs can need: each expert may have one that is not full."""
    return num_pairs // block_m + min(num_experts, num_pairs)


def sort_pairs(physical_ids: Tensor, first: int, num_experts: int, block_m: int) -> Order:
    """Sort the pairs of `physical_ids`, integers [T, K], whose experts this rank holds.

    It holds `num_experts` experts from `first` on. One launch for few pairs, else two.
    """
    num_pairs = physical_ids.numel()
    experts = triton.next_power_of_2(num_experts)
    chunk = max(16, triton.next_power_of_2(num_pairs))
    if chunk * experts > _LONE_TABLE:
        chunk = max(16, _SHARED_TABLE // experts)
    num_chunks = triton.cdiv(num_pairs, chunk)
    num_tiles = most_tiles(num_pairs, num_experts, block_m)
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=physical_ids.device)
    tiles = torch.empty((num_tiles, 3), dtype=torch.int32, device=physical_ids.device)
    counts = torch.empty((num_chunks, experts), dtype=torch.int32, device=physical_ids.device)
    shape = {"NUM_EXPERTS": num_experts, "CHUNK": chunk, "EXPERTS": experts, "num_warps": 8}
    physical_ids = physical_ids.contiguous()
    if num_chunks > 1:
        _count_kernel[(num_chunks,)](physical_ids, counts, num_pairs, first, **shape)
    _order_kernel[(num_chunks,)](
        physical_ids,
        counts,
        pairs,
        tiles,
        num_pairs,
        first,
        num_chunks,
        num_tiles,
        BLOCK_M=block_m,
        TILES=triton.next_power_of_2(triton.cdiv(num_tiles, num_chunks)),
        IS_ALONE=num_chunks == 1,
        **shape,
    )
    return Order(pairs, tiles, block_m)
