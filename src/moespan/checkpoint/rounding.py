"""Weights of 8 and of 4 bits, and the ways of rounding to them: rows to 8, groups to 4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""What a row's largest element becomes; -128 is not used, so that the range is symmetric."""

# Rows are rounded in blocks of so many elements, which stay in a core's cache.
_BLOCK = 1 << 18
# 4-bit integers are stored + 8, eight to an int32, the first in its lowest bits.
_OFFSET, _PER_WORD = 8, 8


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix, or a bank of them, in few bits, with scales of rows (8 bits) or of groups (4 bits).

    Attributes:
        values: int8 from -127 to 127, or float8_e4m3fn, [..., out, in]; or, of 4 bits, int32
            [..., out, in / 8] of eight integers from -8 to 7 each, as `pack` packs them.
        scales: float32 [..., out]; a row's weights are its values times its scale. Of 4 bits,
            bfloat16 [..., out, groups]: the same of equal groups along `in`.
        activation_bits: 8 where activations, too, are meant to be rounded to the dtype of `values`,
            symmetrically and anew for each token (W8A8); else 16: they stay as they are (W8A16,
            W4A16).
    """

    values: Tensor
    scales: Tensor
    activation_bits: int = 16

    @property
    def group_size(self) -> int | None:
        """How many neighbours of a row have one scale, of 4 bits; None is the whole row, of 8."""
        if self.values.dtype != torch.int32:
            return None
        return int(self.values.shape[-1] * _PER_WORD // self.scales.shape[-1])

    def __len__(self) -> int:
        """Of a bank: how many matrices."""
        return len(self.values)

    def __getitem__(self, index: int) -> QuantizedWeight:
        """Of a bank: one matrix."""
        return QuantizedWeight(self.values[index], self.scales[index], self.activation_bits)

    def dequantize(self) -> Tensor:
        """float32 [..., out, in]."""
        if self.group_size is None:
            return self.values.float() * self.scales[..., None]
        groups = unpack(self.values).float().unflatten(-1, (-1, self.group_size))
        return (groups * self.scales.float()[..., None]).flatten(-2)


def row_maxima(x: Tensor) -> Tensor:
    """The largest magnitude in each row, float32 [...], of x [..., in]; 0 for empty rows."""
    if not x.shape[-1]:
        return torch.zeros(x.shape[:-1], device=x.device)
    return x.abs().amax(-1).float()


def round_rows(
    x: Tensor, maxima: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Values of `dtype` [..., in] and scales float32 [...] of x [..., in].

    A row's scale is its largest magnitude / `MOST`, and its values are its elements / scale in
    float32, rounded half to even. A row of zeros has scale 0; one with NaN or Inf has a scale that
    is not finite.

    Args:
        maxima: float32 [...], the largest magnitudes, where x holds parts of rows only.
        dtype: int8 or float8_e4m3fn.
    """
    scales = (row_maxima(x) if maxima is None else maxima) / MOST[dtype]
    divisors = torch.where(scales == 0, 1, scales)[..., None]
    values = x.float() / divisors
    # The conversion cuts integers off; floats it rounds, but what is too large may become NaN.
    rounded = values.round_() if dtype == torch.int8 else values.clamp_(-MOST[dtype], MOST[dtype])
    return rounded.to(dtype), scales


def round_groups(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """4-bit integers, packed int32 [..., in / 8], and scales bfloat16 [..., groups] of x [..., in],
    whose rows are whole groups.

    A group's scale is its element of largest magnitude / -8, rounded to bfloat16, so that this
    element takes the one integer that has no opposite; scales have either sign. Integers are
    elements / scale in float32, rounded half to even, from -8 to 7. A group of zeros has scale 0;
    one with NaN or Inf has a scale that is not finite.
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)  # a tenth of the time that `aminmax` takes
    extremes = torch.where(high > -low, high, low)
    scales = (extremes / -_OFFSET).to(torch.bfloat16)
    divisors = torch.where(scales == 0, 1, scales).float()[..., None]
    integers = (groups / divisors).round_().clamp_(-_OFFSET, _OFFSET - 1)
    return pack(integers.flatten(-2).to(torch.int8)), scales


def pack(integers: Tensor) -> Tensor:
    """int32 [..., in / 8] of integers from -8 to 7, int8 [..., in]: each stored + 8 in 4 bits, the
    first in the lowest ones (the form `pack-quantized` of compressed-tensors)."""
    stored = (integers + _OFFSET).view(torch.uint8)
    return (stored[..., 0::2] | stored[..., 1::2] << 4).view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int8 [..., in] of what `pack` made, int32 [..., in / 8]."""
    stored = packed.contiguous().view(torch.uint8)
    pairs = torch.stack([stored & 15, stored >> 4], -1).flatten(-2)
    return pairs.view(torch.int8) - _OFFSET


def allocate(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    group_size: int | None,
    make: Callable[[tuple[int, ...], torch.dtype], Tensor],
) -> tuple[Tensor, Tensor]:
    """What `make` makes for values and scales, as a `QuantizedWeight` has them, of a matrix or a
    bank of `shape` [..., out, in]: of `dtype`, or of 4 bits with a `group_size`."""
    *rows, width = shape
    if group_size is None:
        return make(shape, dtype), make((*rows,), torch.float32)
    groups = make((*rows, width // group_size), torch.bfloat16)
    return make((*rows, width // _PER_WORD), torch.int32), groups


def quantize(
    x: Tensor,
    maxima: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`round_rows` to `dtype`, or with a `group_size` `round_groups`, of a large matrix [out, in],
    with little memory beside the result."""
    values, scales = allocate(
        tuple(x.shape),
        dtype,
        group_size,
        lambda shape, dtype: torch.empty(shape, dtype=dtype, device=x.device),
    )
    step = max(_BLOCK // max(x.shape[-1], 1), 1)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        if group_size is not None:
            values[rows], scales[rows] = round_groups(x[rows], group_size)
        else:
            known = None if maxima is None else maxima[rows]
            values[rows], scales[rows] = round_rows(x[rows], known, dtype)
    return values, scales
