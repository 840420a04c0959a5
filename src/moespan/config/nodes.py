"""The machines that run one job together, and where they meet. Imports no torch."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from moespan.config.layout import Layout
from moespan.errors import ConfigError, LayoutError


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of one job, seen from one of them.

    Every node is started with the same settings except for its `node_rank`. All nodes run equally
    many consecutive ranks. Node 0 has rank 0, the front, and the meeting point.

    Attributes:
        nnodes: machines that run the job.
        node_rank: number of this machine, from 0.
        master_addr: address of node 0 that the other nodes reach, and the only one on which node 0
            listens.
        master_port: port of the meeting point on node 0.
        join_timeout_s: seconds that a node waits for the other nodes to join.
        silence_s: seconds without a message after which a node counts as lost.
        cluster_key_file: file with the secret that all nodes share; None for the environment
            variable MOESPAN_CLUSTER_KEY, or else a key that node 0 makes and shows.
        no_cluster_key: take part without a secret, so that anybody who reaches the meeting point
            may take part too; the same on all nodes.
    """

    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    join_timeout_s: float = 300.0
    silence_s: float = 8.0
    cluster_key_file: str | None = None
    no_cluster_key: bool = False

    def __post_init__(self) -> None:
        if self.nnodes < 1:
            raise ConfigError(f"nnodes={self.nnodes} must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"node_rank={self.node_rank} must be from 0 to {self.nnodes - 1}: one of "
                f"nnodes={self.nnodes}"
            )
        if not 1 <= self.master_port <= 65535:
            raise ConfigError(f"master_port={self.master_port} must be from 1 to 65535")
        if not self.master_addr or is_wildcard(self.master_addr):
            raise ConfigError(
                f"master_addr={self.master_addr!r} is refused: it means every network of the "
                "machine, so that anybody who reaches the meeting point could take part; give the "
                "address of node 0 that the other nodes reach"
            )
        if self.no_cluster_key and self.cluster_key_file is not None:
            raise ConfigError(
                f"no_cluster_key and cluster_key_file={self.cluster_key_file} contradict each "
                "other; give one of them"
            )
        for name in ("join_timeout_s", "silence_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a number above 0")

    @property
    def meeting_point(self) -> str:
        """Host and port of the meeting point, as `host:port`."""
        host = f"[{self.master_addr}]" if ":" in self.master_addr else self.master_addr
        return f"{host}:{self.master_port}"

    def ranks_per_node(self, layout: Layout) -> int:
        """Ranks that each node runs.

        Raises:
            LayoutError: the ranks of `layout` cannot be spread evenly over the nodes.
        """
        ranks, left_over = divmod(layout.world_size, self.nnodes)
        if left_over:
            raise LayoutError(
                f"nnodes={self.nnodes} does not divide the {layout.world_size} ranks of {layout}; "
                "every node runs equally many, so use a layout with a multiple of "
                f"{self.nnodes} ranks, or another nnodes"
            )
        return ranks


def is_wildcard(address: str) -> bool:
    """Whether `address` is 0.0.0.0 or ::, in any spelling; a host name is not."""
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False
