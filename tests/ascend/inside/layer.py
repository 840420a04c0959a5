"""One decoder layer of a small DeepSeek-MoE in torch_npu's operators, and the same in plain torch.

It takes the place of an engine in the tests of the stand-in.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch_npu

# The wheel of torch-npu 2.9.0, whose cache write demands tiles.
OLD_WHEEL = os.environ.get("ASCEND_SIM_OLD_WHEEL") == "1"
needs_cache_mode = pytest.mark.skipif(OLD_WHEEL, reason="this wheel has no cache_mode")

EPS, BLOCK = 1e-6, 128
DTYPE = torch.bfloat16
# Several roundings to bfloat16 (2**-8 each) of numbers about 1.
TOLERANCE = 0.1
FULL = SimpleNamespace(hidden=2048, heads=16, dim=128, experts=64, inner=1408, top=6)
SMALL = SimpleNamespace(hidden=256, heads=2, dim=128, experts=8, inner=64, top=3)


def make_weights(c, device="cpu"):
    def make(*shape):
        return torch.randn(*shape, dtype=DTYPE, device=device) / shape[-1] ** 0.5

    return SimpleNamespace(
        norm1=1 + make(c.hidden),
        norm2=1 + make(c.hidden),
        qkv=make(c.hidden, 3 * c.hidden) * 1.7,
        out=make(c.hidden, c.hidden),
        gate=make(c.hidden, c.experts),
        up=make(c.experts, c.hidden, 2 * c.inner),
        down=make(c.experts, c.inner, c.hidden) * 0.3,
    )


def make_batch(c, device="cpu"):
    """Two sequences: a prompt of 3 tokens, and a decode step after 128 cached tokens."""
    angle = torch.arange(4.0).unsqueeze(1) * torch.arange(1.0, c.dim // 2 + 1) / 9
    return SimpleNamespace(
        x=torch.randn(4, c.hidden, dtype=DTYPE).to(device),
        cos=torch.cat([angle.cos()] * 2, -1).unsqueeze(1).to(device, DTYPE),
        sin=torch.cat([angle.sin()] * 2, -1).unsqueeze(1).to(device, DTYPE),
        cache=torch.randn(2, 4, BLOCK, c.heads, c.dim, dtype=DTYPE).to(device),
        slots=torch.tensor([0, 1, 2, 2 * BLOCK], dtype=torch.int32).to(device),
        table=torch.tensor([[0, 3], [1, 2]], dtype=torch.int32).to(device),
        mask=torch.ones(2048, 2048, dtype=torch.int8).triu(1).to(device),
        query_ends=[3, 4],
        cached=[3, 129],
        scale=c.dim**-0.5,
    )


def on(device, group):
    """Weights or a batch on another device."""
    parts = vars(group).items()
    return SimpleNamespace(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in parts})


def altered(batch, **changes):
    """A copy of a batch with a cache of its own, and with `changes`."""
    return SimpleNamespace(**{**vars(batch), "cache": batch.cache.clone(), **changes})


def attend(c, q, b):
    return torch_npu.npu_fused_infer_attention_score(
        q,
        b.cache[0].flatten(-2),
        b.cache[1].flatten(-2),
        num_heads=c.heads,
        num_key_value_heads=c.heads,
        scale=b.scale,
        input_layout="TND",
        block_table=b.table,
        block_size=BLOCK,
        actual_seq_lengths=b.query_ends,
        actual_seq_lengths_kv=b.cached,
        atten_mask=b.mask,
        sparse_mode=3,
    )[0]


def attention(c, w, b):
    h, _ = torch_npu.npu_rms_norm(b.x, w.norm1, EPS)
    q, k, v = (h @ w.qkv).unflatten(-1, (3, c.heads, c.dim)).unbind(1)
    q, k = torch_npu.npu_apply_rotary_pos_emb(
        q.contiguous(), k.contiguous(), b.cos, b.sin, layout="TND"
    )
    if OLD_WHEEL:
        for rows, cache in zip((k, v), b.cache, strict=True):
            cache.flatten(0, 1)[b.slots] = rows
    else:
        torch_npu.npu_scatter_pa_kv_cache(
            k, v.contiguous(), b.cache[0], b.cache[1], b.slots, cache_mode="Norm"
        )
    return attend(c, q, b).flatten(1) @ w.out


def experts(c, w, h, first=0, last=None, tame=True):
    """The sum over experts first..last-1. `tame`: rows of other experts are set to zero."""
    last = last or c.experts
    weight, ids, _ = torch_npu.npu_moe_gating_top_k_softmax(h @ w.gate, None, c.top)
    rows, where, counts, _ = torch_npu.npu_moe_init_routing_v2(
        h,
        ids,
        active_num=ids.numel(),
        expert_num=c.experts,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[first, last],
        quant_mode=-1,
    )
    grouped = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 2}
    y = torch_npu.npu_grouped_matmul([rows], [w.up[first:last]], **grouped)[0]
    y = torch_npu.npu_swiglu(y)
    y = torch_npu.npu_grouped_matmul([y], [w.down[first:last]], **grouped)[0]
    if tame:
        unused = torch.arange(len(y), device=y.device) >= counts.sum()
        y = y.masked_fill(unused.unsqueeze(1), 0)
        weight = weight * (where.view_as(ids) >= 0)
        where = where.abs()
    return torch_npu.npu_moe_token_unpermute(y, where, weight.to(y.dtype))


def layer(c, w, b):
    h, _, residual = torch_npu.npu_add_rms_norm(attention(c, w, b), b.x, w.norm2, EPS)
    return residual + experts(c, w, h)


def reference(c, w, b):
    """The same layer in plain torch and float32; writes into the batch's cache."""
    w32 = SimpleNamespace(**{name: x.float() for name, x in vars(w).items()})
    cos, sin = b.cos.float(), b.sin.float()

    def norm(x, gamma):
        return F.rms_norm(x, x.shape[-1:], gamma, EPS)

    def turn(x):
        return x * cos + torch.cat((-x[..., c.dim // 2 :], x[..., : c.dim // 2]), -1) * sin

    x = b.x.float()
    q, k, v = (norm(x, w32.norm1) @ w32.qkv).unflatten(-1, (3, c.heads, c.dim)).unbind(1)
    b.cache.flatten(1, 2)[:, b.slots.long()] = torch.stack((turn(k), v)).to(b.cache.dtype)
    outs, start = [], 0
    for end, length, blocks in zip(b.query_ends, b.cached, b.table, strict=True):
        rows = b.cache[:, blocks.long()].flatten(1, 2)[:, :length].float()
        keys, values = rows.transpose(1, 2)
        mask = torch.ones(end - start, length, dtype=torch.bool).tril(length - (end - start))
        one = F.scaled_dot_product_attention(turn(q)[start:end].transpose(0, 1), keys, values, mask)
        outs.append(one.transpose(0, 1).flatten(1))
        start = end
    x = x + torch.cat(outs) @ w32.out
    return x + plain_experts(c, w, norm(x, w32.norm2))


def plain_experts(c, w, h):
    weight, ids = (h.float() @ w.gate.float()).softmax(-1).topk(c.top)
    out = torch.zeros(h.shape)
    for t, (row, chosen) in enumerate(zip(weight, ids, strict=True)):
        for p, e in zip(row, chosen, strict=True):
            gate, up = (h[t].float() @ w.up[e].float()).chunk(2)
            out[t] += p * (F.silu(gate) * up) @ w.down[e].float()
    return out
