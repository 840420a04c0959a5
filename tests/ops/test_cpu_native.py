"""The kernels for CPUs agree with the reference at the sizes that they are made for: whole panels,
odd remainders, many rows and few, several chunks of keys."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import Parameter, Piece, place
from moespan.checkpoint.rounding import NotFiniteError, QuantizedWeight, quantize
from moespan.config import Layout
from moespan.config.schemes import SCHEMES
from moespan.ops import AttentionBatch, ExpertBank, KVCache, ReferenceOps
from moespan.ops.cpu.native import NativeCpuOps
from moespan.ops.cpu.packing import PackedBuilder, PackedWeight
from tests.support import Oracle

REFERENCE = ReferenceOps()
BF16 = torch.bfloat16


def kinds_of_processors() -> list[tuple[str, ...]]:
    """Compiler flags for this processor, and for it without features that others lack."""
    kinds: list[tuple[str, ...]] = [()]
    if "amx_bf16" in Path("/proc/cpuinfo").read_text():
        kinds.append(("-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8"))
    if platform.machine() == "x86_64":
        kinds.append(("-march=x86-64-v3",))
    return kinds


@pytest.fixture(scope="module", params=kinds_of_processors(), ids=" ".join)
def ops(request: pytest.FixtureRequest) -> NativeCpuOps:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no compiler")
    return NativeCpuOps(*request.param)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(BF16)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-2) -> None:
    """Compare with `theirs`, computed in float32 or float64: a few roundings to bfloat16 apart."""
    assert ours.dtype == BF16 and ours.shape == theirs.shape
    worst = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert worst <= tolerance


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 12, 13, 25, 300])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (100, 18), (7, 2), (33, 1030)])
def test_linear_for_any_number_of_rows_and_channels(
    ops: NativeCpuOps, rows: int, out: int, width: int
):
    x, weight, bias = random(rows, width), random(out, width, seed=1), random(out, seed=2)
    packed = ops.prepare("layers.0.attention.out", weight.clone())
    assert isinstance(packed, PackedWeight)
    expected = x.double() @ weight.double().t()
    assert_close(ops.linear(x, packed), expected)
    assert_close(ops.linear(x, packed, bias), expected + bias.double())


def same_bits(ours: PackedWeight, theirs: PackedWeight) -> bool:
    parts = ("panels", "scales", "sums")
    pairs = [(getattr(ours, part), getattr(theirs, part)) for part in parts]
    return all(a is b or torch.equal(a, b) for a, b in pairs)


def pieces_of(parameter: Parameter, rows: tuple[int, ...]) -> list[Piece]:
    """The matrices of the parameter, cut at `rows`."""
    *bank, out, width = parameter.shape
    ends = [0, *rows, out]
    columns = slice(0, width)
    return [
        Piece("any", (part, columns), "any", (*number, part, columns))
        for number in ([(i,) for i in range(bank[0])] if bank else [()])
        for part in map(slice, ends, ends[1:])
    ]


@pytest.mark.parametrize("kind", [None, "w8a8", "int8"])
@pytest.mark.parametrize("leaf", ["down", "gate_up"])
@pytest.mark.parametrize("rows", [(), (64,), (3, 21, 77)], ids=str)
@pytest.mark.parametrize("shape", [(160, 96), (3, 120, 68)], ids=str)
def test_pieces_packed_in_any_order_equal_the_whole_packed(
    ops: NativeCpuOps, shape: tuple[int, ...], rows: tuple[int, ...], leaf: str, kind: str | None
):
    scheme = SCHEMES[kind] if kind else None
    parameter, whole = Parameter(shape, None, scheme), random(*shape)
    builder = ops.builder(leaf, parameter, BF16, torch.device("cpu"))
    assert isinstance(builder, PackedBuilder)
    for piece in reversed(pieces_of(parameter, rows)):
        builder.put(piece, whole[piece.index])
    expected: Tensor | QuantizedWeight = whole
    if scheme is not None:
        integers, scales = quantize(whole.view(-1, shape[-1]))
        expected = QuantizedWeight(
            integers.view(shape), scales.view(shape[:-1]), scheme.activation_bits
        )
    assert same_bits(builder.finish(), ops.prepare(leaf, expected))


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.int8])
def test_parts_of_rows_and_scales_are_padded_with_zeros(ops: NativeCpuOps, dtype: torch.dtype):
    # A rank reads some columns of the file's rows; its last rows and columns are padding.
    shape, columns, held = (48, 40), slice(9, 46), (slice(0, 45), slice(0, 37))
    parameter = Parameter(shape, None, None if dtype == BF16 else SCHEMES["int8"])
    piece = Piece("any", (held[0], columns), "any", held)
    file = random(48, 64)
    integers, scales = quantize(file.float())
    read = (integers if dtype == torch.int8 else file.to(dtype))[piece.tensor_index]
    builder = ops.builder("down", parameter, BF16, torch.device("cpu"))
    maxima = file[held[0]].abs().amax(-1).float()
    builder.put(piece, read, maxima if dtype == torch.float32 else None)
    if dtype == torch.int8:
        scale = Piece("any", held[:1], "any", held[:1], is_scale=True)
        builder.put(scale, scales[held[0]])
    expected: Tensor | QuantizedWeight
    if dtype == BF16:
        expected = whole = torch.zeros(shape, dtype=BF16)
        whole[held] = file[piece.tensor_index]
    else:
        expected = QuantizedWeight(torch.zeros(shape, dtype=torch.int8), torch.zeros(48))
        expected.values[held] = integers[piece.tensor_index]
        expected.scales[held[0]] = scales[held[0]]
    assert same_bits(builder.finish(), ops.prepare("down", expected))


@pytest.mark.parametrize("quantization", [None, "int8", "w8a8"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4, ep=2), Layout(pp=2, tp=2)], ids=str)
def test_loading_equals_preparing_whole_parameters_on_every_rank(
    ops: NativeCpuOps, layout: Layout, quantization: str | None
):
    oracle = Oracle("sixteen")
    for rank in range(layout.world_size):
        placement = place(oracle.config, layout, rank, quantization=quantization)
        source, cpu = oracle.source(), torch.device("cpu")
        ours, _ = load_weights(placement, source, BF16, cpu, new_builder=ops.builder)
        theirs, _ = load_weights(placement, source, BF16, cpu)
        assert ours.keys() == theirs.keys()
        num_packed = 0
        for name, weight in theirs.items():
            expected = ops.prepare(name, weight)
            if isinstance(expected, PackedWeight):
                assert same_bits(ours[name], expected)
                num_packed += 1
            else:
                assert torch.equal(ours[name], expected)
        assert num_packed


@pytest.mark.parametrize("width", [2, 33, 1030])
def test_rows_are_rounded_to_the_integers_of_the_reference(ops: NativeCpuOps, width: int):
    rows = random(70, width) * torch.logspace(-30, 30, 70)[:, None].to(BF16)
    rows[3] = 0
    maxima = torch.linspace(0.5, 3, 70) * rows.abs().amax(-1).float()
    builder = PackedBuilder(ops._kernels, (70, 2 * width), 8, is_gate_up=False)
    for known in (None, maxima):
        (integers, scales), (expected, expected_scales) = (
            rounding(rows, known) for rounding in (builder._round, quantize)
        )
        assert torch.equal(scales, expected_scales)
        assert torch.equal(integers, expected)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("column", [0, 16, -1])
def test_rows_that_are_not_finite_are_refused_as_by_the_reference(
    ops: NativeCpuOps, bad: float, column: int
):
    rows = random(70, 33)
    rows[68, column] = bad
    builder = PackedBuilder(ops._kernels, (70, 66), 8, is_gate_up=False)
    for known in (None, rows.abs().amax(-1).float()):
        for rounding in (builder._round, quantize):
            with pytest.raises(NotFiniteError):
                rounding(rows, known)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 301])
@pytest.mark.parametrize("width", [32, 24, 176])
def test_experts_of_a_shard(ops: NativeCpuOps, num_tokens: int, width: int):
    hidden_size, held, first, num_physical, num_chosen = 96, 5, 3, 11, 4
    x = random(num_tokens, hidden_size)
    gate_up, down = random(held, 2 * width, hidden_size), random(held, hidden_size, width, seed=1)
    generator = torch.Generator().manual_seed(num_tokens)
    order = torch.rand(num_tokens, num_physical, generator=generator).argsort(-1)
    physical_ids = order[:, :num_chosen]
    weights = torch.rand(num_tokens, num_chosen, generator=generator)
    in_float32 = ExpertBank(gate_up.float(), down.float(), first, num_physical)
    expected = REFERENCE.experts(x.float(), weights, physical_ids, in_float32)
    packed = [
        ops.prepare(f"layers.1.mlp.experts.{name}", matrices.clone())
        for name, matrices in (("gate_up", gate_up), ("down", down))
    ]
    bank = ExpertBank(packed[0], packed[1], first, num_physical)
    assert_close(ops.experts(x, weights, physical_ids, bank), expected)


@pytest.mark.parametrize("num_tokens", [1, 33, 70])
def test_mlp_whose_second_sum_is_long(ops: NativeCpuOps, num_tokens: int):
    hidden_size, width = 64, 5024
    x = random(num_tokens, hidden_size)
    gate_up = random(2 * width, hidden_size, scale=0.3)
    down = random(hidden_size, width, seed=1, scale=0.3)
    expected = REFERENCE.mlp(x.float(), gate_up.float(), down.float())
    prepared = ops.prepare("gate_up", gate_up.clone()), ops.prepare("down", down.clone())
    assert_close(ops.mlp(x, *prepared), expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 40, 130])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (100, 20), (33, 2052)])
def test_linear_of_integers_for_any_number_of_rows(
    ops: NativeCpuOps, rows: int, out: int, width: int, bits: int
):
    x = random(rows, width)
    weight = QuantizedWeight(*quantize(random(out, width, seed=1)), bits)
    packed = ops.prepare("head", replace(weight, values=weight.values.clone()))
    assert isinstance(packed, PackedWeight)
    assert_close(ops.linear(x, packed), REFERENCE.linear(x.float(), weight), 5e-3)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("num_tokens", [1, 50])
def test_experts_of_integers(ops: NativeCpuOps, num_tokens: int, bits: int):
    hidden_size, width, held = 64, 40, 3
    x = random(num_tokens, hidden_size)

    def matrices(*shape: int) -> QuantizedWeight:
        values, scales = quantize(random(held * shape[0], shape[1]))
        return QuantizedWeight(values.view(held, *shape), scales.view(held, -1), bits)

    banks = matrices(2 * width, hidden_size), matrices(hidden_size, width)
    generator = torch.Generator().manual_seed(1)
    physical_ids = torch.rand(num_tokens, 4, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(num_tokens, 2, generator=generator)
    expected = REFERENCE.experts(x, weights, physical_ids, ExpertBank(*banks, 0, 4))
    packed = [
        ops.prepare(f"mlp.experts.{name}", replace(one, values=one.values.clone()))
        for name, one in zip(("gate_up", "down"), banks, strict=True)
    ]
    bank = ExpertBank(packed[0], packed[1], 0, 4)
    assert_close(ops.experts(x, weights, physical_ids, bank), expected, 2e-2)


def int4(*shape: int, seed: int = 0) -> QuantizedWeight:
    values, scales = quantize(random(*shape, seed=seed).flatten(0, -2), group_size=32)
    return QuantizedWeight(values.view(*shape[:-1], -1), scales.view(*shape[:-1], -1))


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 13, 33, 130])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (7, 32), (33, 2080)])
def test_linear_of_4_bits_for_any_number_of_rows(
    ops: NativeCpuOps, rows: int, out: int, width: int
):
    x, weight, bias = random(rows, width), int4(out, width, seed=1), random(out, seed=2)
    packed = ops.prepare("layers.0.attention.out", weight)
    assert isinstance(packed, PackedWeight)
    assert packed.panels.nbytes == -(-out // 32) * 32 * width * 4.5 / 8
    assert_close(ops.linear(x, packed), REFERENCE.linear(x.float(), weight), 5e-3)
    expected = REFERENCE.linear(x.float(), weight, bias.float())
    assert_close(ops.linear(x, packed, bias), expected, 5e-3)


@pytest.mark.parametrize("num_tokens", [1, 9, 150])
@pytest.mark.parametrize("width", [32, 96])
def test_experts_of_4_bits(ops: NativeCpuOps, num_tokens: int, width: int):
    hidden_size, held = 64, 3
    x = random(num_tokens, hidden_size)
    banks = int4(held, 2 * width, hidden_size), int4(held, hidden_size, width, seed=1)
    generator = torch.Generator().manual_seed(1)
    physical_ids = torch.rand(num_tokens, 4, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(num_tokens, 2, generator=generator)
    packed = [
        ops.prepare(f"mlp.experts.{name}", one)
        for name, one in zip(("gate_up", "down"), banks, strict=True)
    ]
    expected = REFERENCE.experts(x, weights, physical_ids, ExpertBank(*banks, 0, 4))
    bank = ExpertBank(packed[0], packed[1], 0, 4)
    assert_close(ops.experts(x, weights, physical_ids, bank), expected, 2e-2)


def test_mlp_of_4_bits_whose_second_sum_is_long(ops: NativeCpuOps):
    hidden_size, width = 64, 5024
    x = random(70, hidden_size)
    gate_up, down = int4(2 * width, hidden_size), int4(hidden_size, width, seed=1)
    prepared = ops.prepare("gate_up", gate_up), ops.prepare("down", down)
    assert_close(ops.mlp(x, *prepared), REFERENCE.mlp(x, gate_up, down), 2e-2)


def test_tokens_without_an_expert_here_get_zero(ops: NativeCpuOps):
    bank = ExpertBank(
        ops.prepare("mlp.experts.gate_up", random(2, 64, 32)),
        ops.prepare("mlp.experts.down", random(2, 32, 32)),
        first=0,
        num_physical=4,
    )
    physical_ids = torch.tensor([[5, 4], [4, 5]])
    out = ops.experts(random(2, 32), torch.ones(2, 2), physical_ids, bank)
    assert not out.any()


@pytest.mark.parametrize("block_size", [16, 24])
@pytest.mark.parametrize("head_size", [16, 80, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2)])
def test_attention_over_several_chunks_of_keys(
    ops: NativeCpuOps, num_heads: int, num_kv_heads: int, head_size: int, block_size: int
):
    query_lens, context_lens = [1, 70, 1, 130, 1, 3], [0, 0, 200, 190, 63, 64]
    tables, used = [], 1
    for query_len, context_len in zip(query_lens, context_lens, strict=True):
        count = -(-(query_len + context_len) // block_size)
        tables.append([*range(used, used + count)][::-1])
        used += count
    batch = AttentionBatch.build(query_lens, context_lens, tables, block_size, torch.device("cpu"))
    total = sum(query_lens)
    # Slots of no sequence are NaN.
    caches = [torch.full((used, block_size, num_kv_heads, head_size), torch.nan).to(BF16)] * 2
    keys, values = (cache.clone() for cache in caches)
    for table, context_len in zip(tables, context_lens, strict=True):
        places = torch.arange(context_len)
        at = torch.tensor(table)[places // block_size], places % block_size
        for seed, cache in enumerate((keys, values)):
            cache[at] = random(context_len, num_kv_heads, head_size, seed=seed)
    cache = KVCache(keys, values)
    qkv = random(total, num_heads + 2 * num_kv_heads, head_size, seed=5)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
    ops.write_cache(k, v, cache, batch.slots)
    found = ops.attention(q, cache, batch, head_size**-0.5)
    double = KVCache(cache.keys.float(), cache.values.float())
    assert_close(found, REFERENCE.attention(q.float(), double, batch, head_size**-0.5))


@pytest.mark.parametrize("dtype", [BF16, torch.int8], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (20, 20), (6, 2)])
@pytest.mark.parametrize("head_size", [80, 128])
def test_decoding_after_contexts_that_threads_share(
    ops: NativeCpuOps, head_size: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
):
    """Parts of several chunks, and one of a few tokens."""
    context_lens, block_size = [1100, 1399, 4], 32
    blocks = itertools.count()
    tables = [list(itertools.islice(blocks, -(-(n + 1) // block_size))) for n in context_lens]
    batch = AttentionBatch.build([1] * 3, context_lens, tables, block_size, torch.device("cpu"))
    shape = (next(blocks), block_size, num_kv_heads, head_size)
    cache = KVCache.zeros(shape, dtype, torch.device("cpu"))
    slots = torch.arange(shape[0] * block_size, dtype=torch.int32)
    k, v = (random(len(slots), num_kv_heads, head_size, seed=seed) for seed in (1, 2))
    ops.write_cache(k, v, cache, slots)
    q = random(3, num_heads, head_size, scale=4)
    found = ops.attention(q, cache, batch, head_size**-0.5)
    expected = REFERENCE.attention(q.float(), cache, batch, head_size**-0.5)
    assert_close(found, expected)


def test_scores_that_overflow_exp_do_not_overflow_attention(ops: NativeCpuOps):
    batch = AttentionBatch.build([1, 80], [99, 0], [[0], [1]], 128, torch.device("cpu"))
    keys, values = random(2, 128, 1, 32, scale=60), random(2, 128, 1, 32, seed=1)
    q = random(81, 1, 32, scale=60)
    found = ops.attention(q, KVCache(keys, values), batch, 1.0)
    expected = REFERENCE.attention(q, KVCache(keys, values), batch, 1.0)
    assert_close(found, expected, 2e-2)


def test_swiglu_of_large_and_small_values(ops: NativeCpuOps):
    gate_up = torch.zeros(64, 32, dtype=BF16)
    gate_up[:32].fill_diagonal_(1)  # the gate is the input
    gate_up[32:, 0] = 1  # and up its first element
    down = torch.eye(32, dtype=BF16)
    x = torch.linspace(-200, 200, 32)[None].to(BF16)
    x[0, 0] = 1
    packed = [
        ops.prepare(name, weight.clone()) for name, weight in (("gate_up", gate_up), ("down", down))
    ]
    assert_close(ops.mlp(x, *packed), REFERENCE.mlp(x, gate_up, down))


@pytest.mark.parametrize("is_bfloat16", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 9, 300])
@pytest.mark.parametrize("num_experts", [3, 64, 70])
def test_routing(ops: NativeCpuOps, num_experts: int, num_tokens: int, is_bfloat16: bool):
    x, router = random(num_tokens, 48), torch.randn(num_experts, 48, generator=torch.Generator())
    router = router.bfloat16().float() if is_bfloat16 else router
    prepared = ops.prepare("layers.1.mlp.router", router)
    assert isinstance(prepared, PackedWeight) == is_bfloat16
    for renormalize in (False, True):
        weights, chosen = ops.route(x, prepared, 2, renormalize)
        expected, expected_chosen = REFERENCE.route(x, router, 2, renormalize)
        assert torch.equal(chosen.long(), expected_chosen)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [0.1, 0.125])  # the second is one of bfloat16
@pytest.mark.parametrize("num_experts", [3, 16, 70])
def test_of_experts_that_are_equally_likely_the_first_are_chosen(
    ops: NativeCpuOps, num_experts: int, number: float
):
    router = ops.prepare("router", torch.full((num_experts, 48), number))
    weights, chosen = ops.route(random(5, 48), router, 3, False)
    assert chosen.tolist() == [[0, 1, 2]] * 5
    torch.testing.assert_close(weights, torch.full((5, 3), 1 / num_experts))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("num_experts", [3, 70])
def test_experts_of_tokens_that_are_no_numbers_exist(
    ops: NativeCpuOps, num_experts: int, number: float
):
    router = ops.prepare("router", random(num_experts, 48).float())
    _, chosen = ops.route(torch.full((5, 48), number, dtype=BF16), router, 3, True)
    assert chosen.min() >= 0 and chosen.max() < num_experts
