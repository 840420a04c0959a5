"""Packs matrices into the panels that the kernels read (`kernels/packing.h`), row by row."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moespan.checkpoint.panels import PANEL, padded
from moespan.checkpoint.placement import Piece
from moespan.checkpoint.rounding import check_scales, quantize
from moespan.memory import zeros

_LANES = 16
_BF16, _W8A8, _W8A16, INT4 = range(4)

# Rows are rounded in chunks of about this many elements, and packed while a cache holds them.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class PackedWeight:
    """`count` matrices [out, in] in the panels that `kernels/packing.h` describes.

    Attributes:
        kind: 0 bfloat16, 1 int8 for activations of 8 bits, 2 int8 for activations of 16 bits, 3
            weights of 4 bits.
        padded_out: channels, including the padding of the last panel.
        width: inputs `in`.
        scales, sums: float32 and int32 [count, padded_out], for int8 weights; else None.
    """

    panels: Tensor
    kind: int
    count: int
    out: int
    padded_out: int
    width: int
    scales: Tensor | None = None
    sums: Tensor | None = None

    @functools.cached_property
    def pointers(self) -> tuple[int, int | None, int | None]:
        """Addresses of panels, scales and sums."""
        scales, sums = (
            None if part is None else part.data_ptr() for part in (self.scales, self.sums)
        )
        return self.panels.data_ptr(), scales, sums


class PackedBuilder:
    """Packs the pieces of a matrix [out, in], or of a bank of matrices, while they are read: one
    pass over memory. See `moespan.checkpoint.building.Builder`.

    Args:
        kernels: the library.
        shape: [..., out, in].
        activation_bits: as in `QuantizedWeight` for int8; None for bfloat16.
    """

    def __init__(
        self,
        kernels: ctypes.CDLL,
        shape: tuple[int, ...],
        activation_bits: int | None,
        is_gate_up: bool,
    ) -> None:
        self._kernels, self._bits, self._is_gate_up = kernels, activation_bits, is_gate_up
        *bank, self._out, self._width = shape
        self._count = bank[0] if bank else 1
        self._padded_out = padded(self._out, is_gate_up)
        cpu = torch.device("cpu")
        dtype = torch.bfloat16 if self._bits is None else torch.int8
        # Zeros, because padding is never written.
        self._panels = zeros((self._count, self._padded_out, self._width), dtype, cpu)
        # In the order of rows; `finish` reorders them by channel.
        self._scales = torch.zeros(self._count, self._out)
        self._sums = torch.zeros(self._count, self._out, dtype=torch.int32)

    def put(self, piece: Piece, values: Tensor, maxima: Tensor | None = None) -> None:
        """Take in rows of one matrix, from column 0 on; the rest of each row is padding."""
        *bank, rows = piece.index if piece.is_scale else piece.index[:-1]
        matrix, first = bank[0] if bank else 0, rows.start
        if piece.is_scale:
            check_scales(values)
            self._scales[matrix, rows] = values
        elif self._bits is None or values.dtype == torch.int8:
            self._pack(matrix, first, values.to(self._panels.dtype))
        else:
            step = max(_CHUNK // values.shape[1], _LANES)
            for at in range(0, len(values), step):
                chunk = slice(at, at + step)
                known = None if maxima is None else maxima[chunk]
                integers, scales = self._round(values[chunk], known)
                self._scales[matrix, first + at : first + at + len(scales)] = scales
                self._pack(matrix, first + at, integers)

    def put_all(self, values: Tensor, scales: Tensor | None) -> None:
        """Pack the whole parameter; `scales` [..., out] where `values` are int8."""
        for i, matrix in enumerate(values.reshape(self._count, self._out, self._width)):
            self._pack(i, 0, matrix)
        if scales is not None:
            self._scales.copy_(scales.reshape(self._scales.shape))

    def finish(self) -> PackedWeight:
        """The packed weight."""
        kind, scales, sums = _BF16, None, None
        if self._bits is not None:
            kind = _W8A8 if self._bits == 8 else _W8A16
            scales, sums = self._by_channel(self._scales), self._by_channel(self._sums)
        return PackedWeight(
            self._panels, kind, self._count, self._out, self._padded_out, self._width, scales, sums
        )

    def _pack(self, matrix: int, first: int, rows: Tensor) -> None:
        """Pack rows [rows, columns] of the panels' dtype, from row `first` of `matrix` on."""
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        sums = self._sums[matrix, first:]
        self._kernels.moespan_pack(
            rows.data_ptr(),
            rows.stride(0) * rows.itemsize,
            rows.shape[1] * rows.itemsize,
            first,
            len(rows),
            self._out,
            self._width * rows.itemsize,
            self._is_gate_up,
            self._panels[matrix].data_ptr(),
            None if self._bits is None else sums.data_ptr(),
        )

    def _round(self, rows: Tensor, maxima: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result of `quantize`: int8 [rows, columns] and float32 [rows]."""
        if rows.dtype != torch.bfloat16:
            return quantize(rows, maxima)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        maxima = None if maxima is None else maxima.contiguous()
        integers = torch.empty(rows.shape, dtype=torch.int8)
        scales = torch.empty(len(rows))
        self._kernels.moespan_round(
            rows.data_ptr(),
            rows.stride(0),
            *rows.shape,
            None if maxima is None else maxima.data_ptr(),
            integers.data_ptr(),
            scales.data_ptr(),
        )
        check_scales(scales)
        return integers, scales

    def _by_channel(self, x: Tensor) -> Tensor:
        """[count, out] in the order of rows → [count, padded out] in the order of channels."""
        halves = 2 if self._is_gate_up else 1
        panels, lanes = self._padded_out // PANEL, PANEL // halves
        padded = x.new_zeros(self._count, halves, panels * lanes)
        padded[..., : self._out // halves] = x.view(self._count, halves, -1)
        by_panel = padded.view(self._count, halves, panels, lanes).transpose(1, 2)
        return by_panel.reshape(self._count, self._padded_out)
