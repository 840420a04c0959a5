"""NPU operations compute what the reference computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch_npu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moespan.checkpoint.rounding import QuantizedWeight
from moespan.config import EngineOptions
from moespan.errors import ConfigError
from moespan.ops import ExpertBank, KVCache, Ops, ops_for
from moespan.ops.npu.ops import NpuOps
from tests.ascend.inside.layer import needs_cache_mode
from tests.ops.contract import (
    DTYPES,
    KINDS,
    REFERENCE,
    Contract,
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


def called(name: str, run: Callable[[], object]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments and kwargs of each call of an operator by `run`."""
    operator, calls = getattr(torch_npu, name), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return operator(*args, **kwargs)

    with mock.patch.object(torch_npu, name, spy):
        run()
    return calls


class Written(TorchDispatchMode):
    """Shapes of the tensors that are filled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "masked_fill_":
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


class TestCallsOnAnA2(Contract):
    """Which operators are called, and with what."""

    device = torch.device("npu", 0)
    block_size = 16

    @pytest.fixture
    def ops(self) -> Ops:
        return NpuOps()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "takes_cache_mode", [pytest.param(True, marks=needs_cache_mode), False]
    )
    def test_the_cache_is_written_by_the_operator_only_in_a_layout_that_attention_reads(
        self, monkeypatch: pytest.MonkeyPatch, takes_cache_mode: bool, dtype: torch.dtype
    ):
        monkeypatch.setattr("moespan.ops.npu.ops._takes_cache_mode", lambda: takes_cache_mode)
        k, v = (self.random(5, 2, 128, dtype=dtype, seed=seed) for seed in range(2))
        cache = KVCache.zeros((3, 16, 2, 128), dtype, self.device)
        slots = torch.tensor([3, 17, 0, 40, 41], dtype=torch.int32, device=self.device)
        calls = called(
            "npu_scatter_pa_kv_cache", lambda: NpuOps().write_cache(*self.to(k, v), cache, slots)
        )
        # Its A2 kernel takes no float32; without `cache_mode` it demands another layout.
        uses_operator = takes_cache_mode and dtype != torch.float32
        assert [kwargs["cache_mode"] for _, kwargs in calls] == ["Norm"] * uses_operator
        for rows, written in ((k, cache.keys), (v, cache.values)):
            assert torch.equal(written.flatten(0, 1)[slots].cpu(), rows)
            assert written.count_nonzero() == rows.count_nonzero()

    @pytest.mark.parametrize("num_held", [1, 2])
    def test_one_count_is_given_to_the_grouped_matmul_as_an_end(self, ops: Ops, num_held: int):
        x, bank, chosen = self.part_of_the_experts(ops, num_held, 4)
        calls = called("npu_grouped_matmul", lambda: ops.experts(x, *chosen, bank))
        assert [kwargs["group_list_type"] for _, kwargs in calls] == [int(num_held > 1)] * 2

    def test_of_rows_of_other_ranks_only_the_last_one_is_cleared(self, ops: Ops):
        x, bank, chosen = self.part_of_the_experts(ops, 2, 4)
        with Written() as written:
            ops.experts(x, *chosen, bank)
        assert written.shapes == [(1, 16)]

    def part_of_the_experts(
        self, ops: Ops, num_held: int, num_experts: int
    ) -> tuple[Tensor, ExpertBank, tuple[Tensor, Tensor]]:
        """Tokens, the first experts, and the router's choice, on the device."""
        x = self.random(9, 16, dtype=torch.bfloat16)
        weights, chosen = self.random(9, num_experts).softmax(-1).topk(2)
        gate_up, down = (self.random(num_held, 16, 16, dtype=torch.bfloat16) for _ in range(2))
        gate_up = torch.cat([gate_up, gate_up], 1)
        matrices = self.prepared(ops, "layers.0.mlp.experts", gate_up=gate_up, down=down)
        bank = ExpertBank(matrices[0], matrices[1], 0, num_experts)
        return self.to(x)[0], bank, self.to(weights, chosen)

    @pytest.mark.parametrize(("query_lens", "is_masked"), [([1, 1, 1], False), ([1, 2, 1], True)])
    def test_decode_without_a_mask(self, query_lens: list[int], is_masked: bool):
        ops = NpuOps(options=EngineOptions(npu_maskless_decode=True))
        batch, num_blocks = make_batch(query_lens, [0, 7, 30], self.block_size, self.device)
        q = self.random(sum(query_lens), 4, 128, dtype=torch.bfloat16)
        filled = [self.random(num_blocks, 16, 2, 128, dtype=q.dtype, seed=i) for i in range(2)]
        expected = REFERENCE.attention(
            q,
            KVCache(*filled),
            make_batch(query_lens, [0, 7, 30], self.block_size, torch.device("cpu"))[0],
            0.1,
        )
        found: list[Tensor] = []
        (call,) = called(
            "npu_fused_infer_attention_score",
            lambda: found.append(
                ops.attention(*self.to(q), KVCache(*self.to(*filled)), batch, 0.1)
            ),
        )
        assert_close(found[0], expected, q.dtype)
        assert ("atten_mask" in call[1]) == is_masked
        assert call[1]["sparse_mode"] == (3 if is_masked else 0)

    @needs_cache_mode
    @pytest.mark.parametrize(("num_tokens", "calls"), [(2, 0), (3, 2)])
    def test_large_steps_may_write_the_cache_by_another_operator(self, num_tokens: int, calls: int):
        ops = NpuOps(options=EngineOptions(npu_scatter_prefill=3))
        k, v = (self.random(num_tokens, 2, 128, dtype=torch.float16, seed=i) for i in range(2))
        cache = KVCache.zeros((3, 16, 2, 128), k.dtype, self.device)
        slots = torch.tensor([40, 17, 0], dtype=torch.int32, device=self.device)[:num_tokens]
        found = called(
            "npu_scatter_nd_update_", lambda: ops.write_cache(*self.to(k, v), cache, slots)
        )
        assert len(found) == calls
        for rows, written in ((k, cache.keys), (v, cache.values)):
            assert torch.equal(written.flatten(0, 1)[slots].cpu(), rows)
            assert written.count_nonzero() == rows.count_nonzero()

    def test_two_computations_beside_each_other(self):
        x = torch.arange(5.0).npu()
        for overlaps in (False, True):
            ops = NpuOps(options=EngineOptions(npu_overlap_shared=overlaps))
            streams: list[Any] = []

            def on(factor: int, streams: list[Any] = streams) -> Tensor:
                streams.append(torch.npu.current_stream())
                return x * factor

            first, second = ops.beside(lambda: on(2), lambda: on(3))
            assert (first + second).tolist() == [0, 5, 10, 15, 20]
            assert (streams[0] != streams[1]) == ops.has_second_stream == overlaps


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
        ops = NpuOps(options=EngineOptions(npu_weight_format="nz"))
        x = self.random(3, 64, dtype=torch.bfloat16)
        weight = self.quantized(self.random(32, 64), "w8a8")
        (prepared,) = self.prepared_quantized(ops, "layers.0.attention", out=weight)
        expected = REFERENCE.linear(x, weight)
        self.assert_close(ops.linear(*self.to(x), prepared), expected, x.dtype, "w8a8")
        with pytest.raises(ConfigError, match=r"attention.out .* rows only; leave it out, or use"):
            self.prepared_quantized(
                ops, "layers.0.attention", out=QuantizedWeight(weight.values, weight.scales)
            )

    def test_a_head_of_integers_stays_in_rows(self):
        x = self.random(3, 64, dtype=torch.bfloat16)
        weight = self.quantized(self.random(32, 64), "int8")
        ops = NpuOps(options=EngineOptions(npu_weight_format="nz"))
        parts = self.to(weight.values, weight.scales)
        head = ops.prepare("head", QuantizedWeight(*parts, activation_bits=16))
        expected = REFERENCE.linear(x, weight)
        self.assert_close(ops.linear(*self.to(x), head), expected, x.dtype, "int8")


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
