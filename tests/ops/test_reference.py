"""The meaning of 8-bit and 4-bit numbers: the reference against plain float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moespan.checkpoint.rounding import (
    MOST,
    QuantizedWeight,
    pack,
    quantize,
    round_groups,
    round_rows,
    unpack,
)
from moespan.ops import KVCache, Ops, ReferenceOps
from tests.ops.contract import QuantizedContract, make_batch

OPS = ReferenceOps()


class TestReferenceOps(QuantizedContract):
    """The parts of the contract that do not compare with the reference itself."""

    @pytest.fixture
    def ops(self) -> Ops:
        return OPS


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_rows_are_rounded_half_to_even_by_their_largest_magnitude():
    rows = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0, 0, 0, 0, 0], [-254, 3, 5, 1, 127]])
    values, scales = round_rows(rows)
    assert values.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0], [-127, 2, 2, 0, 64]]
    assert scales.tolist() == [1, 0, 2]


def test_rows_are_rounded_to_8_bit_floats_up_to_448():
    rows = torch.tensor([[448.0, 1.0625, 1.1875, -19, 2**-10], [0, 0, 0, 0, 0], [-896, 2, 0, 0, 1]])
    values, scales = round_rows(rows, dtype=torch.float8_e4m3fn)
    assert values.dtype == torch.float8_e4m3fn
    assert values.tolist() == [[448, 1, 1.25, -20, 0], [0, 0, 0, 0, 0], [-448, 1, 0, 0, 0.5]]
    assert scales.tolist() == [1, 0, 2]


def test_quotients_fit_8_bit_floats_even_with_subnormal_scales():
    values, scales = round_rows(torch.tensor([[1e-43, -4e-43]]), dtype=torch.float8_e4m3fn)
    assert scales.isfinite().all() and values.float().isfinite().all()
    parts, _ = round_rows(torch.tensor([[1e4, -1e4]]), torch.tensor([1.0]), torch.float8_e4m3fn)
    assert parts.tolist() == [[448, -448]]


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not_finite(bad: float, dtype: torch.dtype):
    rows = torch.ones(2, 4)
    rows[1, 2] = bad
    _, scales = round_rows(rows, dtype=dtype)
    assert scales.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1 << 19), (1000, 700), (0, 4), (4, 0)])
@pytest.mark.parametrize("target", MOST)
def test_large_matrices_are_rounded_like_small_ones(
    target: torch.dtype, shape: tuple[int, int], dtype: torch.dtype
):
    weight = random(*shape).to(dtype)
    found = quantize(weight, dtype=target)
    for ours, theirs in zip(found, round_rows(weight, dtype=target), strict=True):
        assert torch.equal(ours.float(), theirs.float())


@pytest.mark.parametrize("dtype", MOST)
def test_parts_of_rows_are_rounded_with_the_scale_of_the_whole(dtype: torch.dtype):
    weight = random(6, 32)
    maxima = weight.abs().amax(-1)
    values, scales = quantize(weight, dtype=dtype)
    for columns in (slice(0, 10), slice(10, 32), slice(0, 0)):
        part, part_scales = quantize(weight[:, columns], maxima, dtype)
        assert torch.equal(part.float(), values[:, columns].float())
        assert torch.equal(part_scales, scales)


@pytest.mark.parametrize("dtype", MOST)
def test_a_weight_is_its_value_times_its_scale(dtype: torch.dtype):
    x, (values, scales) = random(5, 48), quantize(random(7, 48), dtype=dtype)
    weight = scales.double()[:, None] * values.double()
    expected = x.double() @ weight.T
    found = OPS.linear(x, QuantizedWeight(values, scales))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_groups_are_rounded_so_that_their_largest_element_becomes_minus_8():
    groups = torch.tensor([[-8.0, 7.5, 0.5, 1.5], [4, -3.75, 0.25, -1], [0, 0, 0, 0]])
    packed, scales = round_groups(groups.repeat(1, 2).view(3, 8), 4)
    assert scales.tolist() == [[1, 1], [-0.5, -0.5], [0, 0]]
    # 7.5 would round to 8, which does not exist. Ties go to the even integer.
    expected = [[-8, 7, 0, 2] * 2, [-8, 7, 0, 2] * 2, [0] * 8]
    assert unpack(packed).tolist() == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_group_that_is_not_finite_has_a_scale_that_is_not_finite(bad: float):
    groups = torch.ones(1, 96)
    groups[0, 40] = bad
    _, scales = round_groups(groups, 32)
    assert scales.isfinite().tolist() == [[True, False, True]]


def test_eight_integers_are_packed_into_a_word_from_the_lowest_bits_on():
    integers = torch.tensor([[-8, -7, -6, -5, 7, 6, 5, 0]], dtype=torch.int8)
    assert pack(integers).tolist() == [[0x8DEF3210 - (1 << 32)]]
    assert torch.equal(unpack(pack(integers)), integers)


@pytest.mark.parametrize("shape", [(3, 32), (1000, 704), (0, 32)])
def test_large_matrices_are_rounded_to_4_bits_like_small_ones(shape: tuple[int, int]):
    weight = random(*shape).bfloat16()
    found = quantize(weight, group_size=32)
    for ours, theirs in zip(found, round_groups(weight, 32), strict=True):
        assert torch.equal(ours, theirs)


def test_a_4_bit_weight_is_its_integer_times_the_scale_of_its_group():
    x, (values, scales) = random(5, 96), quantize(random(7, 96), group_size=32)
    weight = unpack(values).double() * scales.double().repeat_interleave(32, 1)
    found = OPS.linear(x, QuantizedWeight(values, scales))
    torch.testing.assert_close(found.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_rounded_activation_is_its_integer_times_its_scale():
    x, (values, scales) = random(5, 48), quantize(random(7, 48))
    steps = x.double().abs().amax(-1, keepdim=True) / 127
    rounded = (x.double() / steps).round() * steps
    expected = rounded @ (scales.double()[:, None] * values.double()).T
    found = OPS.linear(x, QuantizedWeight(values, scales, activation_bits=8))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_8_bit_float_activation_is_its_value_times_its_scale():
    x, (values, scales) = random(5, 48), quantize(random(7, 48), dtype=torch.float8_e4m3fn)
    most = x.abs().amax(-1, keepdim=True)
    # Rounding steps are 1/8 of the power of two below, or of the smallest normal number, 2⁻⁶.
    scaled = x * 448 / most
    steps = torch.exp2(scaled.abs().log2().floor().clamp(-6) - 3)
    rounded = (scaled / steps).round() * steps * most / 448
    expected = rounded.double() @ (scales.double()[:, None] * values.double()).T
    found = OPS.linear(x, QuantizedWeight(values, scales, activation_bits=8))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_int8_cache_holds_integers_times_scales():
    batch, num_blocks = make_batch([3, 1], [2, 6], 4, torch.device("cpu"))
    integers, floats = (
        KVCache.zeros((num_blocks, 4, 2, 16), dtype, torch.device("cpu"))
        for dtype in (torch.int8, torch.float32)
    )
    slots = torch.arange(num_blocks * 4)
    k, v = random(len(slots), 2, 16), random(len(slots), 2, 16, seed=1)
    OPS.write_cache(k, v, integers, slots)
    keys, values = ((x * 127 / (m := x.abs().amax(-1, True))).round() * m / 127 for x in (k, v))
    OPS.write_cache(keys, values, floats, slots)
    q = random(4, 4, 16)
    expected = OPS.attention(q, floats, batch, 0.25)
    torch.testing.assert_close(OPS.attention(q, integers, batch, 0.25), expected)
