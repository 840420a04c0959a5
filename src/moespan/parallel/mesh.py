"""The ranks and the axes between them. All collectives of the model go through an `Axis`.

Code that communicates is handed a `Mesh` and never asks torch for the world. An axis of size 1 has
no group and costs nothing. No group exists that no axis uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moespan.config import COLLECTIVE_TIMEOUT_S, Coordinates, Layout
from moespan.device import DEVICES
from moespan.errors import LayoutError
from moespan.parallel.beats import Beat, named
from moespan.parallel.control import Control
from moespan.parallel.counters import Traffic, sent_bytes
from moespan.parallel.one_shot import OneShotSum

_NO_BUFFERS: Mapping[str, int] = MappingProxyType({})

# torch 2.13 renamed these.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class HostCollectives(Protocol):
    """Collectives between CPU ranks of one machine, faster than those of their group. Sums are the
    same bits on every rank, in every run."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether sums of `x` can be made here; the same on all ranks."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the ranks; `x` may be overwritten."""

    def reduce_scatter(self, x: torch.Tensor, part: torch.Tensor) -> None:
        """Set `part` to this rank's part of the sum of `x` over the ranks."""

    def all_gather(self, x: torch.Tensor, gathered: torch.Tensor) -> None:
        """Set `gathered` to the `x` of all ranks, of any dtype, along dim 0."""


JoinHost = Callable[[dist.ProcessGroup, Sequence[int], int], HostCollectives | None]
"""Makes the collectives of a group, given its ranks in order and this rank. All of them call it
together, and all get None if one of them cannot take part."""


class Axis:
    """One dimension of the mesh as one rank sees it, with its collectives, which are counted.

    All ranks of the axis call a collective together. Nothing is sent for an empty tensor, which is
    empty on all ranks. The rank's beat tells in which collective the rank is.

    Attributes:
        name: name of the axis, for the counters.
        size: ranks along the axis.
        rank: index of this rank along the axis.
        group: the process group; None for a single rank.
        one_shot: sums small messages faster than the group does; None if not available.
        host: collectives in the memory of this machine; None if not available.
    """

    def __init__(
        self,
        name: str = "",
        ranks: Sequence[int] = (0,),
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        traffic: Traffic | None = None,
        one_shot: OneShotSum | None = None,
        beat: Beat | None = None,
        host: HostCollectives | None = None,
    ) -> None:
        self.name = name
        self.size = len(ranks)
        self.rank = rank
        self._ranks = ranks
        self.group = group
        self._traffic = traffic or Traffic()
        self.one_shot = one_shot
        self.host = host
        self._beat = beat or Beat()
        self._names: dict[tuple[str, str], tuple[int, int, int, bytes]] = {}
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def all_reduce(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """The sum of `x` over the axis. `x` is used up: it may be overwritten.

        in: partial → out: replicated.
        """
        if self.size > 1 and x.numel():
            self._count("all_reduce", module, _bytes(x))
            self._enter("all_reduce", module)
            if self.one_shot is not None and self.one_shot.takes(x):
                x = self.one_shot(x)
            elif self.host is not None and self.host.takes(x):
                x = self.host.all_reduce(x)
            else:
                dist.all_reduce(x, group=self.group)
            self._beat.leave()
        return x

    def maximum(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """The elementwise maximum of `x` over the axis, in place. in: partial → out: replicated."""
        if self.size > 1 and x.numel():
            self._count("all_reduce", module, _bytes(x))
            self._enter("all_reduce", module)
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
            self._beat.leave()
        return x

    def all_gather(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Concatenate `x` of all ranks, all of one shape, along dim 0.

        in: split → out: replicated.
        """
        if self.size == 1:
            return x
        gathered = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        if x.numel():
            self._count("all_gather", module, _bytes(x))
            self._enter("all_gather", module)
            if self.host is not None:
                self.host.all_gather(x, gathered)
            else:
                _all_gather(gathered, x.contiguous(), group=self.group)
            self._beat.leave()
        return gathered

    def reduce_scatter(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Sum `x` over the axis and keep this rank's part of dim 0; all parts are equal.

        in: partial → out: split.
        """
        if self.size == 1:
            return x
        part = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        if x.numel():
            self._count("reduce_scatter", module, _bytes(x))
            self._enter("reduce_scatter", module)
            if self.host is not None and self.host.takes(x):
                self.host.reduce_scatter(x, part)
            else:
                _reduce_scatter(part, x.contiguous(), group=self.group)
            self._beat.leave()
        return part

    def all_to_all(
        self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int], module: str
    ) -> torch.Tensor:
        """Send the next `send_rows[i]` rows of `x` to rank i, for every i.

        Returns:
            The rows received: `receive_rows[i]` from rank i, in the order of the ranks.
        """
        if self.size == 1:
            return x
        row_bytes = _bytes(x) // max(len(x), 1)
        elsewhere = sum(send_rows) - send_rows[self.rank]
        self._count("all_to_all", module, elsewhere * row_bytes)
        received = x.new_empty((sum(receive_rows), *x.shape[1:]))
        self._enter("all_to_all", module)
        dist.all_to_all_single(received, x.contiguous(), receive_rows, send_rows, group=self.group)
        self._beat.leave()
        return received

    def broadcast(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Overwrite `x` with the first rank's `x`, and return it."""
        if self.size > 1 and x.numel():
            if self.rank == 0:
                self._count("broadcast", module, _bytes(x))
            self._enter("broadcast", module)
            dist.broadcast(x, self._ranks[0], group=self.group)
            self._beat.leave()
        return x

    def send(self, x: torch.Tensor, to: int, module: str) -> None:
        """Start sending `x` to rank `to` of the axis.

        It does not wait until `x` is received. It waits for the tensor that was sent `size` calls
        earlier, because at most `size` plans are in flight.
        """
        if not x.numel():
            return
        self._count("send", module, _bytes(x))
        x = x.contiguous()
        self._enter("send", module, to)
        work = dist.isend(x, self._ranks[to], group=self.group)
        assert work is not None
        self._sending.append((work, x))
        if len(self._sending) > self.size:
            self._sending.popleft()[0].wait()
        self._beat.leave()

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Fill `x` with the tensor that rank `source` of the axis sends, and return it."""
        if x.numel():
            self._enter("receive", "", source)
            dist.recv(x, self._ranks[source], group=self.group)
            self._beat.leave()
        return x

    def pass_on(self, x: torch.Tensor) -> None:
        """Pass `x` from the first rank of the axis to the last one, uncounted."""
        if self.rank > 0:
            dist.recv(x, self._ranks[self.rank - 1], group=self.group)
        if self.rank + 1 < self.size:
            dist.send(x, self._ranks[self.rank + 1], group=self.group)

    def count_in_kernel(self, collective: str, module: str, num_bytes: int) -> None:
        """Count a collective that an operator of an NPU runs by itself over `communicator`."""
        self._count(collective, module, num_bytes)

    @cached_property
    def communicator(self) -> str:
        """The name of this axis's HCCL communicator, for operators that communicate."""
        assert self.group is not None
        backend: Any = self.group._get_backend(torch.device("npu"))
        return str(backend.get_hccl_comm_name(self.rank))

    def finish(self) -> None:
        """Wait until every tensor sent has been received."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def _enter(self, collective: str, module: str, peer: int | None = None) -> None:
        """Say that this rank is about to wait for the other ranks, or for `peer` of the axis."""
        name = self._names.get((collective, module))
        if name is None:
            ranks = self._ranks if peer is None else self._ranks[peer : peer + 1]
            name = named(collective, self.name, module, tuple(ranks))
            if peer is None:
                self._names[collective, module] = name
        self._beat.enter(name)

    def _count(self, collective: str, module: str, num_bytes: int) -> None:
        sent = sent_bytes(collective, self.size, num_bytes)
        self._traffic.count(self.name, collective, module, sent)


class Mesh:
    """The place of one rank in a layout, and the axes through it.

    Attributes:
        layout: degree of parallelism on each axis.
        rank: this rank in the world; rank 0 is the leader.
        at: coordinates of this rank along each axis.
        device: device of this rank's tensors.
        ranks_here: ranks that share this node and the memory of its CPUs.
        traffic: counters of this rank over all axes.
        beat: says where this rank is in its work.
        tp, sp, pp: the axes of these names.
        ep: the ranks over which one set of experts is spread (dispatch `all_to_all`).
        ep_tp_groups: the ranks of `ep` with this rank's tp coordinate, one of each tp group
            (dispatch `all_gather`).
        ep_fused: the ranks of `ep`, with a group that carries nothing else (dispatch `fused`).
        control: the leader's channel to all ranks.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        device: torch.device,
        buffers_mb: Mapping[str, int] = _NO_BUFFERS,
        one_shot_bytes: int = 0,
        beat: Beat | None = None,
        join_host: JoinHost | None = None,
    ) -> None:
        self.layout = layout
        self.beat = beat or Beat()
        self._buffers_mb, self._one_shot_bytes = buffers_mb, one_shot_bytes
        self._join_host = join_host
        self.rank = rank
        self.at = layout.coordinates(rank)
        self.device = device
        self.ranks_here = 1
        self.traffic = Traffic()
        self.control = Control()
        self._groups: dict[tuple[str, tuple[tuple[int, ...], ...]], dist.ProcessGroup] = {}
        self._hosts: dict[dist.ProcessGroup, HostCollectives | None] = {}
        alone = Axis(ranks=range(rank, rank + 1))
        self.tp = self.sp = self.pp = self.ep = self.ep_tp_groups = self.ep_fused = alone

    @classmethod
    def create(
        cls,
        layout: Layout,
        device: torch.device,
        moe_dispatch: str = "auto",
        idle_timeout_s: float = COLLECTIVE_TIMEOUT_S,
        ranks_here: int | None = None,
        buffers_mb: Mapping[str, int] = _NO_BUFFERS,
        one_shot_bytes: int = 0,
        beat: Beat | None = None,
        join_host: JoinHost | None = None,
    ) -> Mesh:
        """Build the mesh of `layout`; with more than one rank, torch.distributed must be set up.

        Args:
            moe_dispatch: dispatch for which axes are made (`moespan.parallel.dispatch`).
            idle_timeout_s: seconds that a rank waits for the leader's next message.
            ranks_here: ranks on this node; None means all.
            buffers_mb: axis → MB of its groups' buffer, on devices with such buffers
                (`moespan.parallel.buffers`); other axes keep the default.
            one_shot_bytes: largest message in bytes that GPUs sum over tp in one shot, if they can.
            beat: takes the places of this rank; None for nobody to see.
            join_host: makes the collectives of axes whose ranks are on one machine; None for those
                of the groups.

        Raises:
            LayoutError: the world and the layout differ in their number of ranks.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size != layout.world_size:
            raise LayoutError(
                f"layout {layout} needs {layout.world_size} ranks, but {world_size} were started"
            )
        mesh = cls(
            layout,
            dist.get_rank() if world_size > 1 else 0,
            device,
            buffers_mb,
            one_shot_bytes,
            beat,
            join_host,
        )
        mesh.ranks_here = ranks_here or world_size
        if world_size > 1:
            mesh.control = Control.create(mesh.traffic, idle_timeout_s, mesh.beat)
            for name, lines in _axes(layout, moe_dispatch).items():
                setattr(mesh, name, mesh._axis(name, lines))
        return mesh

    def connect(self) -> None:
        """Open all communicators, so that their memory is taken before the rest is given away.

        Ranks of a device open them with their first message otherwise. All ranks call it together.
        Nothing is counted.
        """
        if DEVICES[self.device.type].is_host:
            return
        x = torch.zeros(1, device=self.device)
        for group in self._groups.values():
            # Stages only send to their neighbours. A collective would open one more communicator.
            if group is not self.pp.group:
                dist.all_reduce(x, group=group)
        self.pp.pass_on(x)

    @property
    def is_leader(self) -> bool:
        """Whether this rank schedules."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.at.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head."""
        return self.at.pp == self.layout.pp - 1

    @property
    def is_speaker(self) -> bool:
        """Whether this rank samples for its replica and reports to the leader."""
        return self.is_last_stage and self.at.sp == 0 and self.at.tp == 0

    @property
    def speakers(self) -> list[int]:
        """The speaker of each replica."""
        last = self.layout.pp - 1
        return [self.layout.rank(Coordinates(last, dp, 0, 0)) for dp in range(self.layout.dp)]

    def close(self) -> None:
        """Wait for unfinished sends and destroy the groups."""
        self.pp.finish()
        self.control.close()
        for group in self._groups.values():
            dist.destroy_process_group(group)
        self._groups.clear()
        self._hosts.clear()

    def _axis(self, name: str, lines: list[tuple[int, ...]]) -> Axis:
        """The axis along the line through this rank.

        All ranks create the groups of all lines, as torch demands.
        """
        # Axes with the same lines share their groups, except `ep_fused`, which needs its own.
        key = name if name == "ep_fused" else "", tuple(lines)
        if len(lines[0]) > 1 and key not in self._groups:
            # DeviceMesh calls this function too, but takes no timeout, and would also make groups
            # for axes along which nothing is sent.
            self._groups[key], _ = dist.new_subgroups_by_enumeration(
                lines,
                timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
                backend=DEVICES[self.device.type].backend,
                pg_options=self._options(name),
                group_desc=name,
            )
        mine = next(line for line in lines if self.rank in line)
        group = self._groups.get(key)
        one_shot = self._one_shot(group, mine) if name == "tp" else None
        host = self._host(group, mine) if name != "pp" else None
        place = mine.index(self.rank)
        return Axis(name, mine, place, group, self.traffic, one_shot, self.beat, host)

    def _host(
        self, group: dist.ProcessGroup | None, ranks: Sequence[int]
    ) -> HostCollectives | None:
        """Collectives in this machine's memory, if all `ranks` are on this machine. World ranks are
        numbered machine after machine."""
        if group is None or self._join_host is None:
            return None
        if len({rank // self.ranks_here for rank in ranks}) > 1:
            return None
        if group not in self._hosts:
            self._hosts[group] = self._join_host(group, ranks, self.rank)
        return self._hosts[group]

    def _one_shot(self, group: dist.ProcessGroup | None, ranks: Sequence[int]) -> OneShotSum | None:
        """Sums small messages over tp, which has nearly all all-reduces; None if not available."""
        device = DEVICES[self.device.type]
        if group is None or not device.has_one_shot_sum or not self._one_shot_bytes:
            return None
        return OneShotSum.join(
            str(group.group_name),
            ranks,
            self.rank,
            self.ranks_here,
            self.device,
            self._one_shot_bytes,
            self.control,
        )

    def _options(self, axis: str) -> Any:
        """Options of the backend for this axis's groups; None for the defaults."""
        if not DEVICES[self.device.type].has_group_buffers or axis not in self._buffers_mb:
            return None
        from torch_npu._C._distributed_c10d import (  # type: ignore[import-not-found,unused-ignore]
            ProcessGroupHCCL,
        )

        options = ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": self._buffers_mb[axis]}
        return options


def _axes(layout: Layout, moe_dispatch: str) -> dict[str, list[tuple[int, ...]]]:
    """Axis → its lines of ranks. dp has none: nothing is sent along it."""
    coordinates = [layout.coordinates(rank) for rank in range(layout.world_size)]

    def lines(name: str) -> list[tuple[int, ...]]:
        return [
            tuple(layout.rank(replace(at, **{name: i})) for i in range(layout.sizes[name]))
            for at in coordinates
            if getattr(at, name) == 0
        ]

    axes = {name: lines(name) for name in ("tp", "sp", "pp")}
    if layout.ep_tp_groups > 1:
        starts = range(0, layout.world_size, layout.ep)
        sets = [tuple(range(start, start + layout.ep)) for start in starts]
        if moe_dispatch != "all_gather":
            axes["ep"] = sets
        if moe_dispatch == "fused":
            axes["ep_fused"] = sets
        elif moe_dispatch != "all_to_all":
            axes["ep_tp_groups"] = [line[i :: layout.tp] for line in sets for i in range(layout.tp)]
    return axes


def _bytes(x: torch.Tensor) -> int:
    return int(x.numel() * x.element_size())
