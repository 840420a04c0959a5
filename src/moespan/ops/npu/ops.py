"""The operations on Ascend NPUs, through the fused operators of torch_npu.

- Calls name every argument whose default changed between releases of torch_npu. Features that only
  some releases have are looked up in the operator's schema, never by version.
- Attention (`npu_fused_infer_attention_score`) takes 16-bit types and heads of 128. Everything else
  runs in plain torch, with one notice. So does float32, which serves to compare with a reference.
- Norms round once, after scaling; the reference rounds before scaling too. Cosines and sines have
  the activations' dtype. Outputs of experts are rounded to that dtype, then weighted and summed in
  float32. All of this is within the rounding of the 16-bit types.
- Matrices of integers use the operators that `moespan.ops.npu.integers` lists. For float32, which
  again serves to compare, they are dequantised first.
- Only sequences of one query token attend to an int8 cache in place. The kernel takes no int8 cache
  for longer queries, so the blocks that these read are dequantised first.
- Nothing waits for the device.
- No operation of a decode step runs on the AI CPU, which is slow (`docs/ascend.md` lists which
  operations do).
- Options (`EngineOptions.npu_*`) are off by default: nobody has measured them for this model.

An Ascend 310P has no bfloat16 and takes no integers; both are refused. It lacks the operators of
attention, cache and router, and uses plain torch for them.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moespan.checkpoint.rounding import QuantizedWeight, round_rows
from moespan.config import EngineOptions
from moespan.errors import ConfigError
from moespan.log import once
from moespan.memory import zeros
from moespan.ops.base import AttentionBatch, ExpertBank, KVCache, Replay, Rotation, Weight
from moespan.ops.npu.integers import IntegerMatrix
from moespan.ops.reference import ReferenceOps, dequantized, gather
from moespan.parallel.mesh import Axis

_ATTENTION_DTYPES = (torch.float16, torch.bfloat16)
_ATTENTION_HEAD_SIZE = 128
_ROTARY_HEAD_SIZES = (64, 128)
# The attention kernel takes a corner of 2048 × 2048 of the causal mask, for any lengths.
_MASK_SIZE = 2048
# Block sizes of the attention kernel, (multiple, most): for 16-bit types, and for integers.
_FLOAT_BLOCKS, _INTEGER_BLOCKS = (16, 1024), (32, 512)
# Mode of the kernel's scales: one for each token and head, in blocks like the cache.
_PER_TOKEN_AND_HEAD = 5
# Most bytes of blocks that are dequantised at a time.
_GATHER_BYTES = 64 << 20
# Part of a device's name → chip.
_CHIPS = {"910B": "910B", "910_93": "910C", "310P": "310P"}
_FRACTAL_NZ = 29
# Parameters that stay in rows: they are looked up, added, multiplied elementwise, or float32.
_NEVER_TILED = ("embed", "norm", "router", "bias")


class NpuOps(ReferenceOps):
    """See `moespan.ops.base.Ops` for what each operation promises."""

    has_graphs = True

    def __init__(self, soc: str | None = None, options: EngineOptions | None = None) -> None:
        """Choose the operators that `soc` has.

        Args:
            soc: name of the system on chip; None asks the device.
            options: those named `npu_*` count; None for their defaults.
        """
        import torch_npu  # type: ignore[import-not-found,unused-ignore]

        self._npu: Any = torch_npu
        self._soc = soc or str(torch_npu.npu.get_device_name())
        self.chip = next((chip for name, chip in _CHIPS.items() if name in self._soc), "")
        self._is_310p = self.chip == "310P"
        self.quantizations = () if self._is_310p else ("int8", "w8a8")
        self.has_int8_cache = not self._is_310p
        self._options = options or EngineOptions()
        self._is_tiled = self._options.npu_weight_format == "nz"
        if self._is_tiled:
            torch_npu.npu.config.allow_internal_format = True
        # A 310P gives running sums of the experts' rows instead of counts, in any mode.
        self._counts_are_ends = self._is_310p
        self._has_cache_write = _takes_cache_mode() and not self._is_310p
        # Recorded graphs hold the addresses of these constants, so they are never freed.
        self._masks: dict[torch.device, Tensor] = {}
        self.has_second_stream = self._options.npu_overlap_shared
        self._second_stream: Any = None
        # Graphs never run at the same time, so they share memory.
        self._graph_pool: Any = None

    def prepare(self, name: str, weight: Tensor | QuantizedWeight) -> Weight:
        """Matrices of experts as [E, in, out], which grouped matmuls read; other parameters
        unchanged. With `nz` all matrices are in tiles."""
        if isinstance(weight, QuantizedWeight):
            return self._prepare_integers(name, weight)
        if self._is_310p and weight.dtype == torch.bfloat16:
            raise ConfigError(f"{self._soc} has no bfloat16; use --dtype float16")
        if ".experts." in name:
            weight = weight.transpose(1, 2).contiguous()
        if not self._is_tiled or any(part in name for part in _NEVER_TILED):
            return weight
        return self._in_tiles(name, weight)

    def new_cache(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """As `KVCache.zeros`, with scales of int8 in the memory order of the attention kernel."""
        cache = super().new_cache(shape, dtype, device)
        if not cache.is_quantized:
            return cache
        num_blocks, block_size, num_heads, _ = shape
        key_scales, value_scales = (
            zeros((num_blocks, num_heads, block_size), torch.float32, device).transpose(1, 2)
            for _ in range(2)
        )
        return replace(cache, key_scales=key_scales, value_scales=value_scales)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """[T, in], [out, in] → [T, out]."""
        if isinstance(weight, IntegerMatrix):
            return weight.times(self._npu, x, bias)
        return super().linear(x, weight, bias)

    def linear_sum(self, x: Tensor, weight: Weight, axis: Axis, module: str) -> Tensor:
        """[T, in], [out, in] → [T, out], replicated over `axis`."""
        if not self._is_fused(x, axis):
            return super().linear_sum(x, weight, axis, module)
        return self._matmul_all_reduce(x, weight, axis, module)

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
        if not self._is_fused(x, axis):
            return super().mlp_sum(x, gate_up, down, axis, module, plus)
        hidden = self.swiglu(self.linear(x, gate_up))
        return self._matmul_all_reduce(hidden, down, axis, module, plus)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]."""
        if not x.numel():
            return super().rms_norm(x, weight, eps)
        normed: Tensor = self._npu.npu_rms_norm(x, weight, eps)[0]
        return normed

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        if not x.numel():
            return super().add_rms_norm(x, residual, weight, eps)
        normed, _, total = self._npu.npu_add_rms_norm(x, residual, weight, eps)
        return normed, total

    def rotary_table(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """float32 [P, D/2] twice → [P, 1, D] twice in `dtype`, if the kernel takes D; else
        unchanged."""
        if 2 * cos.shape[-1] not in _ROTARY_HEAD_SIZES:
            return cos, sin
        whole = (torch.cat([half, half], -1)[:, None].to(dtype) for half in (cos, sin))
        return next(whole), next(whole)

    def rope(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N + 2·KV, D] → q [T, N, D], k and v [T, KV, D], all contiguous."""
        if qkv.shape[-1] not in _ROTARY_HEAD_SIZES:
            q, k, v = super().rope(qkv, rotation)
            return q.contiguous(), k.contiguous(), v.contiguous()
        num_heads, num_kv_heads = rotation.num_heads, rotation.num_kv_heads
        # The kernel writes into q and k, although its schema does not say so.
        if num_heads == num_kv_heads:
            q, k, v = qkv.unflatten(1, (3, num_heads)).transpose(0, 1).contiguous()
        else:
            parts = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
            q, k, v = (part.contiguous() for part in parts)
        if not qkv.numel():
            return q, k, v
        q, k = self._npu.npu_apply_rotary_pos_emb(
            q, k, rotation.cos, rotation.sin, layout="TND", rotary_mode="half"
        )
        return q, k, v

    def write_cache(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Store [T, KV, D] at `slots`."""
        if not k.numel():
            return
        if cache.key_scales is not None and cache.value_scales is not None:
            at = slots // cache.block_size, slots % cache.block_size
            k, cache.key_scales[at] = self._round_rows(k)
            v, cache.value_scales[at] = self._round_rows(v)
        if not self._has_cache_write or cache.keys.dtype == torch.float32:
            for rows, target in ((k, cache.keys), (v, cache.values)):
                target.flatten(0, 1)[slots] = rows
            return
        if 0 < self._options.npu_scatter_prefill <= len(k):
            for rows, target in ((k, cache.keys), (v, cache.values)):
                self._npu.npu_scatter_nd_update_(target.flatten(0, 1), slots[:, None], rows)
            return
        self._npu.npu_scatter_pa_kv_cache(
            k.contiguous(), v.contiguous(), cache.keys, cache.values, slots, cache_mode="Norm"
        )

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
        """[T, N, D] → [T, N, D]."""
        if not q.numel():
            return q
        if not self._has_attention(q, cache):
            if batch.is_decode:
                return plain_decode(q, cache, batch, scale)
            return super().attention(q, cache, batch, scale)
        if cache.is_quantized:
            return self._attention_over_integers(q, cache, batch, scale)
        tables = batch.block_tables
        is_masked = not (batch.is_decode and self._options.npu_maskless_decode)
        return self._attend(q, cache, tables, batch.query_ends, batch.total_lens, scale, is_masked)

    def swiglu(self, x: Tensor) -> Tensor:
        """[T, 2·I] → [T, I]."""
        if not x.numel():
            return super().swiglu(x)
        out: Tensor = self._npu.npu_swiglu(x, dim=-1)
        return out

    def route(
        self, x: Tensor, router: Tensor, num_chosen: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """[T, H] → float32 [T, K], int32 [T, K]."""
        if not x.numel() or self._is_310p:
            return super().route(x, router, num_chosen, renormalize)
        logits = self.linear(x.float(), router)
        weights, chosen, _ = self._npu.npu_moe_gating_top_k_softmax(logits, None, num_chosen)
        if renormalize and num_chosen > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights, chosen

    def experts(self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank) -> Tensor:
        """[T, H] → [T, H]."""
        if not x.numel():
            return x
        gate_up, down, num_held = bank.gate_up, bank.down, len(bank.gate_up)
        is_whole = num_held == bank.num_physical
        rounds = _rounds(gate_up, x)
        rows, row_of, sizes, row_scales = self._npu.npu_moe_init_routing_v2(
            x,
            physical_ids.int(),
            active_num=physical_ids.numel(),
            expert_num=bank.num_physical + (not is_whole),  # and the padding value
            drop_pad_mode=0,
            expert_tokens_num_type=0 if self._counts_are_ends else 1,
            expert_tokens_num_flag=True,
            quant_mode=1 if rounds else -1,
            active_expert_range=[bank.first, bank.first + num_held],
            row_idx_type=0,
        )
        if rounds:
            results = self._rounded_mlp_of_each(rows, row_scales, gate_up, down, sizes, x.dtype)
        else:
            results = self._mlp_of_each(rows, gate_up, down, sizes)
        if not is_whole:
            # Rows after those of this rank hold whatever was in memory. Pairs of other ranks have
            # index -1, which becomes the last row; no other row after this rank's is read. If there
            # is such a pair, the last row is not this rank's, and is set to zero. CANN's page says
            # that indices are distinct, but the kernel only reads the rows that they name.
            num_rows = sizes[-1] if self._counts_are_ends else sizes.sum()
            results[-1:].masked_fill_(num_rows < len(rows), 0)
            row_of = row_of.remainder(len(rows))  # -1 → the last
        out: Tensor = self._npu.npu_moe_token_unpermute(results, row_of, weights)
        return out

    def experts_across(
        self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank, axis: Axis
    ) -> Tensor:
        """[T, H] → [T, H], the same T on all ranks of `axis`."""
        physical_ids = physical_ids.int()
        sent_bytes = physical_ids.numel() * x.shape[1] * x.element_size()
        # A2 demands the name of an algorithm; A3's default is the one that takes what we send.
        algorithm: dict[str, Any] = {"comm_alg": "fullmesh"} if self.chip == "910B" else {}
        sent_weights: dict[str, Any] = {}
        if self._options.npu_hierarchical_dispatch:
            algorithm, sent_weights = {"comm_alg": "hierarchy"}, {"expert_scales": weights}
        group = (axis.communicator, axis.size, axis.rank, bank.num_physical)
        axis.count_in_kernel("dispatch", "moe", sent_bytes)
        rows, _, origins, sizes, received, _, scales = self._npu.npu_moe_distribute_dispatch_v2(
            x, physical_ids, *group, expert_token_nums_type=1, **algorithm, **sent_weights
        )
        gate_up, down = bank.gate_up, bank.down
        if _rounds(gate_up, x):
            rows, row_scales = self._npu.npu_dynamic_quant(rows)
            results = self._rounded_mlp_of_each(rows, row_scales, gate_up, down, sizes, x.dtype)
        else:
            results = self._mlp_of_each(rows, gate_up, down, sizes)
        axis.count_in_kernel("combine", "moe", sent_bytes)
        out: Tensor = self._npu.npu_moe_distribute_combine_v2(
            results,
            physical_ids,
            origins,
            received,
            weights,
            *group,
            expand_scales=scales,
            **algorithm,
        )
        return out

    def record(self, run: Callable[[], object]) -> Replay:
        """Record the work of `run`. A replay gives the attention kernels their new lengths."""
        if self._graph_pool is None:
            self._graph_pool = self._npu.npu.graph_pool_handle()
        return _Graph(run, self._graph_pool, self._options.npu_update_first)

    def beside(
        self, first: Callable[[], Tensor], second: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`second` on another stream, if there is one."""
        if not self.has_second_stream:
            return super().beside(first, second)
        npu = self._npu.npu
        if self._second_stream is None:
            self._second_stream = npu.Stream()
        here = npu.current_stream()
        # The waits order all uses of memory: both streams have what was written before, and neither
        # gets memory again that the other one still reads.
        self._second_stream.wait_stream(here)
        with npu.stream(self._second_stream):
            result = second()
        other = first()
        here.wait_stream(self._second_stream)
        return other, result

    def _prepare_integers(self, name: str, weight: QuantizedWeight) -> IntegerMatrix:
        matrix = IntegerMatrix.of(weight)
        if not self._is_tiled or name == "head":
            return matrix
        if not matrix.rounds:
            raise ConfigError(
                f"npu_weight_format=nz: {name} has 8-bit integers for activations of 16 bits, "
                "whose operator takes rows only; leave it out, or use --quantization w8a8 on a "
                "checkpoint of floats"
            )
        return replace(matrix, values=self._in_tiles(name, matrix.values.contiguous()))

    def _in_tiles(self, name: str, weight: Tensor) -> Tensor:
        tiled: Tensor = self._npu.npu_format_cast(weight, _FRACTAL_NZ)
        if int(self._npu.get_npu_format(tiled)) != _FRACTAL_NZ:
            raise ConfigError(
                f"npu_weight_format=nz: this torch_npu keeps {name}, {weight.dtype} "
                f"{list(weight.shape)}, in rows; leave it out"
            )
        return tiled

    def _round_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] → int8 [..., D] and float32 [...]."""
        if x.dtype == torch.float32:
            return round_rows(x)
        values, scales = self._npu.npu_dynamic_quant(x)
        return values, scales

    def _has_attention(self, q: Tensor, cache: KVCache) -> bool:
        """Whether the attention kernel takes q and the cache; if not, says so once."""
        step, most = _INTEGER_BLOCKS if cache.is_quantized else _FLOAT_BLOCKS
        if (
            q.dtype in _ATTENTION_DTYPES
            and q.shape[-1] == _ATTENTION_HEAD_SIZE
            and cache.block_size % step == 0
            and cache.block_size <= most
            and not self._is_310p
        ):
            return True
        once(
            f"attention runs in plain torch, which is slow: the kernel takes float16 and bfloat16, "
            f"heads of 128 and blocks of {step} to {most} tokens in steps of {step}, on A2 and A3, "
            f"not {q.dtype}, heads of {q.shape[-1]} and blocks of {cache.block_size} on {self._soc}"
        )
        return False

    def _attend(
        self,
        q: Tensor,
        cache: KVCache,
        tables: Tensor,
        query_ends: list[int],
        total_lens: list[int],
        scale: float,
        is_masked: bool = True,
    ) -> Tensor:
        """Attention of q [T, N, D] over a cache of q's dtype → [T, N, D].

        A single query token of each sequence sees all keys, and needs no mask.
        """
        mask: dict[str, Any] = {"sparse_mode": 0}
        if is_masked:
            # Causal, the last query at the last key.
            mask = {"sparse_mode": 3, "atten_mask": self._mask(q.device)}
        return self._infer_attention(
            q,
            cache,
            tables,
            total_lens,
            scale,
            input_layout="TND",
            actual_seq_lengths=query_ends,
            **mask,
        )

    def _infer_attention(
        self,
        q: Tensor,
        cache: KVCache,
        tables: Tensor,
        total_lens: list[int],
        scale: float,
        **kwargs: Any,
    ) -> Tensor:
        """The operator on a paged cache; q [..., N, D], in the order that `input_layout` names."""
        out: Tensor = self._npu.npu_fused_infer_attention_score(
            q.contiguous(),
            cache.keys.flatten(2),
            cache.values.flatten(2),
            # For a paged cache these are lengths of sequences, not running sums.
            actual_seq_lengths_kv=total_lens,
            block_table=tables,
            num_heads=q.shape[-2],
            num_key_value_heads=cache.keys.shape[2],
            scale=scale,
            block_size=cache.block_size,
            **kwargs,
        )[0]
        return out

    def _attention_over_integers(
        self, q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """[T, N, D] → [T, N, D]: sequences of one query token read the int8 cache in place; for
        others the blocks that they read are dequantised."""
        block_bytes = 2 * cache.keys[0].numel() * q.element_size()
        outs, row = [], 0
        for run, width in _runs(batch, cache.block_size, _GATHER_BYTES // block_bytes):
            ends = list(accumulate(batch.query_lens[run]))
            queries = q[row : row + ends[-1]]
            row += ends[-1]
            tables, total_lens = batch.block_tables[run], batch.total_lens[run]
            if ends[-1] == len(ends):
                outs.append(self._decode_integers(queries, cache, tables, total_lens, scale))
            else:
                floats, float_tables = _dequantized_blocks(cache, tables[:, :width], q.dtype)
                outs.append(self._attend(queries, floats, float_tables, ends, total_lens, scale))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _decode_integers(
        self, q: Tensor, cache: KVCache, tables: Tensor, total_lens: list[int], scale: float
    ) -> Tensor:
        """One token of each sequence, [S, N, D] → [S, N, D], over an int8 cache."""
        assert cache.key_scales is not None and cache.value_scales is not None
        return self._infer_attention(
            q[:, None],
            cache,
            tables,
            total_lens,
            scale,
            input_layout="BSND",
            # No copy: `new_cache` lays the scales out in this order.
            key_antiquant_scale=cache.key_scales.transpose(1, 2).contiguous(),
            value_antiquant_scale=cache.value_scales.transpose(1, 2).contiguous(),
            key_antiquant_mode=_PER_TOKEN_AND_HEAD,
            value_antiquant_mode=_PER_TOKEN_AND_HEAD,
        )[:, 0]

    def _is_fused(self, x: Tensor, axis: Axis) -> bool:
        """Whether one operator does the matmul of x and its all-reduce over `axis`.

        The operator is for prefill; `moespan.parallel.fused` states its other limits.
        """
        return axis.size > 1 and 0 < self._options.npu_fused_all_reduce <= len(x)

    def _matmul_all_reduce(
        self, x: Tensor, weight: Tensor, axis: Axis, module: str, plus: Tensor | None = None
    ) -> Tensor:
        """Σ over `axis` of x·Wᵀ + plus: x [T, in], W [out, in], plus [T, out] → [T, out]."""
        sent_bytes = len(x) * len(weight) * x.element_size()
        axis.count_in_kernel("all_reduce", module, sent_bytes)
        out: Tensor = self._npu.npu_mm_all_reduce_base(
            x, weight.t(), axis.communicator, reduce_op="sum", x3=plus
        )
        return out

    def _mlp_of_each(self, rows: Tensor, gate_up: Weight, down: Weight, sizes: Tensor) -> Tensor:
        """Rows [R, H] sorted by expert → [R, H]. `sizes` has the rows of each expert; rows after
        them are not set."""
        hidden = self.swiglu(self._product_of_each(rows, gate_up, sizes))
        return self._product_of_each(hidden, down, sizes)

    def _rounded_mlp_of_each(
        self,
        rows: Tensor,
        row_scales: Tensor,
        gate_up: IntegerMatrix,
        down: IntegerMatrix,
        sizes: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """`_mlp_of_each` of int8 rows [R, H] with scales float32 [R] → [R, H] of `dtype`."""
        if gate_up.has_swiglu:
            sums = self._grouped_matmul(rows, gate_up.values, sizes, output_dtype=torch.int32)
            hidden, hidden_scales = self._npu.npu_dequant_swiglu_quant(
                sums,
                weight_scale=gate_up.scales,
                activation_scale=row_scales[:, None],
                group_index=sizes,
                activate_left=True,
                quant_mode=1,  # a new scale for each row
            )
        else:
            kwargs = gate_up.kwargs_for_integers(row_scales, dtype)
            gated = self.swiglu(self._grouped_matmul(rows, gate_up.values, sizes, **kwargs))
            hidden, hidden_scales = self._npu.npu_dynamic_quant(gated)
        kwargs = down.kwargs_for_integers(hidden_scales, dtype)
        return self._grouped_matmul(hidden, down.values, sizes, **kwargs)

    def _product_of_each(self, x: Tensor, weight: Weight, sizes: Tensor) -> Tensor:
        """Rows sorted by expert [R, in], [E, in, out] → [R, out] of x's dtype."""
        if not isinstance(weight, IntegerMatrix):
            return self._grouped_matmul(x, weight, sizes)
        if x.dtype == torch.float32:
            x, matrices = weight.in_float32(x)
            return self._grouped_matmul(x, matrices, sizes)
        return self._grouped_matmul(x, weight.values, sizes, **weight.kwargs_for_floats(x.dtype))

    def _grouped_matmul(self, x: Tensor, weight: Tensor, sizes: Tensor, **kwargs: Any) -> Tensor:
        """Rows sorted by expert [R, in], [E, in, out] → [R, out]; rows after those in `sizes` are
        not set."""
        (out,) = self._npu.npu_grouped_matmul(
            [x],
            [weight],
            group_list=sizes,
            # The operator takes no list of one count. One count is also the end of its group.
            group_list_type=0 if self._counts_are_ends or len(sizes) == 1 else 1,
            group_type=0,
            split_item=2,
            **kwargs,
        )
        result: Tensor = out
        return result

    def _mask(self, device: torch.device) -> Tensor:
        """int8 [2048, 2048], 1 where a key is hidden."""
        if device not in self._masks:
            ones = torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.int8)
            self._masks[device] = ones.triu(1).to(device)
        return self._masks[device]


class _Graph:
    """A recorded NPU graph. It holds lengths as integers of the host, and torch_npu updates them in
    the recorded attention calls for each replay.

    In a replay each attention call waits for an event that its own update records. So updates are
    made while the graph already runs: only that of the first layer is waited for.
    """

    def __init__(self, run: Callable[[], object], pool: Any, update_first: bool = False) -> None:
        npu: Any = torch.get_device_module("npu")
        if "auto_dispatch_capture" not in inspect.signature(npu.graph.__init__).parameters:
            raise RuntimeError("this torch_npu cannot update the lengths of recorded attention")
        self._graph = npu.NPUGraph()
        self._done = npu.Event()
        self._update_first = update_first
        stream = npu.current_stream()
        # The graph of a discarded engine must not be collected while this one is recorded.
        gc.collect()
        gc.disable()
        try:
            with npu.graph(self._graph, pool=pool, auto_dispatch_capture=True):
                run()
        except Exception as error:
            # If ending the capture fails too, torch_npu leaves its mode and its stream in place.
            mode = self._graph.graph_dispatch_mode
            if mode in _get_current_dispatch_mode_stack():
                mode.__exit__(None, None, None)
            npu.set_stream(stream)
            raise _first_cause(error) from None
        finally:
            gc.enable()

    def __call__(self, total_lens: list[int]) -> None:
        """Replay with new lengths.

        Raises:
            RuntimeError: the lengths could not be updated. The replay has computed with old ones,
                so this rank must end.
        """
        # The lengths must not change while the previous replay runs. It has usually finished by
        # now: its result, or a result that depends on it, has been read.
        self._done.synchronize()
        if self._update_first:
            self._update(total_lens)
            self._graph.replay()
        else:
            self._graph.replay()
            try:
                self._update(total_lens)
            except Exception as error:
                self._release()
                raise RuntimeError(
                    f"a running decode step did not get its lengths: {error}; start again with "
                    "--enforce-eager or --npu-update-first"
                ) from error
        self._done.record()

    def _update(self, total_lens: list[int]) -> None:
        self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": total_lens}])

    def _release(self) -> None:
        """Record all events that the replay waits for, so that nothing waits for it for ever."""
        mode = self._graph.graph_dispatch_mode
        with contextlib.suppress(Exception):  # the device may be lost
            for record in mode.graph_dispatch_records:
                record.event.record(mode.update_stream)


def _takes_cache_mode() -> bool:
    """Whether this torch_npu lets the caller name the layout of the cache. Where it does not,
    `npu_scatter_pa_kv_cache` demands a layout (`PA_NZ`) that attention does not read."""
    return "cache_mode" in str(torch.ops.npu.npu_scatter_pa_kv_cache.default._schema)


def _first_cause(error: BaseException) -> BaseException:
    """The error that was raised first, of those raised while another one was handled."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _rounds(gate_up: Weight, x: Tensor) -> bool:
    """Whether operators round x to 8 bits for the experts."""
    return isinstance(gate_up, IntegerMatrix) and gate_up.rounds and x.dtype != torch.float32


def _runs(batch: AttentionBatch, block_size: int, most_blocks: int) -> Iterator[tuple[slice, int]]:
    """Consecutive sequences that are attended together, and the blocks of the longest of them.

    A run has either sequences of one query token only, or of several only. Of the latter it has as
    many as have `most_blocks` blocks together, but at least one.
    """
    first = 0
    for is_one, group in groupby(batch.query_lens, lambda length: length == 1):
        last = first + len(list(group))
        width = -(-max(batch.total_lens[first:last]) // block_size)
        most = last - first if is_one else max(most_blocks // width, 1)
        for start in range(first, last, most):
            yield slice(start, min(start + most, last)), width
        first = last


def _dequantized_blocks(
    cache: KVCache, tables: Tensor, dtype: torch.dtype
) -> tuple[KVCache, Tensor]:
    """A cache of `dtype` with the blocks in `tables` [S, W] of an int8 cache, and its tables."""
    blocks = tables.flatten()
    keys, values = (part.to(dtype) for part in dequantized(cache, blocks))
    places = torch.arange(len(blocks), dtype=torch.int32, device=blocks.device)
    return KVCache(keys, values), places.view(tables.shape)


def plain_decode(q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
    """One token of each sequence, [S, N, D] → [S, N, D]; reads lengths on the device only."""
    num_sequences, num_heads, head_size = q.shape
    num_kv_heads = cache.keys.shape[2]
    k, v = (part.transpose(1, 2) for part in gather(cache, batch.block_tables))
    # [S, KV, length, D]
    grouped = q.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_size)
    scores = torch.matmul(grouped.float(), k.transpose(2, 3)) * scale
    places = torch.arange(k.shape[2], device=q.device, dtype=torch.int32)
    hidden = (places >= batch.lengths[:, None])[:, None, None]
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    # Memory past the end of a sequence may hold NaN, and NaN times weight 0 would be NaN.
    values = v.masked_fill(hidden.transpose(2, 3), 0)
    return torch.matmul(probabilities, values).to(q.dtype).view_as(q)
