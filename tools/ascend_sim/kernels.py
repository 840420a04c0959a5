"""CPU kernels for the fused operators of torch_npu that an inference engine needs.

Importing this module registers them, so that `torch_npu.npu_rms_norm(x, g)` works on CPU tensors.
Schemas, defaults and the checks of arguments stay torch_npu's own. Only a real NPU is proof.

Shapes: T tokens, H hidden, N query heads, KV key heads, D head size, E experts, K experts per
token, S sequences, B blocks of the cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
import torch_npu

from ascend_sim.integers import QUANTITIES, check_scales, integer_product, round_by_rows
from ascend_sim.rules import (
    FLOATS,
    HALVES,
    demand,
    is_old,
    kernel,
    one_dtype,
    plain,
    poison_of,
    uninitialised,
    unknown,
    warn,
)

MASK_SIZE = 2048
ND, FRACTAL_NZ = 2, 29

# ------------------------------------------------------------------ norm, activation, rotation


@kernel("npu::npu_rms_norm")
def rms_norm(x, gamma, epsilon=1e-6):
    demand(
        x.dtype in FLOATS and gamma.dtype in (x.dtype, torch.float32),
        f"npu_rms_norm: gamma is {gamma.dtype} for {x.dtype}; it is of x's dtype or float32",
    )
    demand(
        x.shape[x.dim() - gamma.dim() :] == gamma.shape,
        f"npu_rms_norm: gamma {tuple(gamma.shape)} is not the end of x's {tuple(x.shape)}",
    )
    demand(x.numel(), "npu_rms_norm takes no empty tensor")
    axes = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(x.float().square().mean(axes, keepdim=True) + epsilon)
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


@kernel("npu::npu_add_rms_norm")
def add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    one_dtype("npu_add_rms_norm", FLOATS, x1, x2, gamma)
    demand(x1.shape == x2.shape, f"npu_add_rms_norm: {tuple(x1.shape)} + {tuple(x2.shape)}")
    total = x1 + x2
    return *rms_norm(total, gamma, epsilon), total


@kernel("npu::npu_swiglu")
def swiglu(x, dim=-1):
    one_dtype("npu_swiglu", FLOATS, x)
    plain("npu_swiglu", x)
    demand(x.size(dim) % 2 == 0, f"npu_swiglu: {x.size(dim)} has no half")
    gate, up = x.float().chunk(2, dim)
    return (F.silu(gate) * up).to(x.dtype)


def rotate(x, cos, sin, mode):
    x32 = x.float()
    if mode == "half":
        first, second = x32.chunk(2, -1)
        quarter_turn = torch.cat((-second, first), -1)
    else:
        quarter_turn = torch.stack((-x32[..., 1::2], x32[..., ::2]), -1).flatten(-2)
    return (x32 * cos.float() + quarter_turn * sin.float()).to(x.dtype)


@kernel("npu::npu_rotary_mul")
def rotary_mul(x, cos, sin, rotary_mode="half", rotate_by=None):
    unknown(rotate=rotate_by)
    demand(rotary_mode in ("half", "interleave"), f"npu_rotary_mul: mode {rotary_mode!r}")
    demand(x.size(-1) % 2 == 0 and x.size(-1) < 896, f"npu_rotary_mul: head size {x.size(-1)}")
    return rotate(x, cos, sin, rotary_mode)


@kernel("npu::npu_apply_rotary_pos_emb")
def apply_rotary_pos_emb(query, key, cos, sin, layout="BSND", rotary_mode="half"):
    """Works in place, although the schema does not say so."""
    name, dims = "npu_apply_rotary_pos_emb", {"BSND": 4, "TND": 3}
    demand(layout in dims and rotary_mode == "half", f"{name}: {layout!r}, {rotary_mode!r}")
    one_dtype(name, FLOATS, query, key, cos, sin)
    plain(name, query, key, cos, sin)
    rows = query.shape[: dims[layout] - 2]
    for tensor in (query, key, cos, sin):
        demand(
            tensor.dim() == dims[layout]
            and tensor.shape[: len(rows)] == rows
            and tensor.size(-1) == query.size(-1) in (64, 128),
            f"{name}: {tuple(tensor.shape)} beside a query {tuple(query.shape)} in {layout}",
        )
    demand(cos.size(-2) == sin.size(-2) == 1, f"{name}: cos and sin are for one head")
    query.copy_(rotate(query, cos, sin, rotary_mode))
    key.copy_(rotate(key, cos, sin, rotary_mode))
    return query, key


# ------------------------------------------------------------------ mixture of experts


@kernel("npu::npu_moe_gating_top_k_softmax")
def gating_top_k_softmax(x, finished=None, k=1):
    one_dtype("npu_moe_gating_top_k_softmax", FLOATS, x)
    demand(0 < k <= min(1024, x.size(-1)), f"npu_moe_gating_top_k_softmax: k={k} of {x.size(-1)}")
    weights = x.float().softmax(-1)
    ids = weights.argsort(dim=-1, descending=True, stable=True)[..., :k]
    rows = torch.arange(ids.numel(), dtype=torch.int32).reshape(k, -1).T.reshape(ids.shape)
    weights = weights.gather(-1, ids).to(x.dtype)
    if finished is not None:
        ids = torch.where(finished.unsqueeze(-1), x.size(-1), ids)
    return weights, ids.int(), rows.contiguous()


@kernel("npu::npu_moe_init_routing_v2")
def init_routing(
    x,
    expert_idx,
    *,
    scale=None,
    offset=None,
    active_num=-1,
    expert_capacity=-1,
    expert_num=-1,
    drop_pad_mode=0,
    expert_tokens_num_type=0,
    expert_tokens_num_flag=False,
    quant_mode=-1,
    active_expert_range=(),
    row_idx_type=0,
    x_dtype=None,
):
    name = "npu_moe_init_routing_v2"
    if is_old():
        demand(
            expert_tokens_num_flag
            and expert_tokens_num_type in (1, 2)
            and active_num in (-1, expert_idx.numel())
            and len(active_expert_range) == 2
            and quant_mode != 0,
            f"{name} of CANN 8.5.0 gives counts or pairs of all rows and of a range of experts: "
            f"{expert_tokens_num_type=}, {expert_tokens_num_flag=}, {active_num=} of "
            f"{expert_idx.numel()}, {active_expert_range=}, {quant_mode=}",
        )
    unknown(scale=scale, offset=offset, drop_pad_mode=drop_pad_mode, x_dtype=x_dtype)
    if quant_mode not in (-1, 1):
        raise NotImplementedError(f"the simulator does not know {quant_mode=}")
    one_dtype(name, FLOATS, x)
    demand(expert_idx.dtype == torch.int32, f"{name}: expert_idx is int32")
    k, flat = expert_idx.size(1), expert_idx.flatten().long()
    foreign = flat[(flat < 0) | (flat >= expert_num)]
    demand(not len(foreign), f"{name}: expert {foreign[:1].tolist()} of {expert_num}")
    start, end = active_expert_range or (0, expert_num)
    demand(0 <= start < end <= expert_num, f"experts {start}..{end} of {expert_num}")
    active = (flat >= start) & (flat < end)
    order = torch.where(active, flat, end).argsort(stable=True)[: int(active.sum())].int()
    rows = min(active_num, flat.numel()) if active_num > 0 else flat.numel()

    scales = uninitialised((rows,), torch.float32)
    row_scales = None
    if quant_mode == 1:
        x, row_scales = round_by_rows(x)
    expanded = uninitialised((rows, x.size(1)), x.dtype)
    kept = order[:rows]
    expanded[: kept.numel()] = x[kept // k]
    if row_scales is not None:
        scales[: kept.numel()] = row_scales[kept // k]
    if row_idx_type == 0:  # gather: the row of each (token, choice), -1 for other ranks' experts
        row_idx = torch.full((flat.numel(),), -1, dtype=torch.int32)
        row_idx[order.long()] = torch.arange(order.numel(), dtype=torch.int32)
    else:  # scatter: the (token, choice) of each row
        row_idx = uninitialised((flat.numel(),), torch.int32)
        row_idx[: order.numel()] = order
    counts = torch.bincount(flat[active] - start, minlength=end - start)
    if not expert_tokens_num_flag:
        tokens = uninitialised((end - start,), torch.int64)
    elif expert_tokens_num_type == 2:
        tokens = uninitialised((expert_num, 2), torch.int64)
        used = counts.nonzero().flatten()
        tokens[: used.numel()] = torch.stack((used + start, counts[used]), 1)
        tokens[used.numel() : used.numel() + 1] = 0
    else:
        tokens = counts if expert_tokens_num_type == 1 else counts.cumsum(0)
    return expanded, row_idx, tokens, scales


@kernel("npu::npu_moe_token_permute")
def token_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    unknown(padded_mode=padded_mode)
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    k = flat.numel() // tokens.size(0)
    return tokens[order[: num_out_tokens or None] // k], order.argsort().int()


@kernel("npu::npu_moe_token_unpermute")
def token_unpermute(
    permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None
):
    unknown(padded_mode=padded_mode)
    name, num_rows = "npu_moe_token_unpermute", len(permuted_tokens)
    one_dtype(f"{name} (tokens)", FLOATS, permuted_tokens)
    if probs is not None:
        # Their dtype may differ from that of the tokens (CANN's moe_token_unpermute_def.cpp).
        one_dtype(f"{name} (probs)", FLOATS, probs)
    demand(
        sorted_indices.dtype == torch.int32
        and sorted_indices.dim() == 1
        and (probs is None or len(sorted_indices) == probs.numel()),
        f"{name}: sorted_indices {sorted_indices.dtype} {tuple(sorted_indices.shape)} is int32 "
        "[T·K], one for each of probs",
    )
    index = sorted_indices.long()
    if len(index.unique()) < len(index):
        warn(f"{name} gets an index twice, which its document excludes; other engines rely on it")
    outside = index[(index < 0) | (index >= num_rows)]
    demand(not len(outside), f"{name} reads rows {outside[:4].tolist()} of {num_rows}")
    k = 1 if probs is None else probs.size(1)
    rows = permuted_tokens[index].float().unflatten(0, (-1, k))
    if probs is not None:
        rows = rows * probs.float().unsqueeze(-1)
    return rows.sum(1).to(permuted_tokens.dtype)


@kernel("npu::npu_moe_finalize_routing")
def finalize_routing(
    expanded, skip1, skip2, bias, scales, src_to_dst, expert_for_source, drop_pad_mode=0, k=1
):
    demand(skip1 is not None or skip2 is None, "npu_moe_finalize_routing: skip2 without skip1")
    k = scales.size(1) if scales is not None else k
    index = src_to_dst.long()
    index = index.reshape(-1, k) if drop_pad_mode >= 2 else index.reshape(k, -1).T
    dropped = index < 0
    demand(drop_pad_mode in (1, 3) or not dropped.any(), "index -1 goes with drop_pad_mode 1 or 3")
    rows = expanded.flatten(0, -2)[index.clamp(min=0)].float()
    rows = rows.masked_fill(dropped.unsqueeze(-1), 0)
    if bias is not None:
        rows = rows + bias[expert_for_source.long()].float()
    out = (rows if scales is None else rows * scales.float().unsqueeze(-1)).sum(1)
    for skip in (skip1, skip2):
        out = out if skip is None else out + skip.float()
    return out.to(expanded.dtype)


@kernel("npu::npu_grouped_matmul")
def grouped_matmul(
    x,
    weight,
    *,
    bias=None,
    group_list=None,
    split_item=0,
    group_type=None,
    group_list_type=0,
    **others,
):
    """Rows that no group covers stay unwritten."""
    others.pop("tuning_config", None)
    name = "npu_grouped_matmul"
    quantities = {key: others.pop(key, None) for key in QUANTITIES}
    output_dtype = others.pop("output_dtype", None)
    unknown(**others)
    demand(max(len(x), len(weight)) <= 128, f"{name} takes lists of 128 at most")
    weights = [w for one in weight for w in (one.unbind() if one.dim() == 3 else [one])]
    biases = [None] * len(weights)
    if weight[0].dtype == torch.int8:
        demand(not bias and group_type == 0, f"the simulator knows {name} of int8 without bias")
        product, dtype = integer_product(x[0], weight[0], quantities, output_dtype)
    else:
        unknown(output_dtype=output_dtype, **quantities)
        one_dtype(name, FLOATS, *x, *weight)
        dtype = x[0].dtype
        demand(
            dtype != torch.float32 or len(x) == len(weight) == 1,
            f"{name} of float32 takes one x and one weight, not {len(x)} and {len(weight)}",
        )

        def product(rows, i, places):
            y = rows.float() @ weights[i].float()
            return (y if biases[i] is None else y + biases[i]).to(rows.dtype)

    if bias:
        wanted = torch.float32 if x[0].dtype == torch.bfloat16 else x[0].dtype
        one_dtype(f"{name} (bias for {x[0].dtype})", (wanted,), *bias)
        biases = [b for one in bias for b in (one.unbind() if one.dim() == 2 else [one])]

    if group_type == -1:
        return [product(rows, i, slice(None)) for i, rows in enumerate(x)]
    demand(
        group_list_type != 2 or x[0].dtype == torch.int8,
        f"{name}: group_list_type=2 is for int8, not {x[0].dtype}",
    )
    if group_type != 0 or split_item not in (2, 3) or len(x) != 1 or group_list_type not in (0, 1):
        raise NotImplementedError("the simulator knows group_type 0 with one x and one y, and -1")
    (rows,) = x
    demand(group_list.dtype == torch.int64, f"{name}: group_list is int64")
    demand(
        group_list_type != 1 or len(group_list) != 1,
        f"{name}: group_list_type=1 takes more than one group; give one group as its end",
    )
    demand(max(rows.size(-1), weights[0].size(-1)) < 65536, f"{name}: last dim above 65535")
    counts = group_list
    if group_list_type == 0:
        counts = torch.diff(group_list, prepend=group_list.new_zeros(1))
    demand(
        (counts >= 0).all() and counts.sum() <= len(rows) and len(counts) == len(weights),
        f"{name}: groups {counts.tolist()} for {len(rows)} rows and {len(weights)} weights",
    )
    y = uninitialised((len(rows), weights[0].size(1)), dtype)
    ends = [0, *counts.cumsum(0).tolist()]
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if end > start:
            y[start:end] = product(rows[start:end], i, slice(start, end))
    return [y]


@kernel("npu::npu_grouped_matmul.List")
def grouped_matmul_by_list(x, weight, *, group_type=None, **others):
    demand(
        group_type is None,
        f"npu_grouped_matmul takes a group_list of Python integers only without a group_type, not "
        f"{group_type}",
    )
    raise NotImplementedError("the simulator knows npu_grouped_matmul with a tensor of groups only")


# ------------------------------------------------------------------ attention and its cache


def split_sequences(tensor, layout, heads, lengths):
    """Queries, keys or values, as one tensor [tokens, N, D] for each sequence."""
    if layout == "TND":
        demand(
            lengths
            and all(a <= b for a, b in itertools.pairwise([0, *lengths]))
            and lengths[-1] == len(tensor),
            f"error 561002: TND has {len(tensor)} rows, and lengths {lengths}, which are the "
            "cumulative ends of its sequences",
        )
        return list(tensor.split(torch.diff(torch.tensor([0, *lengths])).tolist()))
    if layout == "BSH":
        tensor = tensor.unflatten(-1, (heads, -1))
    rows = tensor.transpose(1, 2) if layout == "BNSD" else tensor
    lengths = lengths or [rows.size(1)]
    lengths = lengths * len(rows) if len(lengths) == 1 else lengths
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def paged_rows(cache, table, heads, lengths, block_size, scales=None):
    """The cached rows of each sequence; the cache is [B, size, KV·D] or [B, KV, size, D].

    scales: float32 [B, KV, size] for an int8 cache, else None.
    """
    demand(cache.dim() in (3, 4), f"a paged cache has 3 or 4 dims: {tuple(cache.shape)}")
    if cache.dim() == 4:
        cache = cache.transpose(1, 2)
    else:
        demand(cache.size(2) <= 65535, f"a cache of KV·D = {cache.size(2)} is above 65535")
    demand(cache.size(1) == block_size, f"block_size={block_size}, blocks are of {cache.size(1)}")
    rows = cache.reshape(len(cache), block_size, heads, -1)
    out = []
    for i, (blocks, length) in enumerate(zip(table.long(), lengths, strict=True)):
        used = blocks[: -(-length // block_size)]
        demand(
            length <= len(blocks) * block_size and bool(((used >= 0) & (used < len(cache))).all()),
            f"sequence {i} has {length} keys in blocks {blocks.tolist()} of {len(cache)}: lengths "
            "of cached sequences are per sequence, not cumulative, for TND too",
        )
        mine = rows[used]
        if scales is not None:
            mine = mine.float() * scales[used].transpose(1, 2).unsqueeze(-1)
        out.append(mine.flatten(0, 1)[:length])
    return out


def visible(num_queries, num_keys, mode, mask, pre_tokens, next_tokens, sequence):
    """bool [queries, keys]: True where a query sees a key."""
    back = torch.arange(num_queries).unsqueeze(1) - torch.arange(num_keys)
    if mode in (0, 1):
        if mask is None:
            return torch.ones_like(back, dtype=torch.bool)
        hidden = mask.bool()
        if hidden.dim() > 2:
            hidden = hidden[min(sequence, len(hidden) - 1)].flatten(0, -3)[0]
        return ~hidden[:num_queries, :num_keys]
    demand(
        mask is not None and tuple(mask.shape[-2:]) == (MASK_SIZE, MASK_SIZE),
        f"sparse_mode={mode} takes an atten_mask of {MASK_SIZE} × {MASK_SIZE}",
    )
    causal = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1)
    demand(
        torch.equal(mask.bool().reshape(MASK_SIZE, MASK_SIZE), causal),
        "the compressed atten_mask is 1 above the diagonal, which hides, and 0 elsewhere",
    )
    if mode != 2:
        back += num_keys - num_queries  # the last query sees the last key
    return (back >= -next_tokens) & (back <= pre_tokens) if mode == 4 else back >= 0


@kernel("npu::npu_fused_infer_attention_score")
def fused_infer_attention_score(
    query,
    key,
    value,
    *,
    atten_mask=None,
    actual_seq_lengths=None,
    actual_seq_lengths_kv=None,
    block_table=None,
    num_heads=1,
    scale=1.0,
    pre_tokens=2147483647,
    next_tokens=2147483647,
    input_layout="BSH",
    num_key_value_heads=0,
    sparse_mode=0,
    inner_precise=0,
    block_size=0,
    softmax_lse_flag=False,
    key_antiquant_scale=None,
    value_antiquant_scale=None,
    key_antiquant_mode=0,
    value_antiquant_mode=0,
    **others,
):
    unknown(**others)
    if input_layout not in ("TND", "BSH", "BSND", "BNSD"):
        raise NotImplementedError(f"the simulator does not know input_layout={input_layout}")
    is_integer = key.dtype == value.dtype == torch.int8
    floats = (query,) if is_integer else (query, key, value)
    one_dtype("npu_fused_infer_attention_score", HALVES, *floats)
    plain("npu_fused_infer_attention_score", query)
    if atten_mask is not None:
        one_dtype("atten_mask", (torch.bool, torch.int8, torch.uint8), atten_mask)
        plain("atten_mask", atten_mask)
    kv_heads = num_key_value_heads or num_heads
    demand(num_heads % kv_heads == 0, f"{num_heads} query heads over {kv_heads} key heads")
    demand(num_heads // kv_heads <= 64, f"{num_heads} query heads over {kv_heads}, 64 at most")
    if input_layout == "TND":
        demand(sparse_mode in (0, 3, 4), f"TND takes sparse_mode 0, 3 and 4, not {sparse_mode}")
        demand(
            sparse_mode != 0 or atten_mask is None,
            "TND takes sparse_mode=0 without an atten_mask only",
        )
        demand(query.size(1) == num_heads, f"num_heads={num_heads}, query {tuple(query.shape)}")
        demand(query.size(2) in (128, 192), f"TND takes heads of 128, not {query.size(2)}")
        demand(len(actual_seq_lengths or []) <= 4096, "TND takes 4096 sequences at most")
    queries = split_sequences(query, input_layout, num_heads, actual_seq_lengths)
    scales = (key_antiquant_scale, value_antiquant_scale)
    modes = (key_antiquant_mode, value_antiquant_mode)
    if is_integer:
        check_scales(key, *scales, modes, input_layout, queries, block_table, kv_heads, block_size)
    else:
        demand(scales == (None, None) and modes == (0, 0), "scales of keys that are not int8")
    if block_table is None:
        keys = split_sequences(key, input_layout, kv_heads, actual_seq_lengths_kv)
        values = split_sequences(value, input_layout, kv_heads, actual_seq_lengths_kv)
    else:
        lengths = actual_seq_lengths_kv
        demand(lengths is not None, "a paged cache goes with actual_seq_lengths_kv")
        demand(block_table.dtype == torch.int32, "block_table is int32")
        demand(
            len(block_table) == len(lengths) == len(queries),
            f"error 561002: {len(queries)} sequences have {len(lengths)} lengths and "
            f"{len(block_table)} rows of the block table",
        )
        multiple, most = (16, 1024) if input_layout == "TND" else (128, 512)
        if input_layout != "TND" and all(len(one) == 1 for one in queries):
            multiple = 32 if is_integer else 16
        demand(
            block_size % multiple == 0 and 0 < block_size <= most,
            f"block_size={block_size} is not a multiple of {multiple} up to {most}",
        )
        keys, values = (
            paged_rows(cache, block_table, kv_heads, lengths, block_size, scale)
            for cache, scale in zip((key, value), scales, strict=True)
        )

    outs, lses = [], []
    for i, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        demand(len(k) or not len(q), f"sequence {i} has queries and no keys")
        demand(
            input_layout != "TND" or sparse_mode != 3 or len(q) <= len(k),
            f"sequence {i}: sparse_mode=3 takes no more queries than keys, not {len(q)} and "
            f"{len(k)}",
        )
        k, v = (rows.repeat_interleave(num_heads // kv_heads, 1).float() for rows in (k, v))
        score = torch.einsum("snd,tnd->nst", q.float(), k) * scale
        mode = 0 if len(q) == 1 and input_layout != "TND" else sparse_mode
        seen = visible(len(q), len(k), mode, atten_mask, pre_tokens, next_tokens, i)
        score = score.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("nst,tnd->snd", score.softmax(-1), v).to(query.dtype))
        lses.append(score.logsumexp(-1).T.unsqueeze(-1))
    if input_layout == "TND":
        return torch.cat(outs), torch.cat(lses) if softmax_lse_flag else torch.empty(0)
    size = query.size(2 if input_layout == "BNSD" else 1)
    padded = [F.pad(rows, (0, 0, 0, 0, 0, size - len(rows))) for rows in (*outs, *lses)]
    out = torch.stack(padded[: len(outs)])
    lse = torch.stack(padded[len(outs) :]).transpose(1, 2)
    if input_layout != "BSND":
        out = out.flatten(2) if input_layout == "BSH" else out.transpose(1, 2)
    return out.contiguous(), lse.contiguous() if softmax_lse_flag else torch.empty(0)


@kernel("npu::npu_fused_infer_attention_score_v2")
def fused_infer_attention_score_v2(
    query,
    key,
    value,
    *,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    num_query_heads=1,
    softmax_scale=1.0,
    return_softmax_lse=False,
    **same,
):
    return fused_infer_attention_score(
        query,
        key,
        value,
        actual_seq_lengths=actual_seq_qlen,
        actual_seq_lengths_kv=actual_seq_kvlen,
        num_heads=num_query_heads,
        scale=softmax_scale,
        softmax_lse_flag=return_softmax_lse,
        **same,
    )


def fill(out, values):
    for place, value in zip(out, values, strict=True):
        if value.numel():
            place.copy_(value)
    return tuple(out)


@kernel("npu::npu_fused_infer_attention_score.out")
def fused_infer_attention_score_out(*args, out, workspace=None, **same):
    return fill(out, fused_infer_attention_score(*args, **same))


@kernel("npu::npu_fused_infer_attention_score_v2.out")
def fused_infer_attention_score_v2_out(*args, out, workspace=None, **same):
    return fill(out, fused_infer_attention_score_v2(*args, **same))


@kernel("atb::_npu_reshape_and_cache")
def reshape_and_cache(key, value, key_cache, value_cache, slot_indices):
    """A negative slot is padding. Two rows for one slot race: the slot is poisoned."""
    plain("the write into the cache", key, value, key_cache, value_cache, slot_indices)
    one_dtype("the write into the cache", (*FLOATS, torch.int8), key, value, key_cache, value_cache)
    demand(len(slot_indices) == len(key), f"{len(slot_indices)} slots for {len(key)} rows")
    kept = (slot_indices >= 0).nonzero().flatten()
    slots = slot_indices[kept].long()
    unique, times = slots.unique(return_counts=True)
    for rows, cache in ((key, key_cache), (value, value_cache)):
        places = cache.view(-1, *cache.shape[2:])
        demand(
            rows.shape[1:] == places.shape[1:] and (slots < len(places)).all(),
            f"rows {tuple(rows.shape)} for slots up to {int(slots.max())} of a cache "
            f"{tuple(cache.shape)}",
        )
        places[slots] = rows[kept]
        places[unique[times > 1]] = poison_of(cache.dtype)


@kernel("npu::npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    *,
    compress_lens=None,
    compress_seq_offsets=None,
    seq_lens=None,
    cache_mode="PA_NZ",
):
    unknown(compress_lens=compress_lens, seq_lens=seq_lens)
    unknown(compress_seq_offsets=compress_seq_offsets)
    name = "npu_scatter_pa_kv_cache"
    one_dtype(name, (*HALVES, torch.int8), key, value, key_cache, value_cache)
    demand(
        slot_mapping.dtype in (torch.int32, torch.int64) and slot_mapping.dim() == 1,
        f"{name}: slot_mapping {slot_mapping.dtype} {tuple(slot_mapping.shape)} is int32 or int64 "
        "[T]",
    )
    if cache_mode != "Norm":
        tile = 32 // key_cache.element_size()
        demand(
            key_cache.dim() == 4 and key_cache.size(3) == tile,
            f"error 561002: {name} with cache_mode='PA_NZ', which the adapter passes unless told "
            f"otherwise, takes caches in tiles of {tile}, not {tuple(key_cache.shape)}",
        )
        raise NotImplementedError(f"the simulator does not know {cache_mode=}")
    places = key_cache.size(0) * key_cache.size(1)
    demand(0 < len(key) <= places, f"{name}: {len(key)} tokens for {places} slots")
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


def hide_cache_mode():
    """Give `npu_scatter_pa_kv_cache` the schema of torch-npu 2.9.0, whose adapter always passes
    `PA_NZ`."""
    name, old = "npu_scatter_pa_kv_cache", "npu_scatter_pa_kv_cache_2_9_0"
    real, library = torch.ops.npu.npu_scatter_pa_kv_cache, torch.library.Library("npu", "FRAGMENT")
    library.define(
        f"{old}(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None, "
        "Tensor? seq_lens=None) -> ()"
    )
    library.impl(
        old,
        lambda *args, **kwargs: real(*args, **kwargs, cache_mode="PA_NZ"),
        "CompositeImplicitAutograd",
    )
    _old_wheel.append(library)  # it unregisters what it defines when it is freed
    for module in (torch.ops.npu, torch_npu):
        setattr(module, name, getattr(torch.ops.npu, old))


_old_wheel: list[Any] = []


@kernel("npu::npu_scatter_nd_update_")
def scatter_nd_update(tensor, indices, updates):
    tensor[tuple(indices.long().unbind(-1))] = updates
    return tensor


@kernel("npu::npu_format_cast")
def format_cast(tensor, acl_format, *, customize_dtype=None, input_dtype=None):
    """A copy, since the memory layout of the hardware is not simulated. device.py checks how the
    copy is used."""
    unknown(customize_dtype=customize_dtype, input_dtype=input_dtype)
    demand(acl_format in (ND, FRACTAL_NZ), f"the simulator does not know format {acl_format}")
    if acl_format == FRACTAL_NZ:
        one_dtype("npu_format_cast to NZ", (*HALVES, torch.int8), tensor)
        plain("npu_format_cast to NZ", tensor)
        demand(tensor.dim() in (2, 3), f"npu_format_cast to NZ: {tensor.dim()} dims")
    return tensor.clone()
