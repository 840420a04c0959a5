"""The engine inside this process: alone, or as one rank of a program that torchrun started."""

from __future__ import annotations

import atexit
import os
import sys

import msgspec
import torch
import torch.distributed as dist

from moespan.config import EngineConfig
from moespan.engine.build import build_leader, follow
from moespan.engine.client import LocalClient
from moespan.engine.engine import Engine
from moespan.forks import only_here
from moespan.launch.distributed import init_distributed, make_mesh
from moespan.machine.binding import bind, binding_here
from moespan.machine.cores import usable_cores
from moespan.machine.launcher import launched

# Followers wait in a broadcast while the program does other things between two calls. If the
# leader dies, torchrun ends them.
_IDLE_S = 24 * 3600.0


def join(config: EngineConfig) -> LocalClient:
    """Start this process's part of the engine. Only the leader returns.

    The other ranks follow the leader until it closes, and then exit with code 0.
    """
    lines = _bind(config)
    if launched() is None:
        device = torch.device(config.device)
        return LocalClient(config, lambda config: _build(config, device, lines))
    device = init_distributed(config.device)
    if dist.get_rank() > 0:
        successor: EngineConfig | None = config
        while successor is not None:
            successor = follow(successor, make_mesh(successor, device, _IDLE_S))
        dist.destroy_process_group()
        sys.exit(0)
    client = LocalClient(
        config, lambda config: _build(config, device, lines), on_close=dist.destroy_process_group
    )
    # A program that ends without closing must release the followers.
    atexit.register(only_here(client.close))
    return client


def _build(config: EngineConfig, device: torch.device, binding: list[str]) -> Engine:
    engine = build_leader(config, make_mesh(config, device, _IDLE_S))
    engine.info = msgspec.structs.replace(engine.info, binding=binding)
    return engine


def _bind(config: EngineConfig) -> list[str]:
    """Bind this process as one of the ranks of this machine; → the binding as lines of text.

    `auto` does not bind the user's own process, nor one that its launcher has bound: its cores then
    differ from its parent's. Threads that already run keep their memory policy. A lone rank never
    has more threads than its CPU quota has cores, unless OMP_NUM_THREADS is set.
    """
    place = launched()
    alone = place is None
    local_rank, ranks = 0, 1
    if place is not None:
        local_rank, ranks = place.local_rank, place.local_world_size or place.world_size
    is_bound = os.sched_getaffinity(0) != os.sched_getaffinity(os.getppid())
    if alone and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(usable_cores(), 1)))
    if config.bind == "off" or (config.bind == "auto" and (alone or is_bound)):
        return []
    binding = binding_here(config.bind, config.device, ranks)
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1
        torch.set_num_threads(binding.ranks[local_rank].threads)
    bind(binding.ranks[local_rank])
    return binding.summary()
