"""The seam between the model and the hardware: what an implementation of the operations offers.

`reference.py` defines the meaning in plain torch. Every other implementation is a faster way to
the same numbers and is tested against it. Shapes: T tokens of a step, S sequences, H hidden,
N query heads and KV key heads of this rank, D head size, E experts of this rank, K experts per
token, I expert width of this rank, B blocks of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """How the flattened tokens of a step lie in the sequences and in the cache.

    Attributes:
        query_lens: query tokens of each sequence, S integers that sum to T.
        context_lens: tokens of each sequence in the cache before this step, S integers.
        block_tables: int64 [S, most blocks]; rows are padded with any valid block.
        slots: int64 [T], where each token's key and value go: block · block size + offset.
        positions: int64 [T], each token's place in its sequence.
    """

    query_lens: list[int]
    context_lens: list[int]
    block_tables: Tensor
    slots: Tensor
    positions: Tensor

    @classmethod
    def build(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        block_tables: list[list[int]],
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """Derive positions and slots; the tables may be ragged."""
        width = max(map(len, block_tables), default=0)
        tables = torch.tensor(
            [row + [0] * (width - len(row)) for row in block_tables], dtype=torch.int64
        ).view(len(block_tables), width)
        lengths = torch.tensor(query_lens, dtype=torch.int64)
        sequence = torch.repeat_interleave(torch.arange(len(query_lens)), lengths)
        starts = lengths.cumsum(0) - lengths
        offsets = torch.arange(len(sequence)) - starts[sequence]
        positions = offsets + torch.tensor(context_lens, dtype=torch.int64)[sequence]
        slots = tables[sequence, positions // block_size] * block_size + positions % block_size
        return cls(
            query_lens,
            context_lens,
            tables.to(device),
            slots.to(device),
            positions.to(device),
        )


class Ops(Protocol):
    """Operations of one transformer layer. Inputs are not modified unless it is said."""

    # Tokens per cache block that suit the attention kernel.
    block_size: int

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]; normalised in float32, rounded to x's dtype, then scaled."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), both [T, H]."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x·Wᵀ + bias: [T, in], [out, in] → [T, out]."""

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate [T, N, D] by cos, sin float32 [T, D/2] in the half-split form."""

    def write_cache(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
    ) -> None:
        """Store k, v [T, KV, D] at `slots` of the caches [B, block size, KV, D], in place."""

    def attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """Causal attention of q [T, N, D] over each sequence's cached keys, this step's included.

        Query head n reads key head n // (N / KV). Softmax in float32. → [T, N, D].
        """

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(first half) · second half: [T, 2·I] → [T, I]."""

    def route(
        self, x: Tensor, router: Tensor, num_chosen: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Weights float32 [T, K] and expert numbers int64 [T, K] for x [T, H].

        softmax(x·Wᵀ) over all experts in float32, router [experts, H] float32; the K largest,
        divided by their sum + 1e-20 if `renormalize` and K > 1.
        """

    def experts(
        self, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        """Σ weightₖ · downₑ(swiglu(gate_upₑ(x))) over each token's chosen experts e.

        x [T, H], weights float32 and chosen int64 [T, K], gate_up [E, 2·I, H], down [E, H, I]
        → [T, H] in x's dtype, summed in float32. Numbers that are not 0..E-1 are other ranks'
        experts and add nothing.
        """
