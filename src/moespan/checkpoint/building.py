"""How what is read becomes the parameters that a rank holds: the seam between the loader, which
knows files and slices, and the operations, which know how weights lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from moespan.checkpoint.placement import Parameter, Piece
from moespan.checkpoint.quantization import QuantizedWeight, quantize
from moespan.memory import zeros


class Builder(Protocol):
    """One parameter while its pieces arrive, in any order and from several threads at once."""

    def put(self, piece: Piece, values: Tensor, maxima: Tensor | None = None) -> None:
        """Take in what was read of `piece`: of a parameter of integers floats, which are rounded,
        integers, or scales. `values` may change after the call.

        Args:
            maxima: the largest magnitudes of the rows that `values` are parts of, float32 [rows].
        """

    def finish(self) -> Any:
        """The parameter, once all its pieces are there; zero where none was. Called once."""


NewBuilder = Callable[[str, Parameter, torch.dtype, torch.device], Builder]
"""From the name of a parameter, what it is, the engine's dtype, and the device to hold it."""


class TensorBuilder:
    """Builds a tensor, or `QuantizedWeight`, by the rows of the placement table.

    Args:
        prepare: what is made of it in the end.
    """

    def __init__(
        self,
        name: str,
        parameter: Parameter,
        dtype: torch.dtype,
        device: torch.device,
        prepare: Callable[[str, Tensor | QuantizedWeight], Any] = lambda name, weight: weight,
    ) -> None:
        self._name, self._prepare = name, prepare
        self._weight: Tensor | QuantizedWeight
        # Zeros, because padding must be.
        if parameter.activation_bits is None:
            own = getattr(torch, parameter.dtype) if parameter.dtype else dtype
            self._weight = zeros(parameter.shape, own, device)
        else:
            self._weight = QuantizedWeight(
                zeros(parameter.shape, torch.int8, device),
                zeros(parameter.shape[:-1], torch.float32, device),
                parameter.activation_bits,
            )

    def put(self, piece: Piece, values: Tensor, maxima: Tensor | None = None) -> None:
        """Copied to the device, and rounded there."""
        weight = self._weight
        if isinstance(weight, Tensor):
            weight[piece.index].copy_(values)
        elif piece.is_scale:
            weight.scales[piece.index].copy_(values)
        elif values.dtype == torch.int8:
            weight.values[piece.index].copy_(values)
        else:
            known = None if maxima is None else maxima.to(values.device)
            integers, scales = quantize(values, known)
            weight.values[piece.index].copy_(integers)
            weight.scales[piece.index[:-1]].copy_(scales)

    def finish(self) -> Any:
        """What `prepare` makes of it."""
        return self._prepare(self._name, self._weight)
