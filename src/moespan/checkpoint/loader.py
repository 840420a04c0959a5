"""Fills a rank's parameters from a source of weights, slice by slice, and rounds to 8 bits those
that are to be held so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from moespan.checkpoint.placement import Piece, Placement
from moespan.checkpoint.quantization import QuantizedWeight, allocate, quantize, row_maxima
from moespan.checkpoint.source import Source
from moespan.errors import CheckpointError
from moespan.memory import zeros

Loaded = dict[str, Tensor | QuantizedWeight]
"""Parameters by their names in the placement table."""


@dataclass(frozen=True)
class LoadReport:
    """What loading took: bytes read from the source, bytes now held, and seconds."""

    read_bytes: int
    held_bytes: int
    seconds: float


def load_weights(
    placement: Placement,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    *,
    check_finite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], object] = lambda read_bytes: None,
    maximum_over_tp: Callable[[Tensor], Tensor] = lambda maxima: maxima,
) -> tuple[Loaded, LoadReport]:
    """Allocate the parameters of `placement` on `device` and fill them.

    Where a row of a matrix that is to be rounded is cut over ranks, its parts are kept as they were
    read until these ranks have told each other their largest magnitudes: the scale is of the row.

    Args:
        check_finite: look for NaN and Inf in every slice that is read.
        threads: parallel readers; None is one per core of this rank, 8 at most.
        progress: called with the bytes of each slice that has been read.
        maximum_over_tp: the elementwise maximum over tp ranks of a float32 vector on the CPU;
            called once, if `placement.cut_rows` holds anything.

    Raises:
        CheckpointError: with `check_finite`, lists every tensor that holds NaN or Inf.
    """
    started = time.perf_counter()
    weights = {name: _allocate(placement, name, dtype, device) for name in placement.parameters}
    cut = _CutRows(placement.cut_rows)
    not_finite: list[str] = []

    def fill(pieces: list[Piece]) -> int:
        read_bytes = 0
        for piece, values in source.read(pieces):
            is_checked = check_finite and values.is_floating_point()
            if is_checked and not values.float().isfinite().all():  # of 8 bits torch asks none
                not_finite.append(f"{piece.source} holds NaN or Inf")
            if piece.source in placement.cut_rows:
                cut.add(piece, values)
            else:
                _store(weights[piece.parameter], piece, values)
            num_bytes = values.numel() * values.element_size()
            read_bytes += num_bytes
            progress(num_bytes)
        return read_bytes

    with ThreadPoolExecutor(threads or min(8, torch.get_num_threads())) as pool:
        read_bytes = sum(pool.map(fill, source.batches(placement.pieces)))
        if not_finite:
            raise CheckpointError("the checkpoint holds weights that are not finite", not_finite)
        if placement.cut_rows:
            maxima = cut.split(maximum_over_tp(cut.maxima))
            for piece, values in cut.drain():
                rows = maxima[piece.source][piece.source_index[0]].to(values.device)
                _store(weights[piece.parameter], piece, values, rows)
    held = sum(
        weight.num_bytes if isinstance(weight, QuantizedWeight) else weight.nbytes
        for weight in weights.values()
    )
    return weights, LoadReport(read_bytes, held, time.perf_counter() - started)


def _allocate(
    placement: Placement, name: str, dtype: torch.dtype, device: torch.device
) -> Tensor | QuantizedWeight:
    """Zeros, because padding must be."""
    parameter = placement.parameters[name]
    if parameter.scheme is not None:
        scheme = parameter.scheme
        values, scales = allocate(
            parameter.shape,
            getattr(torch, scheme.storage),
            scheme.group_size,
            lambda shape, dtype: zeros(shape, dtype, device),
        )
        return QuantizedWeight(values, scales, scheme.activation_bits)
    own = getattr(torch, parameter.dtype) if parameter.dtype else dtype
    return zeros(parameter.shape, own, device)


def _store(
    weight: Tensor | QuantizedWeight, piece: Piece, values: Tensor, maxima: Tensor | None = None
) -> None:
    """Put what was read into its place; `maxima` are those of its whole rows, float32 [rows]."""
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


class _CutRows:
    """Parts of rows, as they were read, and the largest magnitude in each.

    Attributes:
        maxima: float32, of all rows of all tensors; 0 where this rank has no part.
    """

    def __init__(self, num_rows: dict[str, int]) -> None:
        self.maxima = torch.zeros(sum(num_rows.values()))
        self._num_rows = num_rows
        self._maxima_of = self.split(self.maxima)
        self._parts: list[tuple[Piece, Tensor]] = []

    def split(self, maxima: Tensor) -> dict[str, Tensor]:
        """Name of a tensor → those of its rows."""
        return dict(zip(self._num_rows, maxima.split(list(self._num_rows.values())), strict=True))

    def add(self, piece: Piece, values: Tensor) -> None:
        """Keep a copy of what was read. Threads may call it, for different rows."""
        self._maxima_of[piece.source][piece.source_index[0]] = row_maxima(values)
        self._parts.append((piece, values.clone()))

    def drain(self) -> Iterator[tuple[Piece, Tensor]]:
        """What was added, each part for the last time."""
        while self._parts:
            yield self._parts.pop()
