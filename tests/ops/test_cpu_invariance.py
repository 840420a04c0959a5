"""With `batch_invariant` the kernels for CPUs give a row the same bits, whatever is beside it.

Every operation is computed for all rows at once, and for the same rows cut into groups.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moespan.checkpoint.rounding import QuantizedWeight, quantize
from moespan.config import EngineConfig
from moespan.errors import ConfigError
from moespan.ops import AttentionBatch, ExpertBank, KVCache, ops_for
from moespan.ops.base import Weight
from moespan.ops.cpu.native import NativeCpuOps
from tests import tiers
from tests.ops.test_cpu_native import BF16, int4, kinds_of_processors, random

ROWS = 40

# How many rows each group has; what is left is the last group.
cuts = st.lists(st.integers(1, 9), max_size=ROWS)
some = settings(max_examples=tiers.examples(15))


@pytest.fixture(scope="module", params=tiers.every(kinds_of_processors(), nth=9), ids=" ".join)
def ops(request: pytest.FixtureRequest) -> NativeCpuOps:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no compiler")
    return NativeCpuOps(*request.param, batch_invariant=True)


def groups(sizes: list[int], total: int = ROWS) -> list[slice]:
    ends = [end for end in itertools.accumulate(sizes, initial=0) if end < total] + [total]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def assert_independent(run: Callable[[slice], Tensor], sizes: list[int]) -> None:
    whole = run(slice(0, ROWS))
    for group in groups(sizes):
        assert torch.equal(run(group), whole[group]), group


def matrix(scheme: str, *shape: int) -> Tensor | QuantizedWeight:
    if scheme == "bfloat16":
        return random(*shape, scale=0.3)
    if scheme == "int4":
        return int4(*shape)
    values, scales = quantize(random(*shape).flatten(0, -2))
    bits = {"int8": 16, "w8a8": 8}[scheme]
    return QuantizedWeight(values.view(shape), scales.view(shape[:-1]), bits)


@pytest.fixture(scope="module", params=["bfloat16", "int8", "w8a8", "int4"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@some
@given(sizes=cuts)
def test_linear(ops: NativeCpuOps, scheme: str, sizes: list[int]) -> None:
    x, weight = random(ROWS, 2080), ops.prepare("head", matrix(scheme, 500, 2080))
    assert_independent(lambda rows: ops.linear(x[rows], weight), sizes)


@some
@given(sizes=cuts)
def test_experts(ops: NativeCpuOps, scheme: str, sizes: list[int]) -> None:
    x, held = random(ROWS, 512), 3
    pair: list[Weight] = [
        ops.prepare(f"mlp.experts.{name}", matrix(scheme, held, *shape))
        for name, shape in (("gate_up", (448, 512)), ("down", (512, 224)))
    ]
    bank = ExpertBank(pair[0], pair[1], 0, held)
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(ROWS, held, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(ROWS, 2, generator=generator)
    assert_independent(lambda rows: ops.experts(x[rows], weights[rows], ids[rows], bank), sizes)


@some
@given(sizes=cuts)
def test_mlp_whose_second_sum_is_long(ops: NativeCpuOps, sizes: list[int]) -> None:
    """Long sums of many rows are otherwise cut into parts."""
    x, width = random(ROWS, 64), 4128
    gate_up = ops.prepare("gate_up", random(2 * width, 64, scale=0.3))
    down = ops.prepare("down", random(64, width, scale=0.3))
    assert_independent(lambda rows: ops.mlp(x[rows], gate_up, down), sizes)


@some
@given(sizes=cuts)
def test_norms(ops: NativeCpuOps, sizes: list[int]) -> None:
    x, residual, weight = random(ROWS, 64), random(ROWS, 64, seed=1), random(64)
    assert_independent(
        lambda rows: ops.add_rms_norm(x[rows], residual[rows], weight, 1e-6)[0], sizes
    )


@pytest.mark.parametrize("is_bfloat16", [False, True])
@some
@given(sizes=cuts)
def test_routers(ops: NativeCpuOps, is_bfloat16: bool, sizes: list[int]) -> None:
    x, router = random(ROWS, 64), torch.randn(70, 64, generator=torch.Generator())
    prepared = ops.prepare("mlp.router", router.bfloat16().float() if is_bfloat16 else router)
    assert_independent(lambda rows: ops.route(x[rows], prepared, 6, True)[0], sizes)


@pytest.mark.parametrize("is_int8", [False, True])
@some
@given(sizes=cuts)
def test_attention_in_any_chunks(ops: NativeCpuOps, is_int8: bool, sizes: list[int]) -> None:
    """The last tokens of a sequence of 300, in one chunk or in several, some of one token."""
    heads, kv_heads, head_size, block_size, before = 4, 2, 32, 16, 260
    total = before + ROWS
    table = [*range(1, -(-total // block_size) + 1)]
    shape = (len(table) + 1, block_size, kv_heads, head_size)
    cache = KVCache.zeros(shape, torch.int8 if is_int8 else BF16, torch.device("cpu"))
    q = random(ROWS, heads, head_size)
    k, v = random(total, kv_heads, head_size, seed=1), random(total, kv_heads, head_size, seed=2)

    def batch(start: int, end: int) -> AttentionBatch:
        return AttentionBatch.build(
            [end - start], [start], [table], block_size, torch.device("cpu")
        )

    ops.write_cache(k, v, cache, batch(0, total).slots)

    def run(rows: slice) -> Tensor:
        return ops.attention(q[rows], cache, batch(before + rows.start, before + rows.stop), 0.2)

    assert_independent(run, sizes)


def test_without_the_option_rows_depend_on_each_other() -> None:
    """So that the tests above can fail."""
    ops = ops_for("cpu")
    if not isinstance(ops, NativeCpuOps):
        pytest.skip("there is no compiler")
    x, weight = random(ROWS, 2080), ops.prepare("head", random(500, 2080))
    alone = torch.cat([ops.linear(row[None], weight) for row in x])
    assert not torch.equal(alone, ops.linear(x, weight))


@pytest.mark.parametrize(
    ("name", "weight", "said"),
    [
        ("layers.0.attention.out", random(8, 7), r"attention.out of shape \[8, 7\]"),
        ("head", QuantizedWeight(torch.zeros(8, 64).to(torch.float8_e4m3fn), torch.ones(8), 8), ""),
    ],
    ids=["odd rows", "8-bit floats"],
)
def test_what_the_kernels_do_not_take_is_refused(
    ops: NativeCpuOps, name: str, weight: Tensor | QuantizedWeight, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"batch_invariant needs the kernels .*{said}"):
        ops.prepare(name, weight)


def test_head_sizes_that_the_kernels_do_not_take_are_refused(ops: NativeCpuOps) -> None:
    cache = KVCache.zeros((2, 16, 2, 20), BF16, torch.device("cpu"))
    batch = AttentionBatch.build([1], [0], [[1]], 16, torch.device("cpu"))
    with pytest.raises(ConfigError, match="a head size of 20"):
        ops.attention(random(1, 2, 20), cache, batch, 1.0)
    with pytest.raises(ConfigError, match="a hidden size of 20"):
        ops.rms_norm(random(1, 20), random(20), 1e-6)


def test_without_a_compiler_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"batch_invariant needs .* cannot be built"):
        ops_for("cpu", EngineConfig("unused", dtype="bfloat16", batch_invariant=True))
