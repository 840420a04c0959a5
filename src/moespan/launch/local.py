"""The engine inside this process: alone, or as one rank of a program that torchrun started."""

from __future__ import annotations

import atexit
import os
import sys

import torch
import torch.distributed as dist

from moespan.config import EngineConfig
from moespan.engine.client import LocalClient
from moespan.engine.engine import build_leader, follow
from moespan.launch.distributed import init_distributed
from moespan.launch.job import started_by_torchrun
from moespan.launch.network import bind_collectives, interface_towards
from moespan.parallel.mesh import Mesh

# Followers wait in a broadcast while the program does other things between two calls; torchrun
# itself ends them when the leader dies.
_IDLE_S = 24 * 3600.0


def join(config: EngineConfig) -> LocalClient:
    """Start this process's part of the engine; on all ranks but the leader it does not return.

    They serve the leader until it closes, and then exit with code 0.
    """
    if not started_by_torchrun():
        device = torch.device(config.device)
        return LocalClient(build_leader(config, Mesh.create(config.layout, device)))
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        # Gloo would take the interface that the machine's name leads to: often the loopback.
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface not in (None, "lo"):
            bind_collectives(interface)
    device = init_distributed(config.device, timeout_s=_IDLE_S)
    mesh = Mesh.create(config.layout, device)
    if not mesh.is_leader:
        follow(config, mesh)
        dist.destroy_process_group()
        sys.exit(0)
    client = LocalClient(build_leader(config, mesh), on_close=dist.destroy_process_group)
    # A program that ends without closing must not leave the followers waiting.
    atexit.register(client.close)
    return client
