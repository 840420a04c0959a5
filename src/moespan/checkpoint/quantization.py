"""Weights as 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix, or a bank of them, as integers and one scale for each output channel.

    Attributes:
        values: int8 [..., out, in], from -127 to 127.
        scales: float32 [..., out]; a row's weights are its integers times its scale.
        activation_bits: 8 where activations, too, are meant to be rounded to 8 bits, symmetrically
            and anew for each token (W8A8); else 16: they stay as they are (W8A16).
    """

    values: Tensor
    scales: Tensor
    activation_bits: int = 16

    def dequantize(self) -> Tensor:
        """float32 [..., out, in]."""
        return self.values.float() * self.scales[..., None]
