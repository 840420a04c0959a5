"""The operations on CUDA GPUs: Triton kernels, and cuBLAS for single dense products.

- No operation waits for the device or reads a number from it, and launches depend on shapes alone.
  A decode step can therefore be recorded as one CUDA graph. Lengths, tables and slots are read on
  the device, so that a replay needs nothing from the host.
- Sums have a fixed order: a batch gives the same results in every run. Results do depend, within
  rounding, on the number of tokens, because kernels for few and for many tokens differ.
- Weights may be `QuantizedWeight`s in the layout of the checkpoint, and caches may be int8. 8-bit
  floats serve for weights and activations, on cards whose tensor cores take them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moespan.checkpoint.rounding import QuantizedWeight
from moespan.ops.base import AttentionBatch, ExpertBank, KVCache, Replay, Rotation, Weight
from moespan.ops.cuda import attention, matmul, routing, rows
from moespan.ops.cuda.matmul import Matrix
from moespan.ops.reference import ReferenceOps
from moespan.parallel.mesh import Axis

# First compute capability with instructions for float8_e4m3fn (PTX ISA, `cvt` and `mma`).
_FLOAT8_CAPABILITY = (8, 9)


class CudaOps(ReferenceOps):
    """See `moespan.ops.base.Ops` for what each operation promises."""

    has_graphs = True

    def __init__(self) -> None:
        self.quantizations = ("int8", "w8a8", "fp8")
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < _FLOAT8_CAPABILITY:
            self.quantizations = ("int8", "w8a8")
        # The tiles of the current step, shared by its layers.
        self._tiles: attention.StepTiles | None = None
        # Graphs never run at the same time, so they share memory.
        self._graph_pool: Any = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]."""
        return rows.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return rows.add_rms_norm(x, residual, weight, eps)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """[T, in], [out, in] → [T, out]; through cuBLAS unless the weight is quantised."""
        if not isinstance(weight, QuantizedWeight):
            return F.linear(x, weight, bias)
        onto = None if bias is None else bias.expand(len(x), -1).contiguous()
        return matmul.linear(x, Matrix.of(weight), onto)

    def rope(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N + 2·KV, D] → q [T, N, D], k and v [T, KV, D], as views of qkv."""
        return rows.rope(qkv, rotation)

    def write_cache(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Store [T, KV, D] at `slots`."""
        rows.write_cache(k, v, cache, slots)

    def rope_to_cache(
        self, qkv: Tensor, rotation: Rotation, cache: KVCache, slots: Tensor
    ) -> Tensor:
        """[T, N + 2·KV, D] → q [T, N, D], a view of qkv; one kernel rotates and fills the cache."""
        return rows.rope(qkv, rotation, cache, slots)[0]

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
        """[T, N, D] → [T, N, D]: prompts in tiles of queries, decodes split over their keys."""
        if not q.numel():
            return q
        if self._tiles is None or self._tiles.batch is not batch:
            block_m = attention.prompt_rows(q.shape[-1], q.dtype)
            self._tiles = attention.StepTiles(batch, q.device, block_m)
        return attention.attention(q, cache, batch, self._tiles, scale)

    def swiglu(self, x: Tensor) -> Tensor:
        """[T, 2·I] → [T, I]."""
        return rows.swiglu(x)

    def mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        """[T, H] → [T, H]."""
        return self._mlp(x, gate_up, down, None)

    def mlp_sum(
        self,
        x: Tensor,
        gate_up: Weight,
        down: Weight,
        axis: Axis,
        module: str,
        plus: Tensor | None = None,
    ) -> Tensor:
        """[T, H] → [T, H], replicated over `axis`; the last product also adds `plus`."""
        return axis.all_reduce(self._mlp(x, gate_up, down, plus), module)

    def route(
        self, x: Tensor, router: Tensor, num_chosen: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """[T, H] → float32 [T, K], int32 [T, K]."""
        return routing.route(x, router, num_chosen, renormalize)

    def experts(self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank) -> Tensor:
        """[T, H] → [T, H]."""
        return matmul.experts(x, weights, physical_ids, bank)

    def record(self, run: Callable[[], object]) -> Replay:
        """Record the work of `run`, which reads all lengths on the device."""
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The graph of a discarded engine must not be collected while this one is recorded.
        gc.collect()
        gc.disable()
        try:
            # Work of other threads, such as the NCCL watchdog, is not recorded.
            with torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"):
                run()
        finally:
            gc.enable()

        def replay(total_lens: list[int]) -> None:
            graph.replay()

        return replay

    def _mlp(self, x: Tensor, gate_up: Weight, down: Weight, onto: Tensor | None) -> Tensor:
        is_quantized = isinstance(gate_up, QuantizedWeight)
        if is_quantized or len(x) <= matmul.FEW_TOKENS:
            return matmul.mlp(x, Matrix.of(gate_up), Matrix.of(down), onto)
        hidden = rows.swiglu(F.linear(x, gate_up))
        return F.linear(hidden, down) if onto is None else onto.addmm_(hidden, down.t())
