"""Operations for CPUs in plain torch: the slow parts of the reference in fewer, larger steps."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moespan.checkpoint.rounding import QuantizedWeight
from moespan.log import mute, once
from moespan.ops.base import AttentionBatch, ExpertBank, KVCache, Weight
from moespan.ops.reference import ReferenceOps

# Most bytes of gathered keys and values when several decodes are attended together.
_GATHER_BYTES = 64 << 20


_PROCESSOR_FILE = Path("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1")


@cache
def let_onednn_start() -> None:
    """Let oneDNN's complaint about an aarch64 machine without that file go nowhere.

    Its first product of float32 prints one line to stderr in each process. Emulators and some
    containers lack the file.
    """
    if platform.machine() == "aarch64" and not _PROCESSOR_FILE.exists():
        with mute(2):
            F.linear(torch.ones(16, 64), torch.ones(64, 64))


class CpuOps(ReferenceOps):
    """See `moespan.ops.base.Ops` for what each operation promises."""

    def prepare(self, name: str, weight: Tensor | QuantizedWeight) -> Weight:
        """The weight, unchanged. Says once that 8-bit floats are slow."""
        if isinstance(weight, QuantizedWeight) and weight.values.dtype == torch.float8_e4m3fn:
            once("products of 8-bit floats run in plain torch, which is slow on a CPU")
        return super().prepare(name, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]. Torch's kernel rounds once, after scaling: it serves float32 only."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        return super().rms_norm(x, weight, eps)

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
        """[T, N, D] → [T, N, D]: prefills one at a time, decodes in groups."""
        if cache.is_quantized:
            return super().attention(q, cache, batch, scale)
        k_cache, v_cache = cache.keys, cache.values
        out = torch.empty_like(q)
        decodes: list[tuple[int, int]] = []  # (row of q, sequence)
        row = 0
        for sequence, (query_len, context_len) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            rows = slice(row, row + query_len)
            if query_len == 1:
                decodes.append((row, sequence))
            else:
                table = batch.block_tables[sequence]
                out[rows] = _prefill(q[rows], k_cache, v_cache, table, context_len, scale)
            row += query_len
        # Sequences of similar length are attended together, so that little is gathered in vain.
        decodes.sort(key=lambda decode: batch.context_lens[decode[1]])
        row_bytes = 2 * k_cache[0].numel() * k_cache.element_size()
        while decodes:
            longest = batch.context_lens[decodes[-1][1]] + 1
            num_blocks = -(-longest // k_cache.shape[1])
            group = decodes[-max(1, _GATHER_BYTES // (num_blocks * row_bytes)) :]
            del decodes[-len(group) :]
            rows_of_q = torch.tensor([row for row, _ in group])
            sequences = torch.tensor([sequence for _, sequence in group])
            lengths = torch.tensor([batch.context_lens[sequence] + 1 for _, sequence in group])
            tables = batch.block_tables[sequences, :num_blocks]
            out[rows_of_q] = _decode(q[rows_of_q], k_cache, v_cache, tables, lengths, scale)
        return out

    def experts(self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank) -> Tensor:
        """[T, H] → [T, H]. Reads the weights of chosen experts only, each once."""
        num_chosen, num_held = physical_ids.shape[1], len(bank.gate_up)
        local = physical_ids - bank.first
        pairs = ((local >= 0) & (local < num_held)).flatten().nonzero()[:, 0]
        expert_of = local.flatten()[pairs]
        pairs = pairs[expert_of.argsort(stable=True)]
        tokens = pairs // num_chosen
        rows = x[tokens]
        results = torch.empty_like(rows)
        start = 0
        for expert, count in enumerate(expert_of.bincount(minlength=num_held).tolist()):
            if count:
                mine = slice(start, start + count)
                results[mine] = self.mlp(rows[mine], bank.gate_up[expert], bank.down[expert])
                start += count
        weighted = results.float() * weights.flatten()[pairs, None]
        out = torch.zeros_like(x, dtype=torch.float32)
        return out.index_add_(0, tokens, weighted).to(x.dtype)


def _prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, context_len: int, scale: float
) -> Tensor:
    """Q tokens of one sequence: [Q, N, D] → [Q, N, D]."""
    length = context_len + len(q)
    blocks = table[: -(-length // k_cache.shape[1])]
    k, v = (cache[blocks].flatten(0, 1)[:length].transpose(0, 1) for cache in (k_cache, v_cache))
    mask = torch.ones(len(q), length, dtype=torch.bool).tril(context_len)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """One token of each of S sequences: [S, N, D] → [S, N, D]."""
    num_sequences, num_heads, head_size = q.shape
    num_kv_heads = k_cache.shape[2]
    k, v = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    grouped = q.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_size)
    scores = torch.matmul(grouped, k.transpose(2, 3)).float() * scale
    hidden = torch.arange(k.shape[2]) >= lengths[:, None]
    # Past its length a sequence reads blocks of others. A NaN there times weight 0 would be NaN.
    v.masked_fill_(hidden[:, None, :, None], 0)
    probabilities = scores.masked_fill_(hidden[:, None, None], -torch.inf).softmax(-1)
    return torch.matmul(probabilities.to(v.dtype), v).view_as(q)
