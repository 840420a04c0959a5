"""NPU operations compute what the reference computes."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from moespan.checkpoint.rounding import QuantizedWeight
from moespan.errors import ConfigError
from moespan.ops import ExpertBank, KVCache, Ops, ops_for
from moespan.ops.npu.ops import NpuOps
from tests.ops.contract import (
    DTYPES,
    KINDS,
    REFERENCE,
    OpsContract,
    QuantizedContract,
    assert_close,
    make_batch,
)


class TestNpuOps(OpsContract):
    device = torch.device("npu", 0)
    block_size = 16

    @pytest.fixture
    def ops(self) -> Ops:
        return ops_for("npu")


class TestNpuOpsOfIntegers(QuantizedContract):
    device = torch.device("npu", 0)
    block_size = 32
    kinds: ClassVar = ("int8", "w8a8")

    def assert_close(self, ours: Tensor, theirs: Tensor, dtype: torch.dtype, kind: str) -> None:
        # Swiglu is rounded once here or not at all; the reference rounds twice.
        is_rounded = kind == "w8a8" and dtype == torch.float16
        assert_close(ours, theirs, dtype, 1e-2 if is_rounded else KINDS[kind].flip)

    @pytest.fixture
    def ops(self) -> Ops:
        return ops_for("npu")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["int8", "w8a8"])
    @pytest.mark.parametrize("hidden", [64, 88])
    def test_experts_whose_width_the_fused_swiglu_takes_and_others(
        self, ops: Ops, hidden: int, kind: str, dtype: torch.dtype
    ):
        x = self.random(9, 128, dtype=dtype)
        weights, physical_ids = self.random(9, 8).softmax(-1).topk(3)
        gate_up = self.quantized(self.random(4, 2 * hidden, 128) / 8, kind)
        down = self.quantized(self.random(4, 128, hidden) / 8, kind)
        bank = ExpertBank(gate_up, down, 2, 8)
        expected = REFERENCE.experts(x, weights, physical_ids, bank)
        matrices = self.prepared_quantized(ops, "layers.0.mlp.experts", gate_up=gate_up, down=down)
        found = ops.experts(
            *self.to(x, weights, physical_ids), ExpertBank(matrices[0], matrices[1], 2, 8)
        )
        self.assert_close(found, expected, dtype, kind)

    @pytest.mark.parametrize("kind", ["int8", "w8a8"])
    def test_a_head_of_more_columns_than_operators_take(self, ops: Ops, kind: str):
        x = self.random(2, 8, dtype=torch.bfloat16)
        weight, bias = self.quantized(self.random(65540, 8), kind), self.random(65540).bfloat16()
        (prepared,) = self.prepared_quantized(ops, "head", weight=weight)
        found = ops.linear(*self.to(x), prepared, *self.to(bias))
        expected = REFERENCE.linear(x, weight, bias)
        self.assert_close(found, expected, torch.bfloat16, kind)

    def test_scales_of_the_cache_lie_as_attention_reads_them(self, ops: Ops):
        cache = ops.new_cache((3, self.block_size, 2, 128), torch.int8, self.device)
        for scales in (cache.key_scales, cache.value_scales):
            assert scales is not None
            assert scales.shape == (3, self.block_size, 2)
            assert scales.transpose(1, 2).is_contiguous()
        floats = ops.new_cache((3, self.block_size, 2, 128), torch.bfloat16, self.device)
        assert len(floats.tensors) == 2

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("gather_bytes", [64 << 20, 1])
    def test_a_cache_of_new_cache_in_mixed_steps(
        self,
        ops: Ops,
        monkeypatch: pytest.MonkeyPatch,
        gather_bytes: int,
        dtype: torch.dtype,
    ):
        monkeypatch.setattr("moespan.ops.npu.ops._GATHER_BYTES", gather_bytes)
        query_lens, context_lens = [1, 1, 5, 40, 1, 3], [0, 70, 0, 9, 33, 64]
        batch, num_blocks = make_batch(query_lens, context_lens, self.block_size, self.device)
        cpu = torch.device("cpu")
        at_home, _ = make_batch(query_lens, context_lens, self.block_size, cpu)
        for head_size in self.head_sizes:
            shape = (num_blocks, self.block_size, 2, head_size)
            ours = ops.new_cache(shape, torch.int8, self.device)
            theirs = KVCache.zeros(shape, torch.int8, cpu)
            q, k, v = (
                self.random(51, heads, head_size, dtype=dtype, seed=seed)
                for seed, heads in enumerate((4, 2, 2))
            )
            ops.write_cache(*self.to(k, v), ours, batch.slots)
            REFERENCE.write_cache(k, v, theirs, at_home.slots)
            for our_part, part in zip(ours.tensors[2:], theirs.tensors[2:], strict=True):
                torch.testing.assert_close(our_part.cpu(), part)
            found = ops.attention(*self.to(q), ours, batch, 0.3)
            expected = REFERENCE.attention(q, theirs, at_home, 0.3)
            # Single values may be rounded to the other side.
            self.assert_close(found, expected, dtype, "w8a8")

    def test_tiles_need_activations_of_8_bits(self):
        ops = NpuOps(weight_format="nz")
        x = self.random(3, 64, dtype=torch.bfloat16)
        weight = self.quantized(self.random(32, 64), "w8a8")
        (prepared,) = self.prepared_quantized(ops, "layers.0.attention", out=weight)
        expected = REFERENCE.linear(x, weight)
        self.assert_close(ops.linear(*self.to(x), prepared), expected, x.dtype, "w8a8")
        with pytest.raises(ConfigError, match=r"attention.out .* rows only; leave it out, or use"):
            self.prepared_quantized(
                ops, "layers.0.attention", out=QuantizedWeight(weight.values, weight.scales)
            )


class TestNpuOpsOfA310P(TestNpuOps):
    """The code for a 310P, which uses fewer operators, on a device that has all of them."""

    @pytest.fixture
    def ops(self) -> Ops:
        return NpuOps("Ascend310P3")

    @pytest.fixture(autouse=True)
    def no_bfloat16(self, request: pytest.FixtureRequest) -> None:
        if getattr(request.node, "callspec", None) and torch.bfloat16 in (
            request.node.callspec.params.values()
        ):
            pytest.skip("has no bfloat16")

    def test_bfloat16_is_refused_by_name(self, ops: Ops):
        with pytest.raises(ConfigError, match="Ascend310P3 has no bfloat16; use --dtype float16"):
            ops.prepare("norm", torch.ones(2, dtype=torch.bfloat16))

    def test_integers_are_not_taken(self, ops: Ops):
        assert not ops.quantizations and not ops.has_int8_cache
        assert ops_for("npu").quantizations == ("int8", "w8a8")
