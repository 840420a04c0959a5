"""The seam between the model and the hardware: the protocol of the operations, and its values.

`reference.py` defines what every operation means, in plain torch. Other implementations are faster,
and are tested against the reference. Shapes: T tokens of a step, S sequences, H hidden, N query
heads and KV key heads of this rank, D head size, E experts of this rank, K experts per token,
I expert width of this rank, B blocks of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moespan.checkpoint.building import Builder, KeptWeights
from moespan.checkpoint.placement import Parameter, Placement
from moespan.checkpoint.rounding import QuantizedWeight
from moespan.memory import to_device, zeros
from moespan.parallel.mesh import Axis


@dataclass(frozen=True)
class AttentionBatch:
    """Where the flattened tokens of a step lie in their sequences and in the cache.

    Some kernels take lengths as integers of the host, others read them on the device. Both forms
    are here, so that neither side waits for the other.

    Attributes:
        query_lens: query tokens of each sequence, S integers that sum to T.
        context_lens: tokens of each sequence in the cache before this step, S integers.
        block_tables: int32 [S, most blocks]; rows are padded with any valid block.
        slots: int32 [T], the cache slot of each token's key and value: block · block size + offset.
        positions: int32 [T], the position of each token in its sequence.
        lengths: int32 [S], `total_lens` on the device.
    """

    query_lens: list[int]
    context_lens: list[int]
    block_tables: Tensor
    slots: Tensor
    positions: Tensor
    lengths: Tensor

    @classmethod
    def build(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        block_tables: list[list[int]],
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """Derive positions and slots. Rows of `block_tables` may differ in length."""
        # On small arrays NumPy takes a fraction of torch's time.
        width = max(map(len, block_tables), default=0)
        tables = np.zeros((len(block_tables), width), np.int32)
        for row, table in zip(tables, block_tables, strict=True):
            row[: len(table)] = table
        queries, contexts = np.array(query_lens, np.int32), np.array(context_lens, np.int32)
        sequence = np.repeat(np.arange(len(queries)), queries)
        shifts = contexts + queries - queries.cumsum(dtype=np.int32)
        positions = np.arange(len(sequence), dtype=np.int32) + shifts[sequence]
        slots = tables[sequence, positions // block_size] * block_size + positions % block_size
        arrays = (tables, slots, positions, contexts + queries)
        parts = to_device([torch.from_numpy(array) for array in arrays], device)
        return cls(query_lens, context_lens, *parts)

    @cached_property
    def total_lens(self) -> list[int]:
        """Tokens of each sequence in the cache after this step, S integers."""
        return [a + b for a, b in zip(self.context_lens, self.query_lens, strict=True)]

    @cached_property
    def lens_on_host(self) -> Tensor:
        """`query_lens` and `context_lens`, int64 [2, S] on the host."""
        return torch.tensor([self.query_lens, self.context_lens], dtype=torch.int64)

    @cached_property
    def query_ends(self) -> list[int]:
        """Running sums of `query_lens`, S integers: where each sequence ends among the T tokens."""
        return list(accumulate(self.query_lens))

    @cached_property
    def is_decode(self) -> bool:
        """Whether every sequence has one query token."""
        return max(self.query_lens, default=0) == 1


@dataclass(frozen=True)
class KVCache:
    """The paged cache of one layer on this rank.

    Attributes:
        keys, values: [B, block size, KV, D], in the activations' dtype or int8.
        key_scales, value_scales: float32 [B, block size, KV] for int8, else None. One scale
            multiplies the D integers of one head of one token.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def zeros(
        cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """An empty cache of `shape` [B, block size, KV, D]; int8 comes with scales."""
        parts = [zeros(shape, dtype, device) for _ in range(2)]
        if dtype == torch.int8:
            parts += [zeros(shape[:-1], torch.float32, device) for _ in range(2)]
        return cls(*parts)

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are int8."""
        return self.key_scales is not None

    @property
    def tensors(self) -> list[Tensor]:
        """Keys, values and, for int8, their scales."""
        parts = (self.keys, self.values, self.key_scales, self.value_scales)
        return [part for part in parts if part is not None]

    @property
    def block_size(self) -> int:
        """Tokens in one block."""
        return int(self.keys.shape[1])


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of one step's tokens on this rank.

    Attributes:
        num_heads, num_kv_heads: query heads N and key heads KV of this rank; both are rotated.
        cos, sin: T rows of `Ops.rotary_table`.
    """

    num_heads: int
    num_kv_heads: int
    cos: Tensor
    sin: Tensor


Weight = Any
"""A parameter as `Ops.builder` returns it: a tensor, or a form that only these operations read."""


@dataclass(frozen=True)
class ExpertBank:
    """The experts of one layer that this rank holds.

    A layer has `num_physical` physical experts, numbered from 0: all copies on all ep ranks, rank
    after rank. This rank holds E consecutive ones.

    Attributes:
        gate_up, down: the experts' matrices, [E, 2·I, H] and [E, H, I].
        first: number of the first physical expert here.
        num_physical: physical experts of the layer; as an id it stands for no expert (padding).
    """

    gate_up: Weight
    down: Weight
    first: int
    num_physical: int


class Replay(Protocol):
    """Recorded work that runs again on the memory that it was recorded with."""

    def __call__(self, total_lens: list[int]) -> None:
        """Run the work. Attention sees `total_lens` tokens of each sequence."""


class Ops(Protocol):
    """Operations of one transformer layer. They leave inputs unmodified unless stated.

    Attributes:
        has_graphs: whether `record` works on this kind of device.
        quantizations: quantizations whose weights (`QuantizedWeight`) the operations take.
        has_int8_cache: whether the operations take caches of int8.
        chip: kind of NPU: 910B (A2), 910C (A3) or 310P; empty for other NPUs and other devices.
        has_second_stream: whether `beside` computes two things at the same time.
    """

    has_graphs: bool
    quantizations: tuple[str, ...]
    has_int8_cache: bool
    chip: str
    has_second_stream: bool

    def builder(
        self, name: str, parameter: Parameter, dtype: torch.dtype, device: torch.device
    ) -> Builder:
        """A builder that assembles a parameter from the pieces that are read; its result equals
        `prepare` of the whole parameter."""

    def kept_weights(
        self, placement: Placement, identity: str, dtype: torch.dtype, limit_bytes: int
    ) -> KeptWeights | None:
        """The finished parameters of `placement`, kept for the next start.

        Args:
            identity: the contents of the source (`Source.identity`).
            limit_bytes: most bytes that all kept weights may take together.

        Returns:
            None if these operations keep none.
        """

    def prepare(self, name: str, weight: Tensor | QuantizedWeight) -> Weight:
        """Lay out a whole parameter, named as in the placement table, as these kernels read it.

        Called once for a parameter, whose memory may be reused for the result. Embeddings, norms
        and biases stay tensors. Only `linear`, `mlp`, `experts` and `route` read the others.
        """

    def new_cache(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """An empty cache of one layer, `shape` [B, block size, KV, D], laid out in memory as these
        kernels read it."""

    def rotary_table(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables for activations of `dtype`, from float32 cos and sin [positions, D/2].

        A `Rotation` has rows of these tables.
        """

    def record(self, run: Callable[[], object]) -> Replay:
        """Record the device work of `run`, which must have run once before."""

    def beside(
        self, first: Callable[[], Tensor], second: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The results of two computations, none of which needs the other's.

        `second` must not communicate: ranks call their collectives in one order.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]: normalised in float32, rounded to x's dtype, then scaled."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), both [T, H]."""

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x·Wᵀ + bias: [T, in], [out, in] → [T, out].

        With a `QuantizedWeight` of 16 activation bits, W is its values times its scales. With 8
        activation bits x is rounded too: each row by itself, to the dtype of the values
        (`round_rows` in `moespan.checkpoint.rounding`). The 8-bit products are summed, exactly for
        integers and in float32 for floats, and then scaled by both scales.

        The same holds for the two products of `mlp` and `experts`. The input of the second product
        is first rounded to x's dtype.
        """

    def linear_sum(self, x: Tensor, weight: Weight, axis: Axis, module: str) -> Tensor:
        """`linear`, summed over `axis`: [T, in], [out, in] → [T, out], replicated over it."""

    def rope(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N + 2·KV, D] → q [T, N, D], k and v [T, KV, D]; q and k are rotated in the half-split
        form.

        `qkv` is used up: it may be overwritten.
        """

    def write_cache(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Store k, v [T, KV, D] at `slots` of the cache, in place.

        For an int8 cache `round_rows` rounds each head of each token.
        """

    def rope_to_cache(
        self, qkv: Tensor, rotation: Rotation, cache: KVCache, slots: Tensor
    ) -> Tensor:
        """`rope`, then `write_cache` of its k and v → q [T, N, D]."""

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
        """Causal attention: q [T, N, D] → [T, N, D].

        Each token attends to the cached keys of its sequence, this step's included. Query head n
        reads key head n // (N / KV). Softmax is in float32.
        """

    def mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        """down(swiglu(gate_up(x))): [T, H], [2·I, H], [H, I] → [T, H].

        swiglu is silu(first half) · second half: [T, 2·I] → [T, I].
        """

    def mlp_sum(
        self,
        x: Tensor,
        gate_up: Weight,
        down: Weight,
        axis: Axis,
        module: str,
        plus: Tensor | None = None,
    ) -> Tensor:
        """`mlp` + `plus`, summed over `axis`: [T, H] → [T, H], replicated over the axis.

        `plus` [T, H] is partial over the axis, as the result of `mlp` is. It is used up: it may be
        overwritten.
        """

    def route(
        self, x: Tensor, router: Weight, num_chosen: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """x [T, H] → weights float32 [T, K] and expert numbers, integers [T, K].

        The weights are the K largest of softmax(x·Wᵀ), computed in float32 over all experts, with
        the router W float32 [experts, H]. If `renormalize` and K > 1, they are divided by their
        sum + 1e-20.
        """

    def experts(self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank) -> Tensor:
        """Σ weightₖ · downₑ(swiglu(gate_upₑ(x))) over each token's chosen experts e of this rank.

        x [T, H], weights float32 and physical_ids integers [T, K] → [T, H] in x's dtype, summed in
        float32. Physical experts of other ranks add nothing, nor does the padding value
        `bank.num_physical`.
        """

    def experts_across(
        self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank, axis: Axis
    ) -> Tensor:
        """`experts` over the experts of all ranks of `axis`, by operators that also communicate.

        Rank i holds the i-th equal part of the physical experts. All ranks call it with the same
        number of tokens, at least one. No token names a physical expert twice, and none the padding
        value. Devices without such an operator are never asked (`moespan.parallel.fused`).
        """
