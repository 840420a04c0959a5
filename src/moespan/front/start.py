"""Starts an engine and connects to it. Imports torch only if this process is a rank.

Ranks in other processes are reached through `RanksClient`. A single rank, and a rank that
`torchrun` started, computes in this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moespan import log
from moespan.config import EngineConfig, Layout, Nodes
from moespan.errors import ConfigError
from moespan.machine.launcher import launched

if TYPE_CHECKING:
    from moespan.engine.client import EngineClient


def connect(config: EngineConfig, nodes: Nodes) -> EngineClient:
    """Start the ranks that are missing and connect to the leader.

    This function returns on node 0 and, under torchrun, in the leader. On every other node, and in
    every other process of torchrun, it serves the leader until the engine closes, then exits.

    Raises:
        ConfigError, LayoutError, CheckpointError, TokenizerError: the engine cannot start.
        MeetingError: the nodes did not come together.
        EngineDeadError: a rank died while starting or, on nodes other than node 0, at any time.
    """
    is_torchrun = launched() is not None
    if nodes.nnodes > 1:
        if is_torchrun:
            raise ConfigError(
                f"nnodes={nodes.nnodes} is refused under torchrun, which starts the ranks of all "
                "nodes itself; pass --nnodes to torchrun only"
            )
        warn_if_tp_crosses_nodes(config.layout, nodes)
    if nodes.node_rank > 0:
        from moespan.launch.lives import serve_node

        serve_node(config, nodes)
    if config.layout.world_size > 1 and not is_torchrun:
        from moespan.launch.ranks import RanksClient

        return RanksClient(config, nodes=nodes)
    # This process is a rank. The variables that torch reads have to be set before its import.
    from moespan.machine import environment

    environment.apply(environment.environment_of_this_process(config))
    from moespan.launch.local import join

    return join(config)


def warn_if_tp_crosses_nodes(layout: Layout, nodes: Nodes) -> None:
    """On node 0, warn if the ranks of a tp axis are on several nodes."""
    ranks = nodes.ranks_per_node(layout)
    if ranks % layout.tp and nodes.node_rank == 0:
        log.logger.warning(
            f"tp={layout.tp} crosses nodes, each with {ranks} of the {layout.world_size} ranks: "
            "every layer waits for the network; use a tp that divides the ranks of a node"
        )
