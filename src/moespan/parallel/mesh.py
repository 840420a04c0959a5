"""The ranks and the axes between them. All collectives of the model go through an `Axis`.

What needs a group is handed a `Mesh`; nothing asks the world. An axis of size 1 has no group and
costs nothing, and no group exists that no axis uses.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from moespan.config import Layout
from moespan.errors import LayoutError

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """Collective calls and payload bytes by (collective, module)."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    payload_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, collective: str, module: str, payload: torch.Tensor) -> None:
        """Add one call that contributes `payload` on this rank."""
        self.calls[collective, module] += 1
        self.payload_bytes[collective, module] += payload.numel() * payload.element_size()


class Axis:
    """One dimension of the mesh as one rank sees it, with its collectives, counted.

    Attributes:
        size: ranks along it.
        rank: this rank's place along it.
        traffic: what went over it since the start.
    """

    def __init__(self, size: int = 1, rank: int = 0, group: dist.ProcessGroup | None = None):
        self.size = size
        self.rank = rank
        self.traffic = Traffic()
        self._group = group

    def all_reduce(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Sum `x` over the axis, in place. in: partial → out: replicated."""
        if self.size > 1:
            self.traffic.count("all_reduce", module, x)
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Concatenate the ranks' `x` along the last dim. in: split → out: replicated."""
        if self.size == 1:
            return x
        self.traffic.count("all_gather", module, x)
        gathered = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _all_gather(gathered, x.contiguous(), group=self._group)
        return torch.cat(gathered.chunk(self.size), dim=-1)


class Mesh:
    """The place of one rank in a layout.

    Attributes:
        layout: degree of parallelism on each axis.
        rank: this rank in the world; rank 0 is the leader.
        device: where its tensors live.
        tp: the tensor-parallel axis.
    """

    def __init__(self, layout: Layout, rank: int, device: torch.device, tp: Axis) -> None:
        self.layout = layout
        self.rank = rank
        self.device = device
        self.tp = tp

    @classmethod
    def create(cls, layout: Layout, device: torch.device) -> Mesh:
        """Build the mesh of `layout`; with more than one rank, torch.distributed must be up.

        Raises:
            LayoutError: the world has another number of ranks than the layout.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size != layout.world_size:
            raise LayoutError(
                f"layout {layout} needs {layout.world_size} ranks, but {world_size} were started"
            )
        if world_size == 1:
            return cls(layout, 0, device, Axis())
        mesh = dist.init_device_mesh(device.type, (layout.tp,), mesh_dim_names=("tp",))
        tp = Axis(layout.tp, mesh.get_local_rank("tp"), mesh.get_group("tp"))
        return cls(layout, dist.get_rank(), device, tp)

    @property
    def is_leader(self) -> bool:
        """Whether this rank schedules and samples."""
        return self.rank == 0
