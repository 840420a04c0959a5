"""Builders: they assemble a rank's parameters from the slices that are read.

A builder is the seam between the loader and the operations. The loader knows files and slices; the
operations know how weights lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from moespan.checkpoint.placement import Parameter, Piece
from moespan.checkpoint.rounding import QuantizedWeight, allocate, check_scales, quantize
from moespan.memory import zeros


class Builder(Protocol):
    """Assembles one parameter. Pieces come in any order and from several threads at once."""

    def put(self, piece: Piece, values: Tensor, maxima: Tensor | None = None) -> None:
        """Take in the `values` of `piece`. The memory of `values` may change after the call.

        For a quantised parameter, `values` are floats to round, values in few bits, or scales.

        Args:
            maxima: float32 [rows], the largest magnitudes of the whole rows, if `values` are parts
                of rows.

        Raises:
            NotFiniteError: weights to be rounded, or scales, hold NaN or Inf.
        """

    def finish(self) -> Any:
        """The parameter, with zeros where no piece was put. Called once, after all pieces."""


Loaded = dict[str, Any]
"""Name in the placement table → parameter, as its builder made it."""


class KeptWeights(Protocol):
    """The finished parameters of one placement, kept in a file for later starts.

    Attributes:
        mapped_bytes: bytes of those that `find` or `keeping` has mapped from the file: pages that
            count as free memory, although the engine needs them.
    """

    mapped_bytes: int

    def find(self) -> Loaded | None:
        """The kept parameters; None if they have to be loaded."""

    def keeping(self) -> AbstractContextManager[Callable[[str, Any], Any]]:
        """A block in which parameters are kept: its function takes a name and a parameter, and
        returns a parameter with the same values, whose memory may be the file's."""


NewBuilder = Callable[[str, Parameter, torch.dtype, torch.device], Builder]
"""Makes a builder from a parameter's name and description, the engine's dtype, and the device."""


class TensorBuilder:
    """Builds a tensor or a `QuantizedWeight` of the shape in the placement table.

    Args:
        prepare: turns the finished weight into the parameter.
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
        # Padding must be zero.
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
        """Copy `values` to the device; floats for a quantised parameter are rounded there."""
        weight = self._weight
        if isinstance(weight, Tensor):
            weight[piece.index].copy_(values)
        elif piece.is_scale:
            check_scales(values)
            weight.scales[piece.index].copy_(values)
        elif values.dtype == weight.values.dtype:
            weight.values[piece.index].copy_(values)
        else:
            known = None if maxima is None else maxima.to(values.device)
            parts = quantize(values, known, weight.values.dtype, weight.group_size)
            for to, part in zip((weight.values, weight.scales), parts, strict=True):
                # Columns begin at 0, whether they count elements, packed int32s or groups.
                columns = tuple(slice(0, size) for size in part.shape[1:])
                to[piece.index[:-1] + columns].copy_(part)

    def finish(self) -> Any:
        """The weight, after `prepare`."""
        return self._prepare(self._name, self._weight)
