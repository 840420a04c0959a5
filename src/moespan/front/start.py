"""Starts an engine and connects to it, wherever its ranks are. Imports torch only for a rank.

What the ranks of another process compute is reached through `RanksClient`; one rank alone, or a
program that `torchrun` started, computes in this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moespan import log
from moespan.config import EngineConfig, Layout, Nodes
from moespan.errors import ConfigError
from moespan.machine.environment import started_by_torchrun

if TYPE_CHECKING:
    from moespan.engine.client import EngineClient


def connect(config: EngineConfig, nodes: Nodes) -> EngineClient:
    """Start the ranks that are missing and connect to the leader.

    It returns on node 0, and under torchrun in the leader. On every other node, and in every other
    process of torchrun, it serves the leader and then exits.

    Raises:
        ConfigError, LayoutError, CheckpointError, TokenizerError: the engine cannot start.
        MeetingError: the nodes did not come together.
        EngineDeadError: a rank died while starting; on a node other than node 0: or at any time.
    """
    is_torchrun = started_by_torchrun()
    if nodes.nnodes > 1:
        if is_torchrun:
            raise ConfigError(
                f"nnodes={nodes.nnodes} is refused under torchrun, which starts the ranks of all "
                "nodes itself; pass --nnodes to torchrun only"
            )
        warn_if_tp_crosses_nodes(config.layout, nodes)
    if nodes.node_rank > 0:
        from moespan.launch.ranks import serve_node

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
    """Warn, on node 0, of a tp axis whose ranks are on several nodes."""
    ranks = nodes.ranks_per_node(layout)
    if ranks % layout.tp and nodes.node_rank == 0:
        log.logger.warning(
            f"tp={layout.tp} crosses nodes, which have {ranks} of the {layout.world_size} ranks "
            "each: every layer waits for the network; it would not if each node had a multiple of "
            "tp ranks"
        )
