"""The engine inside this process: alone, or as one rank of a program that torchrun started."""

from __future__ import annotations

import atexit
import sys

import torch
import torch.distributed as dist

from moespan.config import EngineConfig
from moespan.engine.client import LocalClient
from moespan.engine.engine import Engine, build_leader, follow
from moespan.launch.distributed import init_distributed
from moespan.launch.job import started_by_torchrun
from moespan.parallel.mesh import Mesh

# Followers wait in a broadcast while the program does other things between two calls; torchrun
# itself ends them when the leader dies.
_IDLE_S = 24 * 3600.0


def join(config: EngineConfig) -> LocalClient:
    """Start this process's part of the engine; on all ranks but the leader it does not return.

    They serve the leader until it closes, and then exit with code 0.
    """
    if not started_by_torchrun():
        return LocalClient(config, lambda config: _build(config, torch.device(config.device)))
    device = init_distributed(config.device, timeout_s=_IDLE_S)
    if dist.get_rank() > 0:
        successor: EngineConfig | None = config
        while successor is not None:
            mesh = Mesh.create(successor.layout, device, successor.moe_dispatch)
            successor = follow(successor, mesh)
        dist.destroy_process_group()
        sys.exit(0)
    client = LocalClient(
        config, lambda config: _build(config, device), on_close=dist.destroy_process_group
    )
    # A program that ends without closing must not leave the followers waiting.
    atexit.register(client.close)
    return client


def _build(config: EngineConfig, device: torch.device) -> Engine:
    return build_leader(config, Mesh.create(config.layout, device, config.moe_dispatch))
