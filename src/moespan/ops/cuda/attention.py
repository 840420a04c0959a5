"""Attention over the paged cache: one kernel for decodes, one for prompts.

Both use the online softmax of FlashAttention (arXiv 2205.14135), in float32, over keys that a block
table addresses. In decode the keys of one sequence are split over several programs, whose results a
second launch joins (Flash-Decoding). The number of splits follows from shapes alone.

Why own kernels: FlashAttention 2, which torch's `varlen_attn` calls, takes pages of 256 tokens or
more, too coarse for a prefix cache. FlashAttention 3 is another package. FlashInfer plans on the
host before every step, even if the step is a recorded graph. None of them takes float32, which the
tests need, an int8 cache with a scale for each token and head, or head sizes such as 80 and 16.
The loss is small: in a prompt of 2048 tokens, attention has one in twenty of the 16B model's
operations.
"""

from __future__ import annotations

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from moespan.memory import to_device
from moespan.ops.base import AttentionBatch, KVCache
from moespan.ops.cuda.tiles import processors

_LOG2_E = 1.4426950408889634
# Fewest keys for a program of their own, and most splits of one sequence.
_LEAST_SPLIT_KEYS = 128
_MOST_SPLITS = 32
_PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _attend(
    q,
    acc,
    highest,
    total,
    start,
    stop,
    positions,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    kv_head,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add keys `start` to `stop` to the running softmax of queries [M, HEAD] at `positions`."""
    element = tl.arange(0, HEAD)
    in_head = element < HEAD_SIZE
    for at in range(start, stop, BLOCK_N):
        place = at + tl.arange(0, BLOCK_N)
        there = place < stop
        block = tl.load(table + place // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        row = (block * BLOCK_SIZE + place % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        offsets = row[:, None] * HEAD_SIZE + element[None, :]
        # Memory past the end of a sequence may hold NaN, so it is not read.
        mask = there[:, None] & in_head[None, :]
        k = tl.load(keys + offsets, mask=mask, other=0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if IS_INT8:
            scores *= tl.load(key_scales + row, mask=there, other=0.0)[None, :]
        visible = there[None, :]
        if IS_MASKED:
            visible = visible & (place[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        share = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(share, 1)
        v = tl.load(values + offsets, mask=mask, other=0).to(q.dtype)
        if IS_INT8:
            share *= tl.load(value_scales + row, mask=there, other=0.0)[None, :]
        acc = acc * shrink[:, None]
        acc = tl.dot(share.to(q.dtype), v, acc, input_precision=PRECISION)
        highest = new_highest
    return acc, highest, total


@triton.jit
def _decode_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    lengths,
    rows,
    sequences,
    out,
    parts,
    part_sums,
    scale,
    q_stride,
    table_stride,
    NUM_SPLITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The query heads that share a key head, for one sequence and one split of its keys."""
    number = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    query_row = tl.load(rows + number).to(tl.int64) if IS_MIXED else number.to(tl.int64)
    sequence = tl.load(sequences + number).to(tl.int64) if IS_MIXED else number.to(tl.int64)
    length = tl.load(lengths + sequence)
    share_keys = tl.cdiv(tl.cdiv(length, NUM_SPLITS), BLOCK_N) * BLOCK_N
    start = split * share_keys
    stop = tl.minimum(start + share_keys, length)
    member = tl.arange(0, GROUP)
    element = tl.arange(0, HEAD)
    heads = kv_head * GROUP_SIZE + member
    mask = (member < GROUP_SIZE)[:, None] & (element < HEAD_SIZE)[None, :]
    within = heads[:, None] * HEAD_SIZE + element[None, :]
    queries = tl.load(q + query_row * q_stride + within, mask=mask, other=0.0)
    acc = tl.zeros([GROUP, HEAD], tl.float32)
    highest = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc, highest, total = _attend(
        queries, acc, highest, total, start, stop, member, keys, values, key_scales, value_scales,
        tables + sequence * table_stride, kv_head, scale, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, HEAD,
        BLOCK_N, IS_INT8, False, PRECISION,
    )  # fmt: skip
    num_heads: tl.constexpr = GROUP_SIZE * NUM_KV_HEADS
    if NUM_SPLITS == 1:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + query_row * num_heads * HEAD_SIZE + within, result, mask=mask)
    else:
        place = (number * num_heads + heads) * NUM_SPLITS + split
        is_member = member < GROUP_SIZE
        tl.store(part_sums + 2 * place, highest, mask=is_member)
        tl.store(part_sums + 2 * place + 1, total, mask=is_member)
        tl.store(parts + place[:, None] * HEAD_SIZE + element[None, :], acc, mask=mask)


@triton.jit
def _join_kernel(
    parts,
    part_sums,
    rows,
    out,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """Joins the splits of one head of one sequence. Splits without a key have a sum of zero."""
    number = tl.program_id(0)
    head = tl.program_id(1)
    query_row = tl.load(rows + number).to(tl.int64) if IS_MIXED else number.to(tl.int64)
    split = tl.arange(0, SPLITS)
    element = tl.arange(0, HEAD)
    is_split = split < NUM_SPLITS
    place = (number * NUM_HEADS + head) * NUM_SPLITS + split
    highest = tl.load(part_sums + 2 * place, mask=is_split, other=float("-inf"))
    total = tl.load(part_sums + 2 * place + 1, mask=is_split, other=0.0)
    shrink = tl.exp2(highest - tl.max(highest, 0))
    mask = is_split[:, None] & (element < HEAD_SIZE)[None, :]
    acc = tl.load(parts + place[:, None] * HEAD_SIZE + element[None, :], mask=mask, other=0.0)
    result = tl.sum(acc * shrink[:, None], 0) / tl.sum(total * shrink, 0)
    to = out + (query_row * NUM_HEADS + head) * HEAD_SIZE + element
    tl.store(to, result.to(out.dtype.element_ty), mask=element < HEAD_SIZE)


@triton.jit
def _prompt_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    tiles,
    out,
    scale,
    q_stride,
    table_stride,
    GROUP_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_INT8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head of up to BLOCK_M consecutive tokens of one sequence."""
    tile = tiles + 4 * tl.program_id(1)
    head = tl.program_id(0)
    first_row = tl.load(tile).to(tl.int64)
    num_rows = tl.load(tile + 1)
    first_position = tl.load(tile + 2)
    sequence = tl.load(tile + 3).to(tl.int64)
    member = tl.arange(0, BLOCK_M)
    element = tl.arange(0, HEAD)
    mask = (member < num_rows)[:, None] & (element < HEAD_SIZE)[None, :]
    rows = first_row + member
    within = head * HEAD_SIZE + element
    queries = tl.load(q + rows[:, None] * q_stride + within[None, :], mask=mask, other=0.0)
    positions = first_position + member
    acc = tl.zeros([BLOCK_M, HEAD], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    kv_head = head // GROUP_SIZE
    table = tables + sequence * table_stride
    # All queries see the keys up to the first query; only later keys need the causal mask.
    whole = (first_position + 1) // BLOCK_N * BLOCK_N
    acc, highest, total = _attend(
        queries, acc, highest, total, 0, whole, positions, keys, values, key_scales, value_scales,
        table, kv_head, scale, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, HEAD, BLOCK_N, IS_INT8, False,
        PRECISION,
    )  # fmt: skip
    acc, highest, total = _attend(
        queries, acc, highest, total, whole, first_position + num_rows, positions, keys, values,
        key_scales, value_scales, table, kv_head, scale, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, HEAD,
        BLOCK_N, IS_INT8, True, PRECISION,
    )  # fmt: skip
    num_heads: tl.constexpr = GROUP_SIZE * NUM_KV_HEADS
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    to = out + rows[:, None] * (num_heads * HEAD_SIZE) + within[None, :]
    tl.store(to, result, mask=mask)


class StepTiles:
    """The sequences of a step as the kernels read them on the device, made once for all layers.

    Attributes:
        num_decodes: sequences with one query token.
        decode_rows, decode_sequences: int32 [num_decodes], the row of q and the number of each such
            sequence. None in a step of decodes only, where both equal the program's number.
        prompts: int32 [tiles, 4]: first row of q, rows, position of the first row, sequence. Tiles
            with the most keys come first, so that none of them starts last. None in such a step.
    """

    def __init__(self, batch: AttentionBatch, device: torch.device, block_m: int) -> None:
        self.batch = batch
        self.num_decodes = len(batch.query_lens)
        self.decode_rows = self.decode_sequences = self.prompts = None
        if batch.is_decode:
            return
        decodes, tiles = [], []
        row = 0
        for sequence, (query_len, context_len) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            if query_len == 1:
                decodes.append((row, sequence))
            else:
                tiles += [
                    (row + at, min(block_m, query_len - at), context_len + at, sequence)
                    for at in range(0, query_len, block_m)
                ]
            row += query_len
        tiles.sort(key=lambda tile: -tile[2])
        self.num_decodes = len(decodes)
        self.decode_rows, self.decode_sequences, self.prompts = to_device(
            [
                torch.tensor([row for row, _ in decodes], dtype=torch.int32),
                torch.tensor([sequence for _, sequence in decodes], dtype=torch.int32),
                torch.tensor(tiles, dtype=torch.int32).view(-1, 4),
            ],
            device,
        )


def prompt_rows(head_size: int, dtype: torch.dtype) -> int:
    """Rows of q in one program: as many as fit into shared memory beside keys and values."""
    return 64 if head_size <= 128 and dtype.itemsize == 2 else 32


def attention(
    q: Tensor, cache: KVCache, batch: AttentionBatch, tiles: StepTiles, scale: float
) -> Tensor:
    """[T, N, D] → [T, N, D]; the tokens of q need not be contiguous.

    One launch for prompts; one for decodes, two if their keys are split.
    """
    num_tokens, num_heads, head_size = q.shape
    out = torch.empty((num_tokens, num_heads, head_size), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    if q.stride()[1:] != (head_size, 1):
        q = q.contiguous()
    num_kv_heads = cache.keys.shape[2]
    group = num_heads // num_kv_heads
    shape = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP_SIZE": group,
        "BLOCK_SIZE": cache.block_size,
        "HEAD_SIZE": head_size,
        "HEAD": max(16, triton.next_power_of_2(head_size)),
        "IS_INT8": cache.key_scales is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    cached = cache.keys, cache.values, cache.key_scales, cache.value_scales
    tables = batch.block_tables
    if tiles.num_decodes:
        splits = _num_splits(tiles.num_decodes * num_kv_heads, tables, cache.block_size)
        partial = (tiles.num_decodes, num_heads, splits)
        # The kernel takes float32 tensors even if nothing is split; empty ones cost nothing.
        parts = q.new_empty((*partial, head_size) if splits > 1 else (0,), dtype=torch.float32)
        sums = q.new_empty((*partial, 2) if splits > 1 else (0,), dtype=torch.float32)
        is_mixed = tiles.decode_rows is not None
        _decode_kernel[(tiles.num_decodes, num_kv_heads, splits)](
            q, *cached, tables, batch.lengths, tiles.decode_rows, tiles.decode_sequences, out,
            parts, sums, scale * _LOG2_E, q.stride(0), tables.stride(0),
            NUM_SPLITS=splits,
            GROUP=max(16, triton.next_power_of_2(group)),
            BLOCK_N=64 if head_size <= 128 else 32,
            IS_MIXED=is_mixed,
            num_warps=4,
            num_stages=3,
            **shape,
        )  # fmt: skip
        if splits > 1:
            _join_kernel[(tiles.num_decodes, num_heads)](
                parts, sums, tiles.decode_rows, out,
                NUM_SPLITS=splits,
                SPLITS=triton.next_power_of_2(splits),
                NUM_HEADS=num_heads,
                HEAD_SIZE=head_size,
                HEAD=shape["HEAD"],
                IS_MIXED=is_mixed,
                num_warps=2,
            )  # fmt: skip
    if tiles.prompts is not None and len(tiles.prompts):
        _prompt_kernel[(num_heads, len(tiles.prompts))](
            q, *cached, tables, tiles.prompts, out, scale * _LOG2_E, q.stride(0), tables.stride(0),
            BLOCK_M=prompt_rows(head_size, q.dtype),
            BLOCK_N=64 if head_size <= 128 and q.dtype.itemsize == 2 else 32,
            num_warps=4,
            num_stages=2,
            **shape,
        )  # fmt: skip
    return out


def _num_splits(num_programs: int, tables: Tensor, block_size: int) -> int:
    """Splits of the keys of each sequence: a power of two that follows from shapes alone."""
    most_keys = tables.shape[1] * block_size
    wanted = _PROGRAMS_PER_PROCESSOR * processors(tables.device) // num_programs
    most = min(_MOST_SPLITS, most_keys // _LEAST_SPLIT_KEYS, wanted)
    return 1 << int(log2(most)) if most > 1 else 1
