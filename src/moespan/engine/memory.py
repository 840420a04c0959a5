"""The memory of this rank: how many cache blocks fit into it, and what each part takes.

`moespan.planner.memory` counts the parts. Here they are measured: on a device by torch's allocator
and by what is free, on the host by the memory of this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moespan.config import EngineConfig, ModelConfig
from moespan.engine.graphs import scratch_blocks
from moespan.log import logger
from moespan.memory import (
    allocated_bytes,
    available_bytes,
    forget_most_allocated,
    is_host,
    most_allocated_bytes,
    reserved_bytes,
    resident_bytes,
    return_freed_memory,
    total_bytes,
)
from moespan.ops import Ops
from moespan.parallel.mesh import Mesh
from moespan.planner.memory import RankMemory, memory_of_rank
from moespan.units import bytes_in_words

if TYPE_CHECKING:
    from moespan.engine.worker import Worker


class MemoryWatch:
    """Measures the memory of a rank by part, from before it loads its weights.

    Make it first, then call `loaded` and `started` once each.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._device = mesh.device
        return_freed_memory()
        if not is_host(mesh.device):
            torch.zeros(1, device=mesh.device)  # makes the runtime's context
        self._base_bytes = self._outside_bytes()
        mesh.connect()
        self._communicator_bytes = self._outside_bytes() - self._base_bytes
        self._loading_bytes = self._weight_bytes = 0
        self._worker: Worker | None = None
        forget_most_allocated(self._device)

    def loaded(self) -> None:
        """The weights are loaded."""
        self._loading_bytes = most_allocated_bytes(self._device) - self._at_start_bytes
        return_freed_memory()

    def started(self, worker: Worker) -> None:
        """The worker exists, and no step has run."""
        self._worker = worker
        cache = self._cache_bytes(touched=True)
        self._weight_bytes = allocated_bytes(self._device) - self._at_start_bytes - cache
        forget_most_allocated(self._device)

    def measure(self) -> RankMemory:
        """All parts, as they have been since the start of the worker."""
        worker = self._worker
        assert worker is not None
        reserved, touched = self._cache_bytes(touched=False), self._cache_bytes(touched=True)
        held = self._at_start_bytes + self._weight_bytes + touched
        graphs = worker.graphs.memory_bytes if worker.graphs is not None else 0
        activations = max(most_allocated_bytes(self._device) - held, 0)
        outside = self._outside_bytes()
        slack = 0
        if not is_host(self._device):
            slack = reserved_bytes(self._device) - held - activations - graphs
            # Some communicators are made late.
            self._communicator_bytes = max(outside - self._base_bytes, 0)
        return RankMemory(
            base_bytes=self._base_bytes,
            weight_bytes=self._weight_bytes,
            cache_bytes=reserved,
            touched_bytes=touched,
            activation_bytes=activations,
            graph_bytes=graphs,
            communicator_bytes=self._communicator_bytes,
            slack_bytes=max(slack, 0),
            loading_bytes=self._loading_bytes,
        )

    @property
    def _at_start_bytes(self) -> int:
        """What `allocated_bytes` was before anything was loaded."""
        if is_host(self._device):
            return self._base_bytes + self._communicator_bytes
        return 0

    def _outside_bytes(self) -> int:
        """Memory beside torch's tensors: of a device all that its allocator does not hold, which
        may be another process's; of the host all of this process."""
        if is_host(self._device):
            return allocated_bytes(self._device)
        used = total_bytes(self._device) - available_bytes(self._device)
        return used - reserved_bytes(self._device)

    def _cache_bytes(self, touched: bool) -> int:
        assert self._worker is not None
        parts = [part for cache in self._worker.caches for part in cache.tensors]
        if touched:
            return sum(map(resident_bytes, parts))
        return sum(part.untyped_storage().nbytes() for part in parts)


def fitting_blocks(
    config: EngineConfig, model: ModelConfig, mesh: Mesh, ops: Ops, mapped_bytes: int = 0
) -> int:
    """Cache blocks that this rank has room for, and not more than all sequences can use.

    Weights are loaded and communicators open. What steps take beside them is counted, and a reserve
    stays free.

    Args:
        mapped_bytes: bytes of this rank's weights in pages of a file, which count as free.
    """
    device = mesh.device
    counted = memory_of_rank(config, model, mesh.rank)
    parts = counted.without_cache
    taken = RankMemory(
        base_bytes=parts.base_bytes,
        weight_bytes=parts.weight_bytes,
        communicator_bytes=parts.communicator_bytes,
    )
    ranks_that_share = mesh.ranks_here if is_host(device) else 1
    reserve = counted.reserve_bytes(config.memory_reserve, total_bytes(device) // ranks_that_share)
    room = available_bytes(device) // ranks_that_share - mapped_bytes - reserve
    # Operations may know better than the device's row whether they record graphs.
    scratch = scratch_blocks(config, ops)
    blocks = counted.fitting_blocks(room, taken) + counted.scratch_blocks - scratch
    logger.debug(
        "%s are free beside a reserve of %s; steps take %s (%s), graphs %s",
        bytes_in_words(room),
        bytes_in_words(reserve),
        bytes_in_words(parts.activation_bytes),
        counted.activations.peak_in,
        bytes_in_words(parts.graph_bytes),
    )
    wanted = config.max_num_seqs * config.layout.pp * config.blocks_per_sequence
    return min(wanted, max(blocks, 0))
