"""The tests that every implementation of the operations must pass: results equal the reference's.

A test module subclasses `OpsContract`, and `QuantizedContract` if the operations take 8 bits, by a
class whose name begins with `Test`. Inputs are made on the CPU and moved to the device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import Tensor

from moespan.checkpoint.rounding import QuantizedWeight, quantize, round_rows
from moespan.ops import AttentionBatch, ExpertBank, KVCache, Ops, ReferenceOps, Rotation, Weight
from moespan.parallel.mesh import Axis

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Tensors = TypeVarTuple("Tensors")

REFERENCE = ReferenceOps()
# As a share of the largest value: a few roundings, because the orders of operations differ.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)
CHOICES = ("random", "all on one", "none here")


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype, least: float = 0) -> None:
    ours = ours.cpu()
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if theirs.numel():
        worst = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(1e-6)
        limit = max(TOLERANCE[dtype], least)
        assert worst <= limit, f"differs by {worst:.1e}"  # and a NaN fails


@dataclass(frozen=True)
class Kind:
    """A kind of 8-bit matrix.

    Attributes:
        flip: largest change of a result, as a share of the largest result, when one activation is
            rounded to the other side; 0 where activations are not rounded.
    """

    dtype: torch.dtype
    activation_bits: int
    flip: float


# A rounding step is 1/127 of the largest element of the row, or up to an eighth of the element. Its
# share of a result is smaller by about the square root of the row's length.
KINDS = {
    "int8": Kind(torch.int8, 16, 0),
    "w8a8": Kind(torch.int8, 8, 2e-3),
    "fp8": Kind(torch.float8_e4m3fn, 8, 2e-2),
    "fp8 of weights alone": Kind(torch.float8_e4m3fn, 16, 0),  # the head of some checkpoints
}


def make_batch(
    query_lens: list[int], context_lens: list[int], block_size: int, device: torch.device
) -> tuple[AttentionBatch, int]:
    """A batch whose blocks are chosen at random, and the number of blocks of its cache."""
    counts = [
        -(-(query + context) // block_size)
        for query, context in zip(query_lens, context_lens, strict=True)
    ]
    num_blocks = sum(counts) + 3
    blocks = random.Random(len(query_lens)).sample(range(num_blocks), sum(counts))
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    batch = AttentionBatch.build(query_lens, context_lens, tables, block_size, device)
    return batch, num_blocks


class Contract:
    """Shared helpers.

    Attributes:
        block_size: a block size that the device's attention takes.
        most_tokens: most tokens in a test of experts.
    """

    device = torch.device("cpu")
    block_size = 4
    head_sizes: tuple[int, ...] = (6, 64, 128)
    most_tokens = 40

    @pytest.fixture
    def ops(self) -> Ops:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def inference(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(shape))
        return torch.randn(*shape, generator=generator).to(dtype)

    def to(self, *tensors: Unpack[Tensors]) -> tuple[Unpack[Tensors]]:
        """Copies on the device: operations may not change what the reference is given."""
        given: Any = tensors
        copies: Any = tuple(tensor.clone().to(self.device) for tensor in given)
        return copies

    def prepared(self, ops: Ops, module: str, **weights: Tensor) -> list[Weight]:
        return [ops.prepare(f"{module}.{name}", *self.to(w)) for name, w in weights.items()]


class OpsContract(Contract):
    """Weights and caches of the activations' dtype."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 16), (7, 33), (130, 256), (0, 16)])
    def test_norms(self, ops: Ops, shape: tuple[int, int], dtype: torch.dtype):
        x, residual = self.random(*shape, dtype=dtype), self.random(*shape, dtype=dtype, seed=1)
        weight = self.random(shape[1], dtype=dtype)
        expected = REFERENCE.rms_norm(x, weight, 1e-6)
        assert_close(ops.rms_norm(*self.to(x, weight), 1e-6), expected, dtype)
        normed, total = ops.add_rms_norm(*self.to(x, residual, weight), 1e-6)
        expected, expected_total = REFERENCE.add_rms_norm(x, residual, weight, 1e-6)
        assert_close(normed, expected, dtype)
        assert torch.equal(total.cpu(), expected_total)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_tokens", [0, 1, 19])
    @pytest.mark.parametrize(("width", "hidden"), [(34, 7), (64, 128)])
    def test_mlp(self, ops: Ops, num_tokens: int, width: int, hidden: int, dtype: torch.dtype):
        x = self.random(num_tokens, width, dtype=dtype)
        gate_up = self.random(2 * hidden, width, dtype=dtype) / 8
        down = self.random(width, hidden, dtype=dtype) / 8
        weights = self.prepared(ops, "layers.0.mlp", gate_up=gate_up, down=down)
        expected = REFERENCE.mlp(x, gate_up, down)
        assert_close(ops.mlp(*self.to(x), *weights), expected, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_tokens", [0, 2, 19])
    def test_mlp_sum_with_an_addend(self, ops: Ops, num_tokens: int, dtype: torch.dtype):
        x, onto = (self.random(num_tokens, 34, dtype=dtype, seed=seed) for seed in (0, 1))
        gate_up = self.random(14, 34, dtype=dtype) / 8
        down = self.random(34, 7, dtype=dtype) / 8
        prepared = self.prepared(ops, "layers.0.mlp", gate_up=gate_up, down=down)
        expected = REFERENCE.mlp_sum(x, gate_up, down, Axis(), "mlp", onto.clone())
        ours, to_add = self.to(x, onto)
        found = ops.mlp_sum(ours, prepared[0], prepared[1], Axis(), "mlp", to_add)
        assert_close(found, expected, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_linear(self, ops: Ops, has_bias: bool, dtype: torch.dtype):
        x, weight = self.random(5, 48, dtype=dtype), self.random(7, 48, dtype=dtype)
        bias = self.random(7, dtype=dtype) if has_bias else None
        moved = self.to(bias) if bias is not None else [None]
        expected = REFERENCE.linear(x, weight, bias)
        prepared = self.prepared(ops, "layers.0.attention", qkv=weight)
        assert_close(ops.linear(*self.to(x), *prepared, *moved), expected, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_tokens", [0, 1, 9])
    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (4, 2), (5, 1)])
    def test_rope(
        self, ops: Ops, num_heads: int, num_kv_heads: int, num_tokens: int, dtype: torch.dtype
    ):
        for head_size in self.head_sizes:
            qkv = self.random(num_tokens, num_heads + 2 * num_kv_heads, head_size, dtype=dtype)
            angles = self.random(40, head_size // 2)
            positions = torch.arange(3, 3 + num_tokens)
            cos, sin = angles.cos(), angles.sin()
            rotation = Rotation(num_heads, num_kv_heads, cos[positions], sin[positions])
            expected = REFERENCE.rope(qkv.clone(), rotation)
            table = ops.rotary_table(*self.to(cos, sin), dtype)
            rows = (part[positions.to(self.device)] for part in table)
            found = ops.rope(*self.to(qkv), Rotation(num_heads, num_kv_heads, *rows))
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours, theirs.contiguous(), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_tokens", [0, 1, 9])
    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (10, 2)])
    def test_rope_to_cache(
        self, ops: Ops, num_heads: int, num_kv_heads: int, num_tokens: int, dtype: torch.dtype
    ):
        for head_size in self.head_sizes:
            qkv = self.random(num_tokens, num_heads + 2 * num_kv_heads, head_size, dtype=dtype)
            angles = self.random(num_tokens, head_size // 2)
            cos, sin = angles.cos(), angles.sin()
            shape = (5, self.block_size, num_kv_heads, head_size)
            caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
            slots = torch.arange(num_tokens).flip(0) * 2 + 1
            ours, theirs = KVCache(*self.to(*caches)), KVCache(*caches)
            rotation = Rotation(num_heads, num_kv_heads, cos, sin)
            expected = REFERENCE.rope_to_cache(qkv.clone(), rotation, theirs, slots)
            rows = ops.rotary_table(*self.to(cos, sin), dtype)
            rotation = Rotation(num_heads, num_kv_heads, *rows)
            at = slots.int().to(self.device)
            found = ops.rope_to_cache(*self.to(qkv), rotation, ours, at)
            assert_close(found, expected.contiguous(), dtype)
            for our_cache, cache in zip(ours.tensors, theirs.tensors, strict=True):
                assert torch.equal(our_cache.cpu().isnan(), cache.isnan())
                assert_close(our_cache.nan_to_num(), cache.nan_to_num(), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("query_lens", "context_lens"),
        [
            ([1], [0]),
            ([5], [0]),
            ([1, 1, 1], [0, 3, 17]),
            ([4, 1, 7, 1], [0, 8, 5, 2]),
            ([1] * 9, [31, 0, 4, 3, 5, 8, 1, 1, 16]),
            ([], []),
        ],
        ids=str,
    )
    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (3, 1)])
    def test_attention_over_the_paged_cache(
        self,
        ops: Ops,
        num_heads: int,
        num_kv_heads: int,
        query_lens: list[int],
        context_lens: list[int],
        dtype: torch.dtype,
    ):
        for head_size in self.head_sizes:
            batch, num_blocks = make_batch(query_lens, context_lens, self.block_size, self.device)
            at_home, _ = make_batch(query_lens, context_lens, self.block_size, torch.device("cpu"))
            shape = (num_blocks, self.block_size, num_kv_heads, head_size)
            # The context is cached; everything else is NaN until it is written.
            before = [self.random(*shape, dtype=dtype, seed=seed) for seed in (0, 1)]
            is_cached = torch.zeros(shape[:2], dtype=torch.bool)
            for table, length in zip(at_home.block_tables, context_lens, strict=True):
                places = torch.arange(length)
                is_cached[table[places // self.block_size], places % self.block_size] = True
            caches = [cache.masked_fill(~is_cached[..., None, None], torch.nan) for cache in before]
            num_tokens = sum(query_lens)
            q = self.random(num_tokens, num_heads, head_size, dtype=dtype)
            k, v = (
                self.random(num_tokens, num_kv_heads, head_size, dtype=dtype, seed=s)
                for s in (2, 3)
            )
            ours, theirs = KVCache(*self.to(*caches)), KVCache(*caches)
            ops.write_cache(*self.to(k, v), ours, batch.slots)
            found = ops.attention(*self.to(q), ours, batch, 0.3)
            REFERENCE.write_cache(k, v, theirs, at_home.slots)
            for our_cache, cache in zip(ours.tensors, theirs.tensors, strict=True):
                assert torch.equal(our_cache.cpu().isnan(), cache.isnan())
                assert torch.equal(our_cache.cpu().nan_to_num(), cache.nan_to_num())
            assert_close(found, REFERENCE.attention(q, theirs, at_home, 0.3), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("renormalize", [False, True])
    @pytest.mark.parametrize(
        ("num_tokens", "num_experts", "num_chosen"),
        [(1, 8, 3), (33, 64, 6), (5, 4, 4), (6, 5, 1), (0, 8, 2)],
    )
    def test_route(
        self,
        ops: Ops,
        num_tokens: int,
        num_experts: int,
        num_chosen: int,
        renormalize: bool,
        dtype: torch.dtype,
    ):
        x, router = self.random(num_tokens, 24, dtype=dtype), self.random(num_experts, 24)
        weights, chosen = ops.route(*self.to(x, router), num_chosen, renormalize)
        expected, expected_chosen = REFERENCE.route(x, router, num_chosen, renormalize)
        assert torch.equal(chosen.cpu().long(), expected_chosen)
        assert not chosen.is_floating_point()
        assert_close(weights, expected, torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("num_tokens", "first", "held", "num_physical", "num_chosen", "choice"),
        [
            (*share, choice)
            for *share, choices in (
                (1, 0, 8, 8, 3, CHOICES[:2]),  # all experts here
                (37, 0, 8, 8, 8, CHOICES[:2]),
                (1, 2, 2, 8, 2, CHOICES),
                (40, 0, 4, 16, 6, CHOICES),
                (40, 12, 4, 16, 6, CHOICES),
                (23, 5, 1, 7, 3, CHOICES),
                (0, 0, 4, 4, 2, CHOICES[:1]),
                (0, 2, 2, 4, 2, CHOICES[:1]),
            )
            for choice in choices
        ],
    )
    def test_experts(
        self,
        ops: Ops,
        choice: str,
        num_tokens: int,
        first: int,
        held: int,
        num_physical: int,
        num_chosen: int,
        dtype: torch.dtype,
    ):
        num_tokens = min(num_tokens, self.most_tokens)
        is_whole = held == num_physical
        x = self.random(num_tokens, 32, dtype=dtype)
        weights = self.random(num_tokens, num_chosen).softmax(-1)
        gate_up = self.random(held, 2 * 12, 32, dtype=dtype) / 4
        down = self.random(held, 32, 12, dtype=dtype) / 4
        generator = torch.Generator().manual_seed(num_tokens)
        options = num_physical + (not is_whole)  # the last is padding
        order = torch.rand(num_tokens, options, generator=generator).argsort(-1)
        physical_ids = order[:, :num_chosen]
        if choice == "all on one":
            physical_ids = torch.full_like(physical_ids, first)
        elif choice == "none here":
            physical_ids = torch.full_like(physical_ids, num_physical)
        bank = ExpertBank(gate_up, down, first, num_physical)
        expected = REFERENCE.experts(x, weights, physical_ids, bank)
        for kind in (torch.int64, torch.int32) if choice == "random" else (torch.int32,):
            matrices = self.prepared(ops, "layers.0.mlp.experts", gate_up=gate_up, down=down)
            moved = self.to(x, weights, physical_ids.to(kind))
            found = ops.experts(*moved, ExpertBank(matrices[0], matrices[1], first, num_physical))
            assert_close(found, expected, dtype)


class QuantizedContract(Contract):
    """Weights of 8 bits, and caches of 8-bit integers."""

    kinds: ClassVar = tuple(KINDS)

    def assert_close(self, ours: Tensor, theirs: Tensor, dtype: torch.dtype, kind: str) -> None:
        """Equal, except that single activations may be rounded to the other side."""
        assert_close(ours, theirs, dtype, KINDS[kind].flip)

    def takes(self, kind: str) -> None:
        """Skip the test unless these operations take `kind`."""
        if kind not in self.kinds:
            pytest.skip(f"no {kind}")

    def quantized(self, weight: Tensor, kind: str) -> QuantizedWeight:
        """[..., out, in] quantised, each matrix by itself."""
        values, scales = quantize(weight.flatten(0, -2), dtype=KINDS[kind].dtype)
        return QuantizedWeight(
            values.view(weight.shape), scales.view(weight.shape[:-1]), KINDS[kind].activation_bits
        )

    def prepared_quantized(self, ops: Ops, module: str, **weights: QuantizedWeight) -> list[Weight]:
        return [
            ops.prepare(
                f"{module}.{name}",
                QuantizedWeight(*self.to(w.values, w.scales), activation_bits=w.activation_bits),
            )
            for name, w in weights.items()
        ]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_linear_of_8_bits(self, ops: Ops, has_bias: bool, kind: str, dtype: torch.dtype):
        self.takes(kind)
        for num_tokens, width, out in ((0, 48, 7), (1, 48, 7), (5, 33, 64), (70, 256, 96)):
            x = self.random(num_tokens, width, dtype=dtype)
            weight = self.quantized(self.random(out, width), kind)
            bias = self.random(out, dtype=dtype) if has_bias else None
            moved = self.to(bias) if bias is not None else [None]
            expected = REFERENCE.linear(x, weight, bias)
            prepared = self.prepared_quantized(ops, "layers.0.attention", qkv=weight)
            found = ops.linear(*self.to(x), *prepared, *moved)
            self.assert_close(found, expected, dtype, kind)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_activations_are_rounded_by_token_for_8_activation_bits_only(
        self, ops: Ops, dtype: torch.dtype
    ):
        ones = torch.ones(32, 64)
        ones[:, 0] = 0
        for kind in self.kinds:
            # 2⁻⁶ is rounded to zero in a row that begins with `first`, but not beside 0.5.
            first = 2.0**15 if KINDS[kind].dtype.is_floating_point else 2.0**3
            x = torch.full((2, 64), 2.0**-6, dtype=dtype)
            x[:, 0] = torch.tensor([first, 0.5], dtype=dtype)
            (weight,) = self.prepared_quantized(
                ops, "layers.0.attention", out=self.quantized(ones, kind)
            )
            sums = ops.linear(*self.to(x), weight).cpu().float()
            kept = 63 / 64 if KINDS[kind].activation_bits == 16 else 0
            expected = torch.tensor([kept, 63 / 64])[:, None].expand(2, 32)
            assert sums == pytest.approx(expected, abs=0.01)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["int8", "w8a8", "fp8"])
    def test_mlp_of_8_bits(self, ops: Ops, kind: str, dtype: torch.dtype):
        self.takes(kind)
        for num_tokens, width, hidden in ((0, 64, 128), (1, 34, 7), (1, 64, 128), (33, 64, 128)):
            x = self.random(num_tokens, width, dtype=dtype)
            gate_up = self.quantized(self.random(2 * hidden, width) / 8, kind)
            down = self.quantized(self.random(width, hidden) / 8, kind)
            weights = self.prepared_quantized(ops, "layers.0.mlp", gate_up=gate_up, down=down)
            expected = REFERENCE.mlp(x, gate_up, down)
            self.assert_close(ops.mlp(*self.to(x), *weights), expected, dtype, kind)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["int8", "w8a8", "fp8"])
    @pytest.mark.parametrize(
        ("num_tokens", "first", "held", "num_physical", "num_chosen"),
        [(1, 0, 8, 8, 3), (37, 0, 8, 8, 8), (40, 12, 4, 16, 6), (0, 2, 2, 4, 2)],
    )
    def test_experts_of_8_bits(
        self,
        ops: Ops,
        num_tokens: int,
        first: int,
        held: int,
        num_physical: int,
        num_chosen: int,
        kind: str,
        dtype: torch.dtype,
    ):
        self.takes(kind)
        num_tokens = min(num_tokens, self.most_tokens)
        for width, hidden in ((32, 12), (64, 48)):
            x = self.random(num_tokens, width, dtype=dtype)
            weights = self.random(num_tokens, num_chosen).softmax(-1)
            gate_up = self.quantized(self.random(held, 2 * hidden, width) / 4, kind)
            down = self.quantized(self.random(held, width, hidden) / 4, kind)
            generator = torch.Generator().manual_seed(num_tokens)
            order = torch.rand(num_tokens, num_physical, generator=generator).argsort(-1)
            physical_ids = order[:, :num_chosen]
            bank = ExpertBank(gate_up, down, first, num_physical)
            expected = REFERENCE.experts(x, weights, physical_ids, bank)
            module = "layers.0.mlp.experts"
            matrices = self.prepared_quantized(ops, module, gate_up=gate_up, down=down)
            moved = self.to(x, weights, physical_ids)
            found = ops.experts(*moved, ExpertBank(matrices[0], matrices[1], first, num_physical))
            self.assert_close(found, expected, dtype, kind)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_int8_cache_is_off_by_half_a_step_at_most(self, ops: Ops, dtype: torch.dtype):
        num_tokens, num_heads = 7, 3
        for head_size in self.head_sizes:
            shape = (4, self.block_size, num_heads, head_size)
            cache = KVCache.zeros(shape, torch.int8, self.device)
            for scales in cache.tensors[2:]:
                scales.fill_(torch.nan)
            k, v = (
                self.random(num_tokens, num_heads, head_size, dtype=dtype, seed=s) for s in (2, 3)
            )
            k[2, 1] = 0
            places = torch.randperm(4 * self.block_size, generator=torch.Generator().manual_seed(1))
            slots = places[:num_tokens].int()
            ops.write_cache(*self.to(k, v), cache, *self.to(slots))
            parts = [part.cpu().flatten(0, 1) for part in cache.tensors]
            for x, values, scales in zip((k, v), parts[:2], parts[2:], strict=True):
                torch.testing.assert_close(scales[slots], x.float().abs().amax(-1) / 127)
                step = scales[slots][..., None]
                error = (values[slots].float() * step - x.float()).abs()
                assert (error <= step * 0.501).all()
                elsewhere = places[num_tokens:]
                assert not values[elsewhere].any()
                assert scales[elsewhere].isnan().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("query_lens", "context_lens"),
        [([1], [0]), ([5], [3]), ([1, 1, 1], [0, 3, 17]), ([4, 1, 7, 1], [0, 8, 5, 2]), ([], [])],
        ids=str,
    )
    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2)])
    def test_attention_over_an_int8_cache(
        self,
        ops: Ops,
        num_heads: int,
        num_kv_heads: int,
        query_lens: list[int],
        context_lens: list[int],
        dtype: torch.dtype,
    ):
        for head_size in self.head_sizes:
            batch, num_blocks = make_batch(query_lens, context_lens, self.block_size, self.device)
            at_home, _ = make_batch(query_lens, context_lens, self.block_size, torch.device("cpu"))
            shape = (num_blocks, self.block_size, num_kv_heads, head_size)
            (keys, key_scales), (values, value_scales) = (
                round_rows(self.random(*shape, seed=seed)) for seed in (0, 1)
            )
            is_used = torch.zeros(shape[:2], dtype=torch.bool)
            for table, length in zip(at_home.block_tables, at_home.total_lens, strict=True):
                places = torch.arange(length)
                is_used[table[places // self.block_size], places % self.block_size] = True
            for scales in (key_scales, value_scales):
                scales[~is_used] = torch.nan
            theirs = KVCache(keys, values, key_scales, value_scales)
            ours = KVCache(*self.to(*theirs.tensors))
            q = self.random(sum(query_lens), num_heads, head_size, dtype=dtype)
            expected = REFERENCE.attention(q, theirs, at_home, 0.3)
            assert_close(ops.attention(*self.to(q), ours, batch, 0.3), expected, dtype)
