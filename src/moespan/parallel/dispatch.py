"""How tokens meet the experts that their router chose, when these are spread over ranks.

The ranks that share one set of experts are k blocks of tp ranks. Tokens are the same on all ranks
of a block, and differ between blocks.

| way          | what is sent                                                                   |
|--------------|--------------------------------------------------------------------------------|
| `replicated` | nothing (k = 1): every rank computes its own experts' part                     |
| `all_gather` | all tokens to all blocks, and partial sums of outputs back                     |
| `all_to_all` | each token once to every rank of another block that holds one of its experts,  |
|              | and one weighted sum back; each rank does that for 1/tp of its block's tokens  |
| `fused`      | each token once for every one of its experts, and the results back, by an      |
|              | operator of an NPU, for 1/tp of the block's tokens; the host waits for nothing |

Whatever the way, the result is partial over tp, so that it shares one all-reduce with the shared
experts. Shapes: T tokens of this rank's block, H hidden, K experts per token. A slot is the place
of an expert on a rank; slots are numbered through (`moespan.checkpoint.experts`).

`moespan.parallel.tokens` has the rule by which `auto` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moespan.config import ModelConfig
from moespan.parallel.fused import sent_tokens
from moespan.parallel.mesh import Axis, Mesh
from moespan.parallel.tokens import dispatch_of_step, split_evenly

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [T, H], weights float32 [T, K], slots [T, K] → Σ weight · expert(x), [T, H], over experts of
this rank; the slots of others count nothing, nor does the number of slots, which is nobody's."""

ComputeAnywhere = Callable[[Tensor, Tensor, Tensor, Axis], Tensor]
"""The same over the experts of all ranks of an axis, which send each other what that takes. There
every slot is somebody's, and no token has one twice."""


class Slots:
    """Where the experts of one layer are.

    Args:
        experts: for each ep rank, the experts that it holds, in the order of its slots.
        num_experts: experts of the layer.
    """

    def __init__(
        self, experts: Sequence[Sequence[int]], num_experts: int, device: torch.device
    ) -> None:
        places: list[list[int]] = [[] for _ in range(num_experts)]
        self.starts: list[int] = []
        rank_of: list[int] = []
        for rank, held in enumerate(experts):
            self.starts.append(len(rank_of))
            for expert in held:
                places[expert].append(len(rank_of))
                rank_of.append(rank)
        self.count = len(rank_of)
        self.rank_of = torch.tensor(rank_of, device=device)
        most = max(map(len, places), default=1)
        self._device = device
        self._is_identity = places == [[slot] for slot in range(num_experts)]
        self._replicas = torch.tensor(list(map(len, places)), device=device)
        self._table = torch.tensor(
            [row + [-1] * (most - len(row)) for row in places], device=device
        )

    def of(self, chosen: Tensor) -> Tensor:
        """Experts [T, K] → slots [T, K]; tokens take turns on replicas."""
        if self._is_identity:
            return chosen
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        return self._table[chosen, rows % self._replicas[chosen]]

    def some(self, rank: int, count: int) -> Tensor:
        """`count` different slots, int64 [count], those of ep rank `rank` first."""
        return (torch.arange(count, device=self._device) + self.starts[rank]) % self.count


class Dispatch:
    """One rank's way of sending tokens to experts, the same for all layers.

    Args:
        way: `auto` or one of the layout's `dispatches`.
        element_bytes: bytes of one element of the hidden state.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, way: str, element_bytes: int) -> None:
        layout = mesh.layout
        layout.check_dispatch(way)
        self._layout, self._tp, self._ep, self._blocks = layout, mesh.tp, mesh.ep, mesh.ep_tp_groups
        self._ep_fused = mesh.ep_fused
        self._ep_rank = layout.ep_rank(mesh.rank)
        self._dispatch_of_step = partial(dispatch_of_step, way, config, layout, element_bytes)
        self._group_tokens: list[int] = []
        self.way = layout.dispatches[0] if way == "auto" else way

    def begin_step(self, tp_group_tokens: list[int]) -> None:
        """Choose the way for a step in which block i of the ep group has `tp_group_tokens[i]`."""
        self._group_tokens = tp_group_tokens
        self.way = self.way_of(tp_group_tokens)

    def way_of(self, tp_group_tokens: list[int]) -> str:
        """What `begin_step` would choose."""
        return self._dispatch_of_step(tp_group_tokens)

    def first_slot(self, slots: Slots) -> int:
        """The first of this rank's slots."""
        return slots.starts[self._ep_rank]

    def __call__(
        self,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        slots: Slots,
        compute: Compute,
        compute_anywhere: ComputeAnywhere | None = None,
    ) -> Tensor:
        """[T, H] replicated over tp → [T, H] partial over tp.

        Args:
            weights, chosen: float32 and integers [T, K], from the router.
            compute: this rank's experts.
            compute_anywhere: those of all ranks, where the way is `fused`.
        """
        placed = slots.of(chosen)
        if self.way == "replicated":
            return compute(x, weights, placed)
        if self.way == "all_gather":
            return self._by_all_gather(x, weights, placed, slots, compute)
        if self.way == "fused":
            assert compute_anywhere is not None
            return self._by_fused(x, weights, placed, slots, compute_anywhere)
        return self._by_all_to_all(x, weights, placed, slots, compute)

    def _by_all_gather(
        self, x: Tensor, weights: Tensor, placed: Tensor, slots: Slots, compute: Compute
    ) -> Tensor:
        num_tokens = len(x)
        added = max(self._group_tokens) - num_tokens
        if added:
            x, weights = (F.pad(part, (0, 0, 0, added)) for part in (x, weights))
            placed = F.pad(placed, (0, 0, 0, added), value=slots.count)
        # Routers on different ranks may disagree by a rounding: decisions are sent, not remade.
        routed = _pack(weights, placed)
        x = self._blocks.all_gather(x, "moe")
        weights, placed = _unpack(self._blocks.all_gather(routed, "router"))
        out = compute(x, weights, placed)
        return self._blocks.reduce_scatter(out, "moe")[:num_tokens]

    def _by_all_to_all(
        self, x: Tensor, weights: Tensor, placed: Tensor, slots: Slots, compute: Compute
    ) -> Tensor:
        num_tokens = len(x)
        mine = self._my_part(num_tokens)
        start = mine.start
        # Which of my tokens go to which rank: those of my own block have them already.
        holder = slots.rank_of[placed[mine]]
        goes = torch.zeros(len(holder), self._ep.size, dtype=torch.bool, device=x.device)
        goes.scatter_(1, holder, True)
        own_block = self._ep_rank - self._tp.rank
        goes[:, own_block : own_block + self._tp.size] = False
        token = goes.t().nonzero()[:, 1]  # ordered by destination
        counts, one_each = goes.sum(0), [1] * self._ep.size
        arriving = self._ep.all_to_all(counts, one_each, one_each, "counts")
        send, receive = counts.tolist(), arriving.tolist()

        row = token + start
        routed = self._ep.all_to_all(_pack(weights[row], placed[row]), send, receive, "router")
        arrived = self._ep.all_to_all(x[row], send, receive, "moe")
        arrived_weights, arrived_placed = _unpack(routed)
        # One computation for my block's tokens and those of others; slots elsewhere count nothing.
        out = compute(
            torch.cat([x, arrived]),
            torch.cat([weights, arrived_weights]),
            torch.cat([placed, arrived_placed]),
        )
        returned = self._ep.all_to_all(out[num_tokens:], receive, send, "moe")
        total = out[:num_tokens].float().index_add_(0, row, returned.float())
        return total.to(x.dtype)

    def _by_fused(
        self,
        x: Tensor,
        weights: Tensor,
        placed: Tensor,
        slots: Slots,
        compute_anywhere: ComputeAnywhere,
    ) -> Tensor:
        num_sent = sent_tokens(self._layout, self._group_tokens)
        if not num_sent:
            return x  # on no rank of the ep group is there a token
        num_tokens = len(x)
        mine = self._my_part(num_tokens)
        x, weights, placed = x[mine], weights[mine], placed[mine]
        added = num_sent - (mine.stop - mine.start)
        if added:
            # All ranks send equally many: the others are zero, and go to this rank as far as it has
            # experts.
            some = slots.some(self._ep_rank, placed.shape[1]).to(placed.dtype)
            x, weights = (F.pad(part, (0, 0, 0, added)) for part in (x, weights))
            placed = torch.cat([placed, some.expand(added, -1)])
        out = compute_anywhere(x, weights, placed, self._ep_fused)[: num_sent - added]
        return F.pad(out, (0, 0, mine.start, num_tokens - mine.stop)) if self._tp.size > 1 else out

    def _my_part(self, num_tokens: int) -> slice:
        """Which of the block's tokens this tp rank sends."""
        lengths = split_evenly(num_tokens, self._tp.size)
        start = sum(lengths[: self._tp.rank])
        return slice(start, start + lengths[self._tp.rank])


def _pack(weights: Tensor, placed: Tensor) -> Tensor:
    """float32 [T, K] and integers [T, K] → int32 [T, 2·K], to be sent at once."""
    return torch.cat([weights.view(torch.int32), placed.int()], -1)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    weights, placed = packed.chunk(2, -1)
    return weights.contiguous().view(torch.float32), placed
