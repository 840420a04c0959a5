"""How tokens meet the experts that their router chose when the experts are spread over ranks.

The ranks that share one set of experts are k tp groups. The ranks of one tp group hold the same
tokens; different groups hold different tokens.

| dispatch     | what is sent                                                                   |
|--------------|--------------------------------------------------------------------------------|
| `replicated` | nothing (k = 1): every rank computes the part of its own experts               |
| `all_gather` | all tokens to all tp groups, and partial sums of the outputs back              |
| `all_to_all` | each token once to every rank of another tp group that holds one of its        |
|              | experts, and one weighted sum back; each tp rank does so for 1/tp of its       |
|              | group's tokens                                                                 |
| `fused`      | each token once for every one of its experts, and the results back, by one     |
|              | operator of an NPU, for 1/tp of the group's tokens; the host never waits       |

With every dispatch the result is partial over tp, so that one all-reduce carries it together with
the shared experts. Shapes: T tokens of this rank's tp group, H hidden, K experts per token.

An expert may have copies on several ranks. Each copy is a *physical expert*; physical experts are
numbered from 0, rank after rank (`moespan.checkpoint.experts`). Their count, as an id, is padding:
it belongs to no rank.

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
"""x [T, H], weights float32 [T, K], physical ids [T, K] → Σ weight · expert(x), [T, H], over the
experts of this rank. Experts of other ranks and padding add nothing."""

ComputeAcross = Callable[[Tensor, Tensor, Tensor, Axis], Tensor]
"""The same over the experts of all ranks of an axis, communication included. No id is padding, and
no token names a physical expert twice."""


class PhysicalExperts:
    """The copies of one layer's experts, and the ep ranks that hold them.

    Args:
        experts: for each ep rank, the experts that it holds, in the order of their physical ids.
        num_experts: experts of the layer.

    Attributes:
        count: physical experts of the layer; as an id it is padding.
        starts: for each ep rank, its first physical expert.
        rank_of: integers [count], the ep rank of each physical expert.
    """

    def __init__(
        self, experts: Sequence[Sequence[int]], num_experts: int, device: torch.device
    ) -> None:
        copies: list[list[int]] = [[] for _ in range(num_experts)]
        self.starts: list[int] = []
        rank_of: list[int] = []
        for rank, held in enumerate(experts):
            self.starts.append(len(rank_of))
            for expert in held:
                copies[expert].append(len(rank_of))
                rank_of.append(rank)
        self.count = len(rank_of)
        self.rank_of = torch.tensor(rank_of, device=device)
        most = max(map(len, copies), default=1)
        self._device = device
        self._is_identity = copies == [[physical_id] for physical_id in range(num_experts)]
        self._num_copies = torch.tensor(list(map(len, copies)), device=device)
        self._table = torch.tensor(
            [row + [-1] * (most - len(row)) for row in copies], device=device
        )

    def of(self, chosen: Tensor) -> Tensor:
        """Experts [T, K] → physical ids [T, K]; tokens take turns on the copies of an expert."""
        if self._is_identity:
            return chosen
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        return self._table[chosen, rows % self._num_copies[chosen]]

    def distinct_ids(self, rank: int, count: int) -> Tensor:
        """`count` different physical ids, int64 [count], those of ep rank `rank` first."""
        return (torch.arange(count, device=self._device) + self.starts[rank]) % self.count


class Dispatch:
    """The dispatch of one rank, the same for all layers.

    Args:
        dispatch: `auto` or one of the layout's `dispatches`.
        element_bytes: bytes of one element of the hidden state.

    Attributes:
        mode: the dispatch of the current step, never `auto`.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dispatch: str, element_bytes: int) -> None:
        layout = mesh.layout
        layout.check_dispatch(dispatch)
        self._layout, self._tp, self._ep = layout, mesh.tp, mesh.ep
        self._tp_groups, self._ep_fused = mesh.ep_tp_groups, mesh.ep_fused
        self._ep_rank = layout.ep_rank(mesh.rank)
        self._dispatch_of_step = partial(dispatch_of_step, dispatch, config, layout, element_bytes)
        self._group_tokens: list[int] = []
        self.mode = layout.dispatches[0] if dispatch == "auto" else dispatch

    def begin_step(self, tp_group_tokens: list[int]) -> None:
        """Choose the mode for a step in which tp group i of the ep group has
        `tp_group_tokens[i]` tokens."""
        self._group_tokens = tp_group_tokens
        self.mode = self.mode_of(tp_group_tokens)

    def mode_of(self, tp_group_tokens: list[int]) -> str:
        """The mode that `begin_step` would choose."""
        return self._dispatch_of_step(tp_group_tokens)

    def first_physical(self, experts: PhysicalExperts) -> int:
        """The first physical expert of this rank."""
        return experts.starts[self._ep_rank]

    def __call__(
        self,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        experts: PhysicalExperts,
        compute: Compute,
        compute_across: ComputeAcross | None = None,
    ) -> Tensor:
        """[T, H] replicated over tp → [T, H] partial over tp.

        Args:
            weights, chosen: float32 and integers [T, K], from the router.
            compute: runs the experts of this rank.
            compute_across: runs the experts of all ranks; needed by the mode `fused` only.
        """
        physical_ids = experts.of(chosen)
        if self.mode == "replicated":
            return compute(x, weights, physical_ids)
        if self.mode == "all_gather":
            return self._by_all_gather(x, weights, physical_ids, experts, compute)
        if self.mode == "fused":
            assert compute_across is not None
            return self._by_fused(x, weights, physical_ids, experts, compute_across)
        return self._by_all_to_all(x, weights, physical_ids, experts, compute)

    def _by_all_gather(
        self,
        x: Tensor,
        weights: Tensor,
        physical_ids: Tensor,
        experts: PhysicalExperts,
        compute: Compute,
    ) -> Tensor:
        num_tokens = len(x)
        added = max(self._group_tokens) - num_tokens
        if added:
            x, weights = (F.pad(part, (0, 0, 0, added)) for part in (x, weights))
            physical_ids = F.pad(physical_ids, (0, 0, 0, added), value=experts.count)
        # Routers on different ranks may differ by a rounding: their decisions are sent, not remade.
        routed = _pack(weights, physical_ids)
        x = self._tp_groups.all_gather(x, "moe")
        weights, physical_ids = _unpack(self._tp_groups.all_gather(routed, "router"))
        out = compute(x, weights, physical_ids)
        return self._tp_groups.reduce_scatter(out, "moe")[:num_tokens]

    def _by_all_to_all(
        self,
        x: Tensor,
        weights: Tensor,
        physical_ids: Tensor,
        experts: PhysicalExperts,
        compute: Compute,
    ) -> Tensor:
        num_tokens = len(x)
        mine = self._my_part(num_tokens)
        start = mine.start
        # Which ranks each of this rank's tokens goes to. Ranks of its own tp group have it already.
        holder = experts.rank_of[physical_ids[mine]]
        goes = torch.zeros(len(holder), self._ep.size, dtype=torch.bool, device=x.device)
        goes.scatter_(1, holder, True)
        own_group = self._ep_rank - self._tp.rank
        goes[:, own_group : own_group + self._tp.size] = False
        token = goes.t().nonzero()[:, 1]  # ordered by destination
        counts, one_each = goes.sum(0), [1] * self._ep.size
        arriving = self._ep.all_to_all(counts, one_each, one_each, "counts")
        send, receive = counts.tolist(), arriving.tolist()

        row = token + start
        packed = _pack(weights[row], physical_ids[row])
        routed = self._ep.all_to_all(packed, send, receive, "router")
        arrived = self._ep.all_to_all(x[row], send, receive, "moe")
        arrived_weights, arrived_ids = _unpack(routed)
        # One computation for the tokens of this tp group and the tokens that arrived.
        out = compute(
            torch.cat([x, arrived]),
            torch.cat([weights, arrived_weights]),
            torch.cat([physical_ids, arrived_ids]),
        )
        returned = self._ep.all_to_all(out[num_tokens:], receive, send, "moe")
        total = out[:num_tokens].float().index_add_(0, row, returned.float())
        return total.to(x.dtype)

    def _by_fused(
        self,
        x: Tensor,
        weights: Tensor,
        physical_ids: Tensor,
        experts: PhysicalExperts,
        compute_across: ComputeAcross,
    ) -> Tensor:
        num_sent = sent_tokens(self._layout, self._group_tokens)
        if not num_sent:
            return x  # no rank of the ep group has a token
        num_tokens = len(x)
        mine = self._my_part(num_tokens)
        x, weights, physical_ids = x[mine], weights[mine], physical_ids[mine]
        added = num_sent - (mine.stop - mine.start)
        if added:
            # All ranks send equally many tokens. The added ones are zero and go to experts of this
            # rank, and to others only where it has fewer than K.
            ids = experts.distinct_ids(self._ep_rank, physical_ids.shape[1])
            x, weights = (F.pad(part, (0, 0, 0, added)) for part in (x, weights))
            physical_ids = torch.cat([physical_ids, ids.to(physical_ids.dtype).expand(added, -1)])
        out = compute_across(x, weights, physical_ids, self._ep_fused)[: num_sent - added]
        return F.pad(out, (0, 0, mine.start, num_tokens - mine.stop)) if self._tp.size > 1 else out

    def _my_part(self, num_tokens: int) -> slice:
        """The tokens of the tp group that this tp rank sends."""
        lengths = split_evenly(num_tokens, self._tp.size)
        start = sum(lengths[: self._tp.rank])
        return slice(start, start + lengths[self._tp.rank])


def _pack(weights: Tensor, physical_ids: Tensor) -> Tensor:
    """float32 [T, K] and integers [T, K] → int32 [T, 2·K], to be sent in one message."""
    return torch.cat([weights.view(torch.int32), physical_ids.int()], -1)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    weights, physical_ids = packed.chunk(2, -1)
    return weights.contiguous().view(torch.float32), physical_ids
