"""How what is read becomes the parameters that a rank holds: the seam between the loader, which
knows files and slices, and the operations, which know how weights lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from moespan.checkpoint.placement import Parameter, Piece
from moespan.checkpoint.rounding import QuantizedWeight, allocate, quantize
from moespan.memory import zeros


class Builder(Protocol):
    """One parameter while its pieces arrive, in any order and from several threads at once."""

    def put(self, piece: Piece, values: Tensor, maxima: Tensor | None = None) -> None:
        """Take in what was read of `piece`: of a quantised parameter floats, which are rounded,
        values in few bits, or scales. `values` may change after the call.

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
        scheme = parameter.scheme
        if scheme is None:
            own = getattr(torch, parameter.dtype) if parameter.dtype else dtype
            self._weight = zeros(parameter.shape, own, device)
        else:
            values, scales = allocate(
                parameter.shape,
                getattr(torch, scheme.storage),
                scheme.group_size,
                lambda shape, dtype: zeros(shape, dtype, device),
            )
            self._weight = QuantizedWeight(values, scales, scheme.activation_bits)

    def put(self, piece: Piece, values: Tensor, maxima: Tensor | None = None) -> None:
        """Copied to the device, and rounded there."""
        weight = self._weight
        if isinstance(weight, Tensor):
            weight[piece.index].copy_(values)
        elif piece.is_scale:
            weight.scales[piece.index].copy_(values)
        elif values.dtype == weight.values.dtype:
            weight.values[piece.index].copy_(values)
        else:
            known = None if maxima is None else maxima.to(values.device)
            parts = quantize(values, known, weight.values.dtype, weight.group_size)
            for to, part in zip((weight.values, weight.scales), parts, strict=True):
                # Columns begin at 0, whatever they are counted in.
                columns = tuple(slice(0, size) for size in part.shape[1:])
                to[piece.index[:-1] + columns].copy_(part)

    def finish(self) -> Any:
        """What `prepare` makes of it."""
        return self._prepare(self._name, self._weight)
