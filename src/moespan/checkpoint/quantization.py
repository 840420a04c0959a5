"""Weights of 8 bits, and the one way of rounding to them: by rows, symmetric, nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""What a row's largest element becomes; -128 is not used, so that the range is symmetric."""

# Rows are rounded in blocks of so many elements, which stay in a core's cache.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix, or a bank of them, in 8 bits and one scale for each output channel.

    Attributes:
        values: int8 from -127 to 127, or float8_e4m3fn, [..., out, in].
        scales: float32 [..., out]; a row's weights are its values times its scale.
        activation_bits: 8 where activations, too, are meant to be rounded to the dtype of `values`,
            symmetrically and anew for each token (W8A8); else 16: they stay as they are (W8A16).
    """

    values: Tensor
    scales: Tensor
    activation_bits: int = 16

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return int(self.values.nbytes + self.scales.nbytes)

    def __len__(self) -> int:
        """Of a bank: how many matrices."""
        return len(self.values)

    def __getitem__(self, index: int) -> QuantizedWeight:
        """Of a bank: one matrix."""
        return QuantizedWeight(self.values[index], self.scales[index], self.activation_bits)

    def dequantize(self) -> Tensor:
        """float32 [..., out, in]."""
        return self.values.float() * self.scales[..., None]


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


def quantize(
    x: Tensor, maxima: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """`round_rows` of a large matrix [out, in], with little memory beside the result."""
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(len(x), device=x.device)
    step = max(_BLOCK // max(x.shape[-1], 1), 1)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        known = None if maxima is None else maxima[rows]
        values[rows], scales[rows] = round_rows(x[rows], known, dtype)
    return values, scales
