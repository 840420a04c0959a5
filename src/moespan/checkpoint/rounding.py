"""Weights of 8 and 4 bits, and the rounding to them: rows to 8 bits, groups to 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""Dtype → the value of a row's largest element; -128 is unused, so that the range is symmetric."""


class NotFiniteError(ValueError):
    """Weights to be rounded, or scales, hold NaN or Inf, which integers would hide."""


# Elements that are rounded at once; they stay in a core's cache.
_ELEMENTS_AT_ONCE = 1 << 18
# A 4-bit integer is stored + 8; eight make one int32, the first in its lowest bits.
_OFFSET, _PER_WORD = 8, 8


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix or a bank of matrices in few bits, with scales of rows (8) or of groups (4 bits).

    Attributes:
        values: 8 bits: int8 from -127 to 127, or float8_e4m3fn, [..., out, in]. 4 bits: int32
            [..., out, in / 8], each of eight integers from -8 to 7, as `pack` packs them.
        scales: 8 bits: float32 [..., out]; the weights of a row are its values times its scale. 4
            bits: bfloat16 [..., out, groups], one scale for each of the equal groups along `in`.
        activation_bits: 8 if activations, too, are rounded to the dtype of `values`, symmetrically
            and anew for each token (W8A8); 16 if they are not rounded (W8A16, W4A16).
    """

    values: Tensor
    scales: Tensor
    activation_bits: int = 16

    @property
    def group_size(self) -> int | None:
        """4 bits: number of neighbours in a row with one scale. 8 bits: None, the whole row."""
        if self.values.dtype != torch.int32:
            return None
        return int(self.values.shape[-1] * _PER_WORD // self.scales.shape[-1])

    def __len__(self) -> int:
        """Number of matrices in a bank."""
        return len(self.values)

    def __getitem__(self, index: int) -> QuantizedWeight:
        """One matrix of a bank."""
        return QuantizedWeight(self.values[index], self.scales[index], self.activation_bits)

    def dequantize(self) -> Tensor:
        """The weights as float32 [..., out, in]."""
        if self.group_size is None:
            return self.values.float() * self.scales[..., None]
        groups = unpack(self.values).float().unflatten(-1, (-1, self.group_size))
        return (groups * self.scales.float()[..., None]).flatten(-2)


def row_maxima(x: Tensor) -> Tensor:
    """The largest magnitude in each row of x [..., in]: float32 [...], 0 for empty rows."""
    if not x.shape[-1]:
        return torch.zeros(x.shape[:-1], device=x.device)
    return x.abs().amax(-1).float()


def check_scales(scales: Tensor) -> None:
    """Refuse scales of weights that are not finite: those of rows and groups with NaN or Inf.

    Rounded weights hide both: an integer is finite, and so is the product that it takes part in.

    Raises:
        NotFiniteError: a scale is NaN or Inf.
    """
    if not scales.isfinite().all():
        raise NotFiniteError


def round_rows(
    x: Tensor, maxima: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Round x [..., in] to values of `dtype` [..., in] and scales float32 [...].

    A row's scale is its largest magnitude / `MOST`. Its values are its elements / scale in float32,
    rounded half to even. A row of zeros has scale 0. A row with NaN or Inf has a scale that is not
    finite.

    Args:
        maxima: float32 [...], the largest magnitudes of the whole rows, if x holds parts of rows.
        dtype: int8 or float8_e4m3fn.
    """
    scales = (row_maxima(x) if maxima is None else maxima) / MOST[dtype]
    divisors = torch.where(scales == 0, 1, scales)[..., None]
    values = x.float() / divisors
    # Conversion to int8 truncates, so round first. Conversion to float8 rounds, but may make NaN of
    # values that are too large.
    rounded = values.round_() if dtype == torch.int8 else values.clamp_(-MOST[dtype], MOST[dtype])
    return rounded.to(dtype), scales


def round_groups(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round x [..., in], whose rows are whole groups, to packed 4-bit integers, int32
    [..., in / 8], and scales bfloat16 [..., groups].

    A group's scale is its element of largest magnitude / -8, rounded to bfloat16. That element thus
    becomes -8, the one integer without an opposite, and scales have either sign. Integers are
    elements / scale in float32, rounded half to even, from -8 to 7. A group of zeros has scale 0. A
    group with NaN or Inf has a scale that is not finite.
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)  # takes a tenth of the time of `aminmax`
    extremes = torch.where(high > -low, high, low)
    scales = (extremes / -_OFFSET).to(torch.bfloat16)
    divisors = torch.where(scales == 0, 1, scales).float()[..., None]
    integers = (groups / divisors).round_().clamp_(-_OFFSET, _OFFSET - 1)
    return pack(integers.flatten(-2).to(torch.int8)), scales


def pack(integers: Tensor) -> Tensor:
    """Pack integers from -8 to 7, int8 [..., in], into int32 [..., in / 8].

    Each integer is stored + 8 in 4 bits, the first in the lowest bits: the form `pack-quantized` of
    compressed-tensors.
    """
    stored = (integers + _OFFSET).view(torch.uint8)
    return (stored[..., 0::2] | stored[..., 1::2] << 4).view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: int32 [..., in / 8] → int8 [..., in]."""
    stored = packed.contiguous().view(torch.uint8)
    pairs = torch.stack([stored & 15, stored >> 4], -1).flatten(-2)
    return pairs.view(torch.int8) - _OFFSET


def allocate(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    group_size: int | None,
    make: Callable[[tuple[int, ...], torch.dtype], Tensor],
) -> tuple[Tensor, Tensor]:
    """Allocate values and scales of a `QuantizedWeight` of `shape` [..., out, in].

    Args:
        dtype: dtype of the values; ignored for 4 bits.
        group_size: columns of one scale, for 4 bits; None is 8 bits.
        make: allocates a tensor from its shape and dtype.
    """
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
    """Round a large matrix x [out, in] with little memory in addition to the result.

    Without a `group_size` as `round_rows` to `dtype`; with one as `round_groups`.

    Raises:
        NotFiniteError: x, or `maxima`, holds NaN or Inf.
    """
    values, scales = allocate(
        tuple(x.shape),
        dtype,
        group_size,
        lambda shape, dtype: torch.empty(shape, dtype=dtype, device=x.device),
    )
    step = max(_ELEMENTS_AT_ONCE // max(x.shape[-1], 1), 1)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        if group_size is not None:
            values[rows], scales[rows] = round_groups(x[rows], group_size)
        else:
            known = None if maxima is None else maxima[rows]
            values[rows], scales[rows] = round_rows(x[rows], known, dtype)
    check_scales(scales)
    return values, scales
