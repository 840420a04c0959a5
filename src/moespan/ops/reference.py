"""The meaning of every operation, in plain torch, one sequence and one expert at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moespan.checkpoint.building import Builder, KeptWeights, TensorBuilder
from moespan.checkpoint.placement import Parameter, Placement
from moespan.checkpoint.rounding import QuantizedWeight, round_rows
from moespan.config import QUANTIZATIONS
from moespan.ops.base import AttentionBatch, ExpertBank, KVCache, Replay, Rotation, Weight
from moespan.parallel.mesh import Axis


class ReferenceOps:
    """See `moespan.ops.base.Ops` for what each operation promises."""

    has_graphs = False
    quantizations: tuple[str, ...] = QUANTIZATIONS
    has_int8_cache = True
    chip = ""
    has_second_stream = False

    def builder(
        self, name: str, parameter: Parameter, dtype: torch.dtype, device: torch.device
    ) -> Builder:
        """A builder of a tensor, which `prepare` gets when it is whole."""
        return TensorBuilder(name, parameter, dtype, device, self.prepare)

    def kept_weights(
        self, placement: Placement, identity: str, dtype: torch.dtype, limit_bytes: int
    ) -> KeptWeights | None:
        """None: they are kept in the layout of kernels only."""
        return None

    def prepare(self, name: str, weight: Tensor | QuantizedWeight) -> Weight:
        """The weight, unchanged."""
        return weight

    def new_cache(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """`KVCache.zeros`."""
        return KVCache.zeros(shape, dtype, device)

    def rotary_table(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The float32 table, unchanged."""
        return cos, sin

    def record(self, run: Callable[[], object]) -> Replay:
        """Not available."""
        raise NotImplementedError

    def beside(
        self, first: Callable[[], Tensor], second: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One after the other."""
        return first(), second()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return normed.to(x.dtype) * weight

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """[T, in], [out, in] → [T, out]."""
        if isinstance(weight, QuantizedWeight):
            return _quantized_linear(x, weight, bias)
        return F.linear(x, weight, bias)

    def linear_sum(self, x: Tensor, weight: Weight, axis: Axis, module: str) -> Tensor:
        """[T, in], [out, in] → [T, out], replicated over `axis`."""
        return axis.all_reduce(self.linear(x, weight), module)

    def rope(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N + 2·KV, D], float32 [T, D/2] twice → [T, N, D], [T, KV, D] twice."""
        num_rotated = rotation.num_heads + rotation.num_kv_heads
        first, second = qkv[:, :num_rotated].float().chunk(2, -1)
        cos, sin = rotation.cos[:, None], rotation.sin[:, None]
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        q, k = rotated.to(qkv.dtype).split([rotation.num_heads, rotation.num_kv_heads], 1)
        return q, k, qkv[:, num_rotated:]

    def write_cache(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Store [T, KV, D] at `slots`."""
        for x, target, scales in (
            (k, cache.keys, cache.key_scales),
            (v, cache.values, cache.value_scales),
        ):
            if scales is not None:
                x, scales.flatten(0, 1)[slots] = round_rows(x)
            target.flatten(0, 1)[slots] = x

    def rope_to_cache(
        self, qkv: Tensor, rotation: Rotation, cache: KVCache, slots: Tensor
    ) -> Tensor:
        """[T, N + 2·KV, D] → [T, N, D]."""
        q, k, v = self.rope(qkv, rotation)
        self.write_cache(k, v, cache, slots)
        return q

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
        """[T, N, D] over the cache [B, block size, KV, D] → [T, N, D]."""
        outputs = [torch.empty_like(q, dtype=torch.float32)[:0]]  # there may be no sequence
        groups = q.shape[1] // cache.keys.shape[2]
        for queries, context_len, table in zip(
            q.split(batch.query_lens), batch.context_lens, batch.block_tables, strict=True
        ):
            length = context_len + len(queries)
            k, v = (part[:length].repeat_interleave(groups, dim=1) for part in gather(cache, table))
            scores = torch.einsum("qnd,knd->nqk", queries.float(), k) * scale
            hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(context_len + 1)
            probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("nqk,knd->qnd", probabilities, v))
        return torch.cat(outputs).to(q.dtype)

    def mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        """[T, H] → [T, H]."""
        return self.linear(self.swiglu(self.linear(x, gate_up)), down)

    def mlp_sum(
        self,
        x: Tensor,
        gate_up: Weight,
        down: Weight,
        axis: Axis,
        module: str,
        plus: Tensor | None = None,
    ) -> Tensor:
        """[T, H] replicated over `axis` → [T, H] replicated over it."""
        out = self.mlp(x, gate_up, down)
        return axis.all_reduce(out if plus is None else plus + out, module)

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(first half) · second half: [T, 2·I] → [T, I]."""
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def route(
        self, x: Tensor, router: Tensor, num_chosen: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """[T, H] → float32 [T, K], int64 [T, K]."""
        probabilities = F.linear(x.float(), router).softmax(-1)
        weights, chosen = probabilities.topk(num_chosen, dim=-1)
        if renormalize and num_chosen > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights, chosen

    def experts(self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank) -> Tensor:
        """[T, H] → [T, H]."""
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in range(len(bank.gate_up)):
            tokens, place = torch.where(physical_ids == bank.first + expert)
            result = self.mlp(x[tokens], bank.gate_up[expert], bank.down[expert]).float()
            out.index_add_(0, tokens, result * weights[tokens, place, None])
        return out.to(x.dtype)

    def experts_across(
        self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank, axis: Axis
    ) -> Tensor:
        """Not available."""
        raise NotImplementedError


def gather(cache: KVCache, table: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the blocks in `table` [..., B], float32 [..., B · block size, KV, D]."""
    dim = table.dim()
    keys, values = (part.flatten(dim - 1, dim) for part in dequantized(cache, table))
    return keys, values


def dequantized(cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in `blocks` [...], float32 [..., block size, KV, D]."""
    parts = []
    for stored, scales in (
        (cache.keys, cache.key_scales),
        (cache.values, cache.value_scales),
    ):
        part = stored[blocks].float()
        parts.append(part if scales is None else part * scales[blocks][..., None])
    return parts[0], parts[1]


def _quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`linear` in float32, rounded once to x's dtype."""
    if weight.activation_bits == 16:
        out = F.linear(x.float(), weight.dequantize())
    else:
        values, scales = round_rows(x, dtype=weight.values.dtype)
        # float64 holds every such sum exactly: products of float8_e4m3fn are multiples of 2⁻¹⁸
        # below 2¹⁸.
        sums = F.linear(values.double(), weight.values.double())
        out = sums.float() * (scales[:, None] * weight.scales)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
