"""The loader: reads a rank's slices from a source and hands them to the builders of parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moespan.checkpoint.building import Loaded, NewBuilder, TensorBuilder
from moespan.checkpoint.placement import Piece, Placement
from moespan.checkpoint.rounding import NotFiniteError, check_scales, row_maxima
from moespan.checkpoint.source import Source
from moespan.errors import CheckpointError


@dataclass(frozen=True)
class LoadReport:
    """The cost of loading.

    Attributes:
        read_bytes: bytes read from the source.
        held_bytes: bytes of the parameters.
        mapped_bytes: bytes of the parameters that are mapped from a file.
    """

    read_bytes: int
    held_bytes: int
    seconds: float
    mapped_bytes: int = 0


def load_weights(
    placement: Placement,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    *,
    new_builder: NewBuilder = TensorBuilder,
    check_finite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], object] = lambda read_bytes: None,
    maximum_over_tp: Callable[[Tensor], Tensor] = lambda maxima: maxima,
    keep: Callable[[str, Any], Any] = lambda name, weight: weight,
) -> tuple[Loaded, LoadReport]:
    """Build the parameters of `placement` on `device`, each from its own pieces.

    A scale belongs to a whole row. If a row to be rounded is cut over ranks, its parts are kept as
    read until these ranks have exchanged their largest magnitudes.

    Args:
        new_builder: makes the builder of each parameter; the default builds tensors and
            `QuantizedWeight`s.
        check_finite: look for NaN and Inf in every slice that is read.
        threads: parallel readers; None is one per core of this rank, at most 8.
        progress: called with the bytes of each slice that has been read.
        maximum_over_tp: the elementwise maximum over tp ranks of a float32 vector on the CPU;
            called once, and only if `placement.cut_rows` is not empty.
        keep: takes each finished parameter and returns it, perhaps in other memory.

    Raises:
        CheckpointError: lists every tensor that holds NaN or Inf: with `check_finite` all, else
            those that are rounded, and scales.
    """
    started = time.perf_counter()
    filling = _Filling(placement, source, dtype, device, new_builder, check_finite, progress)
    with ThreadPoolExecutor(threads or min(8, torch.get_num_threads())) as pool:
        read_bytes = filling.read(pool)
        if placement.cut_rows:
            filling.fill_cut_rows(pool, maximum_over_tp)
    weights: Loaded = {}
    builders = filling.builders
    while builders:  # `finish` may copy: one at a time, so that only one parameter exists twice
        name, builder = builders.popitem()
        weights[name] = keep(name, builder.finish())
        del builder
    held_bytes = placement.num_bytes(str(dtype).removeprefix("torch."))
    return weights, LoadReport(read_bytes, held_bytes, time.perf_counter() - started)


class _Filling:
    """The builders of all parameters, and how they get their pieces. See `load_weights`.

    Attributes:
        builders: name of a parameter → its builder.
    """

    def __init__(
        self,
        placement: Placement,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        new_builder: NewBuilder,
        check_finite: bool,
        progress: Callable[[int], object],
    ) -> None:
        self._placement = placement
        self._source = source
        self._check_finite = check_finite
        self._progress = progress
        self._cut = _CutRows(placement.cut_rows)
        self._not_finite: set[str] = set()
        self.builders = {
            name: new_builder(name, parameter, dtype, device)
            for name, parameter in placement.parameters.items()
        }

    def read(self, pool: ThreadPoolExecutor) -> int:
        """Read all pieces, and put them into their builders or keep them; → the bytes read."""
        read_bytes = sum(pool.map(self._read, self._source.batches(self._placement.pieces)))
        if self._not_finite:
            raise not_finite_error(self._not_finite)
        return read_bytes

    def fill_cut_rows(
        self, pool: ThreadPoolExecutor, maximum_over_tp: Callable[[Tensor], Tensor]
    ) -> None:
        """Put the parts of rows that were kept into their builders."""
        maxima = self._cut.split(maximum_over_tp(self._cut.maxima))
        list(pool.map(self._fill_cut, [maxima] * len(self._cut)))

    def _read(self, pieces: list[Piece]) -> int:
        read_bytes = 0
        for piece, values in self._source.read(pieces):
            if not self._put(piece, values):
                self._not_finite.add(piece.tensor)
            num_bytes = values.numel() * values.element_size()
            read_bytes += num_bytes
            self._progress(num_bytes)
        return read_bytes

    def _put(self, piece: Piece, values: Tensor) -> bool:
        """Hand a slice on; → whether it is finite as far as that was looked for."""
        try:
            if piece.tensor in self._placement.cut_rows:
                self._cut.add(piece, values)
            else:
                self.builders[piece.parameter].put(piece, values)
        except NotFiniteError:
            return False
        if not self._check_finite or not values.is_floating_point():
            return True
        # torch has no isfinite for 8-bit floats.
        checked = values.float() if values.itemsize == 1 else values
        return bool(checked.isfinite().all())

    def _fill_cut(self, maxima: dict[str, Tensor]) -> None:
        piece, values = self._cut.pop()
        rows = maxima[piece.tensor][piece.tensor_index[0]]
        self.builders[piece.parameter].put(piece, values, rows)


def not_finite_error(tensors: Iterable[str]) -> CheckpointError:
    """The error that names the tensors which hold NaN or Inf."""
    return CheckpointError(
        "the checkpoint holds weights that are not finite; copy it again, or take one without them",
        (f"{tensor} holds NaN or Inf" for tensor in sorted(tensors)),
    )


class _CutRows:
    """Parts of rows as they were read, and the largest magnitude in each part.

    Attributes:
        maxima: float32, one for each row of all tensors; 0 where this rank has no part.
    """

    def __init__(self, num_rows: dict[str, int]) -> None:
        self.maxima = torch.zeros(sum(num_rows.values()))
        self._num_rows = num_rows
        self._maxima_of = self.split(self.maxima)
        self._parts: list[tuple[Piece, Tensor]] = []

    def split(self, maxima: Tensor) -> dict[str, Tensor]:
        """Name of a tensor → the values of `maxima` for its rows."""
        return dict(zip(self._num_rows, maxima.split(list(self._num_rows.values())), strict=True))

    def add(self, piece: Piece, values: Tensor) -> None:
        """Keep a copy of what was read. Threads may call this at the same time for other rows.

        Raises:
            NotFiniteError: `values` hold NaN or Inf.
        """
        maxima = row_maxima(values)
        check_scales(maxima)
        self._maxima_of[piece.tensor][piece.tensor_index[0]] = maxima
        self._parts.append((piece, values.clone()))

    def __len__(self) -> int:
        """Number of parts that are kept."""
        return len(self._parts)

    def pop(self) -> tuple[Piece, Tensor]:
        """Remove one part and return it. Threads may call this at the same time."""
        return self._parts.pop()
