"""This rank's device and process groups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moespan import log
from moespan.config import COLLECTIVE_TIMEOUT_S, EngineConfig, ModelConfig
from moespan.device import DEVICES
from moespan.errors import ConfigError
from moespan.machine.device import load_plugin
from moespan.machine.interfaces import GLOO_INTERFACE, interfaces, wrong_interface
from moespan.parallel.beats import Beat
from moespan.parallel.buffers import group_buffers_mb
from moespan.parallel.mesh import HostCollectives, JoinHost, Mesh


def init_distributed(
    device: str, store_path: Path | None = None, timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> torch.device:
    """Join the ranks of this job and return this rank's device.

    RANK, WORLD_SIZE and LOCAL_RANK come from the environment, as every torch launcher sets them.

    Args:
        device: `cpu`, `cuda` or `npu`.
        store_path: file of the store with which the ranks find each other. None takes the store
            at MASTER_ADDR and MASTER_PORT, which torchrun and the agents on many nodes set.
        timeout_s: bound on joining.

    Raises:
        ConfigError: this rank's device does not exist, or no interface that the user's
            GLOO_SOCKET_IFNAME names.
    """
    if wrong := wrong_interface(os.environ.get(GLOO_INTERFACE, ""), interfaces()):
        raise ConfigError(f"{wrong}; unset it: moespan finds the interface itself")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own_device = _take_device(device, int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_s)
    store = None
    if store_path is not None:
        store = dist.FileStore(str(store_path), world_size)
        store.set_timeout(timeout)
    # The mesh makes all groups between devices.
    with log.mute(1):  # Gloo of torch 2.9 and 2.10 reports each connection
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    return own_device


def make_mesh(
    config: EngineConfig,
    device: torch.device,
    idle_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    beat: Beat | None = None,
) -> Mesh:
    """This rank's mesh for an engine of `config`; all ranks make theirs together.

    HCCL's buffers get the size that the layout needs. If the user has set HCCL_BUFFSIZE, it applies
    to all groups instead, except with the fused dispatch, which uses it itself.
    """
    buffers_mb: dict[str, int] = {}
    is_set = "HCCL_BUFFSIZE" in os.environ and config.moe_dispatch != "fused"
    if DEVICES[config.device].has_group_buffers and config.model and not is_set:
        buffers_mb = group_buffers_mb(config, ModelConfig.from_pretrained(config.model))
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE")
    with log.mute(1):
        return Mesh.create(
            config.layout,
            device,
            config.moe_dispatch,
            idle_timeout_s,
            None if ranks_here is None else int(ranks_here),
            buffers_mb,
            config.cuda_one_shot_bytes,
            beat=beat,
            join_host=_join_host(config.device),
        )


def _join_host(device: str) -> JoinHost | None:
    """How CPU ranks of one machine share memory; None on other devices."""
    if not DEVICES[device].is_host:
        return None
    from moespan.ops.cpu.compiler import library
    from moespan.ops.cpu.shared_memory import SharedMemory

    def join(group: dist.ProcessGroup, ranks: Sequence[int], rank: int) -> HostCollectives | None:
        return SharedMemory.join(library, group, ranks, rank, COLLECTIVE_TIMEOUT_S)

    return join


def _take_device(device: str, local_rank: int) -> torch.device:
    if DEVICES[device].is_host:
        return torch.device(device)
    load_plugin(device)
    module = getattr(torch, device)
    if local_rank >= module.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no device: {module.device_count()} {device} devices are "
            "visible on this node; use a smaller layout or make more of them visible"
        )
    module.set_device(local_rank)
    return torch.device(device, local_rank)
