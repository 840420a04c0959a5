"""DeepSeek-MoE-16B's layers at full size on tensors without memory, for layouts of 8 and 16 ranks.

Each operator checks its own arguments, shapes, dtypes and devices.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import Parameter, cache_bytes_per_token, cache_heads, place
from moespan.checkpoint.presets import preset
from moespan.checkpoint.rounding import QuantizedWeight
from moespan.config import Layout, ModelConfig, all_layouts
from moespan.model.network import Model
from moespan.ops import AttentionBatch, Ops, Weight, ops_for
from moespan.ops.npu.integers import IntegerMatrix
from moespan.parallel.dispatch import Dispatch
from moespan.parallel.mesh import Axis, Mesh
from moespan.parallel.tokens import split_evenly, tp_group_tokens
from tests import tiers

NPU = torch.device("npu", 0)
# The width of the whole model, with one dense layer and three with experts.
CONFIG = ModelConfig.from_dict(preset("16b-4l", {}))
ALL = [layout for world in (8, 16) for layout in all_layouts(world, CONFIG)]
CHOSEN = [
    Layout(tp=8),
    Layout(tp=8, ep=8),
    Layout(tp=4, ep=4, pp=2),
    Layout(tp=2, ep=8, dp=4),
    Layout(tp=1, ep=4, sp=8),
    Layout(tp=16, ep=16),
    Layout(tp=8, ep=2, pp=2),
    Layout(tp=4, ep=16, sp=2, dp=2),
    Layout(tp=4, pp=4),
]
# Quantization, and the dtype of the cache.
FLOATS, INTEGERS = (None, "bfloat16"), [("int8", "int8"), ("w8a8", "int8")]
CASES: list[tuple[Layout, str | None, str]]
CASES = [(layout, *FLOATS) for layout in (ALL if tiers.ALL else CHOSEN)]
CASES += [(layout, *kind) for layout in (ALL if tiers.ALL else CHOSEN[1:4]) for kind in INTEGERS]
BLOCK, BLOCKS = 128, 600


class Shapes(Axis):
    """An axis that sends nothing and returns tensors of the right shape."""

    def all_reduce(self, x: Tensor, module: str) -> Tensor:
        return x

    def all_gather(self, x: Tensor, module: str) -> Tensor:
        return x.new_empty((self.size * len(x), *x.shape[1:]))

    def reduce_scatter(self, x: Tensor, module: str) -> Tensor:
        assert len(x) % self.size == 0
        return x.new_empty((len(x) // self.size, *x.shape[1:]))

    def all_to_all(
        self, x: Tensor, send_rows: list[int], receive_rows: list[int], module: str
    ) -> Tensor:
        assert sum(send_rows) == len(x)
        return x.new_empty((sum(receive_rows), *x.shape[1:]))


def mesh_of(layout: Layout, rank: int) -> Mesh:
    mesh = Mesh(layout, rank, NPU)
    at = mesh.at
    places = {"tp": at.tp, "sp": at.sp, "pp": at.pp, "ep": 0, "ep_tp_groups": 0}
    sizes = {**layout.sizes, "ep_tp_groups": layout.ep_tp_groups}
    for name, place_ in places.items():
        setattr(mesh, name, Shapes(name, range(sizes[name]), place_))
    return mesh


def make_weight(ops: Ops, name: str, parameter: Parameter) -> Weight:
    if parameter.scheme is None:
        dtype = getattr(torch, parameter.dtype or "bfloat16")
        return ops.prepare(name, torch.empty(parameter.shape, dtype=dtype, device=NPU))
    values = torch.empty(parameter.shape, dtype=torch.int8, device=NPU)
    scales = torch.empty(parameter.shape[:-1], device=NPU)
    return ops.prepare(name, QuantizedWeight(values, scales, parameter.scheme.activation_bits))


def num_bytes(weight: Weight) -> int:
    parts = [weight.values, weight.scales] if isinstance(weight, IntegerMatrix) else [weight]
    return sum(part.numel() * part.element_size() for part in parts)


def kinds(layout: Layout) -> list[int]:
    """One rank for each set of parameter names and shapes, and for more or fewer tokens."""
    found: dict[Any, int] = {}
    for rank in range(layout.world_size):
        shapes = tuple((n, p.shape) for n, p in place(CONFIG, layout, rank).parameters.items())
        found.setdefault((shapes, layout.coordinates(rank).sp in (0, layout.sp - 1)), rank)
    return list(found.values())


def make_batch(query_len: int, num_sequences: int, context_len: int) -> AttentionBatch:
    total = query_len * num_sequences
    return AttentionBatch(
        [query_len] * num_sequences,
        [context_len] * num_sequences,
        torch.zeros(num_sequences, 9, dtype=torch.int32, device=NPU),
        torch.zeros(total, dtype=torch.int32, device=NPU),
        torch.zeros(total, dtype=torch.int32, device=NPU),
        torch.zeros(num_sequences, dtype=torch.int32, device=NPU),
    )


def test_the_chosen_layouts_are_layouts():
    assert all(layout in ALL for layout in CHOSEN)


@pytest.mark.parametrize(("layout", "quantization", "cache_dtype"), CASES, ids=str)
def test_a_decode_and_a_prefill_step(layout: Layout, quantization: str | None, cache_dtype: str):
    experts = ExpertPlacement.make("contiguous", CONFIG, layout)
    for rank in kinds(layout):
        ops, placement = ops_for("npu"), place(CONFIG, layout, rank, quantization=quantization)
        mesh = mesh_of(layout, rank)
        with FakeTensorMode(), torch.inference_mode():
            weights = {
                name: make_weight(ops, name, parameter)
                for name, parameter in placement.parameters.items()
            }
            held = sum(map(num_bytes, weights.values()))
            assert held == placement.num_bytes("bfloat16")
            dispatch = Dispatch(CONFIG, mesh, layout.dispatches[0], 2)
            model = Model(CONFIG, ops, mesh, weights, 4096, dispatch, experts)
            shape = (BLOCKS, BLOCK, cache_heads(CONFIG, layout, rank), CONFIG.head_dim)
            caches = [ops.new_cache(shape, getattr(torch, cache_dtype), NPU) for _ in model.layers]
            cached = sum(num_bytes(part) for cache in caches for part in cache.tensors)
            token_bytes = cache_bytes_per_token(CONFIG, layout, rank, cache_dtype)
            assert cached == BLOCKS * BLOCK * token_bytes
            for batch in (make_batch(1, 64, 1000), make_batch(1, 1, 0), make_batch(1000, 2, 24)):
                total = len(batch.positions)
                lengths = split_evenly(total, layout.sp)
                mine = lengths[mesh.at.sp]
                dispatch.begin_step(tp_group_tokens(layout, rank, [total] * layout.dp))
                inputs = (
                    torch.zeros(total, dtype=torch.int32, device=NPU)
                    if mesh.is_first_stage
                    else torch.zeros(mine, CONFIG.hidden_size, dtype=torch.bfloat16, device=NPU)
                )
                rows = torch.zeros(len(batch.query_lens), dtype=torch.int32, device=NPU)
                out = model(inputs, caches, batch, rows)
                assert out.device == NPU
                if not mesh.is_last_stage:
                    assert (out.shape, out.dtype) == ((mine, CONFIG.hidden_size), torch.bfloat16)
                elif mesh.at.sp == 0:
                    expected = (len(batch.query_lens), CONFIG.vocab_size)
                    assert (out.shape, out.dtype) == (expected, torch.bfloat16)
