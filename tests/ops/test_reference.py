"""What integers mean: the reference against the plainest float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moespan.checkpoint.quantization import QuantizedWeight, quantize, round_rows
from moespan.ops import KVCache, Ops, ReferenceOps
from tests.ops.contract import QuantizedContract, make_batch

OPS = ReferenceOps()


class TestReferenceOps(QuantizedContract):
    """What the contract checks without the reference; the rest of it is true of itself."""

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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(bad: float):
    rows = torch.ones(2, 4)
    rows[1, 2] = bad
    _, scales = round_rows(rows)
    assert scales.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1 << 19), (1000, 700), (0, 4), (4, 0)])
def test_large_matrices_are_rounded_as_small_ones_are(shape: tuple[int, int], dtype: torch.dtype):
    weight = random(*shape).to(dtype)
    for ours, theirs in zip(quantize(weight), round_rows(weight), strict=True):
        assert torch.equal(ours, theirs)


def test_parts_of_rows_are_rounded_with_the_scale_of_the_whole():
    weight = random(6, 32)
    maxima = weight.abs().amax(-1)
    values, scales = quantize(weight)
    for columns in (slice(0, 10), slice(10, 32), slice(0, 0)):
        part, part_scales = quantize(weight[:, columns], maxima)
        assert torch.equal(part, values[:, columns])
        assert torch.equal(part_scales, scales)


def test_weights_of_integers_stand_for_integer_times_scale():
    x, (values, scales) = random(5, 48), quantize(random(7, 48))
    weight = scales.double()[:, None] * values.double()
    expected = x.double() @ weight.T
    found = OPS.linear(x, QuantizedWeight(values, scales))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_rounded_activations_stand_for_integer_times_scale_too():
    x, (values, scales) = random(5, 48), quantize(random(7, 48))
    steps = x.double().abs().amax(-1, keepdim=True) / 127
    rounded = (x.double() / steps).round() * steps
    expected = rounded @ (scales.double()[:, None] * values.double()).T
    found = OPS.linear(x, QuantizedWeight(values, scales, activation_bits=8))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_of_integers_stands_for_integer_times_scale():
    batch, num_blocks = make_batch([3, 1], [2, 6], 4, torch.device("cpu"))
    integers, floats = (
        KVCache.zeros((num_blocks, 4, 2, 16), dtype, torch.device("cpu"))
        for dtype in (torch.int8, torch.float32)
    )
    slots = torch.arange(num_blocks * 4)
    k, v = random(len(slots), 2, 16), random(len(slots), 2, 16, seed=1)
    OPS.write_cache(k, v, integers, slots)
    rounded = [(x * 127 / (m := x.abs().amax(-1, True))).round() * m / 127 for x in (k, v)]
    OPS.write_cache(*rounded, floats, slots)
    q = random(4, 4, 16)
    expected = OPS.attention(q, floats, batch, 0.25)
    torch.testing.assert_close(OPS.attention(q, integers, batch, 0.25), expected)
