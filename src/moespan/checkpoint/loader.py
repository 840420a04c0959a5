"""Fills a rank's parameters from a source of weights, slice by slice."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from moespan.checkpoint.placement import Piece, Placement
from moespan.checkpoint.source import Source
from moespan.errors import CheckpointError
from moespan.memory import zeros


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
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Allocate the parameters of `placement` on `device` and fill them.

    Args:
        check_finite: look for NaN and Inf in every slice that is read.
        threads: parallel readers; None is one per core of this rank, 8 at most.
        progress: called with the bytes of each slice that has been read.

    Raises:
        CheckpointError: with `check_finite`, lists every tensor that holds NaN or Inf.
    """
    started = time.perf_counter()
    # Zeros, because padding must be.
    weights = {
        name: zeros(
            parameter.shape,
            getattr(torch, parameter.dtype) if parameter.dtype else dtype,
            device,
        )
        for name, parameter in placement.parameters.items()
    }
    not_finite: list[str] = []

    def fill(pieces: list[Piece]) -> int:
        read_bytes = 0
        for piece, values in source.read(pieces):
            if check_finite and not values.isfinite().all():
                not_finite.append(f"{piece.source} holds NaN or Inf")
            weights[piece.parameter][piece.index].copy_(values)
            num_bytes = values.numel() * values.element_size()
            read_bytes += num_bytes
            progress(num_bytes)
        return read_bytes

    with ThreadPoolExecutor(threads or min(8, torch.get_num_threads())) as pool:
        read_bytes = sum(pool.map(fill, source.batches(placement.pieces)))
    if not_finite:
        raise CheckpointError("the checkpoint holds weights that are not finite", not_finite)
    held = sum(weight.numel() * weight.element_size() for weight in weights.values())
    return weights, LoadReport(read_bytes, held, time.perf_counter() - started)
